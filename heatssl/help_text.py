"""Help of each sub-command, made from the schemas and the shipped configs: it cannot fall behind them."""

import ast
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from heatssl.config import SCHEMAS
from heatssl.config_folder import first_remark, groups, options, remarked_settings

ATTRIBUTION = Path(__file__).parent / "attribution"
SUMMARY = {
    "demo": "pretrain on generated images, evaluate, attribute, report: about 5 minutes on 2 CPU cores",
    "pretrain": "pretrain a timm backbone without labels",
    "probe": "train a classifier on frozen features and report its accuracy",
    "knn": "report the accuracy of nearest neighbours among frozen features",
    "finetune": "train all weights on labels and report the accuracy",
    "segment": "report how well frozen feature maps tell the classes of pixels",
    "detect": "report how well boxes around objects are found in frozen feature maps",
    "health": "report figures of frozen features that need no labels",
    "evaluate": "measure several backbones by the same protocols: one table, and a page",
    "attribute": "write heatmaps of where the features come from, with or without a classifier, and a page of them",
    "report": "write report.html from what a run folder holds",
    "export": "write weights as timm, the Hugging Face hub and ONNX take them",
    "models": "list backbones with their parameters, operations and input size",
}
SHORT = {  # other names of settings, see heatssl.words
    "attribute": "--model NAME is run=NAME, --method A,B is methods=[A,B], --score is score=true",
}
EXAMPLES = {
    "demo": ["heatssl demo", "heatssl demo seed=1 output=runs/demo_seed1"],
    "pretrain": [
        "heatssl pretrain recipe=demo",
        "heatssl pretrain data=folder data.root=/path/to/images backbone=vit_small_patch16_224",
        "heatssl pretrain data=images data.root=/path/to/photographs trainer.steps=20000 output=runs/mine",
        "heatssl pretrain recipe=imagenette_heat_jepa data.root=imagenette96.tar",
        "torchrun --nproc-per-node=8 tools/pretrain.py recipe=imagenet_vit_small data.root=/path/to/imagenet",
    ],
    "probe": [
        "heatssl probe run=runs/demo",
        "heatssl probe run=runs/demo head=attentive",
        "heatssl probe run=runs/demo shots=5",
        "heatssl probe run=runs/demo protocol=mae batch_size=512",
        "heatssl probe run=runs/demo/best data=folder data.root=/path/to/images",
    ],
    "knn": [
        "heatssl knn run=runs/demo",
        "heatssl knn run=runs/demo k=[10,20,50,100,200]",
        "torchrun --nproc-per-node=8 -m heatssl.cli knn run=runs/demo",
        "heatssl knn run=timm:vit_small_patch16_224 data=folder data.root=/path/to/images",
    ],
    "finetune": [
        "heatssl finetune run=runs/demo epochs=20",
        "heatssl finetune run=timm:vit_small_patch16_224 data=folder data.root=/path/to/images output=runs/tuned",
    ],
    "segment": [
        "heatssl segment run=runs/demo",
        "heatssl segment run=runs/demo data=tar data.root=pets-trimap.tar ignore=[3] method=knn",
    ],
    "detect": [
        "heatssl detect run=runs/demo data=shapes data.train_size=1000",
        "heatssl detect run=runs/demo data=folder data.root=/path/to/coco scales=[2,1,0.5]",
    ],
    "health": ["heatssl health run=runs/demo", "heatssl health run=runs/demo other=runs/demo/best"],
    "evaluate": [
        "heatssl evaluate runs/demo runs/demo/best",
        "heatssl evaluate runs/mine timm:vit_small_patch16_224.dino --suite full data=folder data.root=/path/to/images",
        "heatssl evaluate runs/a runs/b seeds=[0,1,2] output=runs/comparison",
    ],
    "attribute": [
        "heatssl attribute run=runs/demo",
        "heatssl attribute cat.jpg photographs/ run=runs/demo methods=[gradcam] target=cat.jpg",
        "heatssl attribute cat.jpg --model timm:vit_small_patch16_224.dino --method gradcam,ig,heat_flow:uniform",
        "heatssl attribute cat.jpg --model timm:vit_small_patch16_224.augreg_in21k_ft_in1k target=logit:285",
        "heatssl attribute run=runs/demo data=tar data.root=pets-trimap.tar ignore=[3] score=true",
        "heatssl attribute run=runs/demo checkpoints=true",
    ],
    "report": ["heatssl report run=runs/demo"],
    "export": [
        "heatssl export run=runs/demo",
        "heatssl export run=runs/demo/finetuned.safetensors formats=[timm,onnx] output=exported",
    ],
    "models": ["heatssl models", "heatssl models names=vit_small_*,gau_small_*"],
}


def overview() -> str:
    """Body of ``heatssl --help``."""
    lines = [f"  {name:<10} {summary}" for name, summary in SUMMARY.items()]
    return "\n".join(["commands:", *lines, "", "`heatssl COMMAND --help` lists the settings of a command."])


def command_help(command: str) -> str:
    """Body of ``heatssl COMMAND --help``: examples, groups and their options, settings and their defaults."""
    paragraphs = ["examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[command])]
    if command == "demo":
        return "\n\n".join([*paragraphs, "Settings are those of pretrain with recipe=demo: heatssl pretrain --help"])
    if command in SHORT:
        paragraphs.append(SHORT[command])
    if command == "attribute":
        paragraphs.append("methods, heat_flow:METHOD and heat_flow:uniform:\n" + "\n".join(_method_lines()))
        paragraphs.append("scores, or all, see docs/attribution_scores.md:\n  " + ", ".join(score_names()))
    if groups(command):
        paragraphs.append("groups, each option a file of configs/:\n" + "\n".join(_group_lines(command)))
    opening = "settings, with the value they have when no group sets another:\n"
    paragraphs.append(opening + "\n".join(_setting_lines(SCHEMAS[command])))
    for group in ("objective", "prior"):
        if group in groups(command):
            paragraphs += [_option_paragraph(group, name) for name in options(group) if name != "none"]
    return "\n\n".join(paragraphs)


def _method_lines() -> list[str]:
    """Each method and what it is, from the head of its file: importing one takes seconds."""
    files = sorted((ATTRIBUTION / "methods").glob("[a-z]*.py"))
    remarks = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files}
    return [f"  {name:<26}  {remark.partition(chr(10))[0].rstrip('.')}" for name, remark in remarks.items()]


def score_names() -> list[str]:
    """The keys of ``heatssl.attribution.score.SCORES``, from its source."""
    source = (ATTRIBUTION / "score.py").read_text(encoding="utf-8")
    return re.findall(r'^    "(\w+)": Score\(', source, flags=re.MULTILINE)


def _group_lines(command: str) -> list[str]:
    choices = [(group, option) for group in groups(command) for option in options(group)]
    width = max(len(f"{group}={option}") for group, option in choices)
    return [f"  {f'{group}={option}':<{width}}  {first_remark(group, option)}" for group, option in choices]


def _option_paragraph(group: str, name: str) -> str:
    settings = remarked_settings(group, name)
    lines = [_line(f"{group}.{key}={value}", remark) for key, value, remark in settings if key != "name"]
    return f"settings of {group}={name}:\n" + "\n".join(lines)


def _setting_lines(schema: type, prefix: str = "") -> list[str]:
    lines = []
    remarks = _remarks(schema)
    for setting in fields(schema):
        key = f"{prefix}{setting.name}"
        if isinstance(setting.type, type) and is_dataclass(setting.type):
            lines += _setting_lines(setting.type, f"{key}.")
            continue
        default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
        lines.append(_line(f"{key}={_word(default)}", remarks.get(setting.name, "")))
    return lines


def _line(setting: str, remark: str) -> str:
    return f"  {setting:<40}  {remark}".rstrip()


def _remarks(schema: type) -> dict[str, str]:
    """Setting -> the comment behind it in the source, base classes included."""
    remarks: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if is_dataclass(kind):
            remarks |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), flags=re.MULTILINE))
    return remarks


def _word(value: Any) -> str:
    """A default the way it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_word(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_word(part) for part in value) + "]"
    return str(value)
