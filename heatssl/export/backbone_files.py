"""Backbones as files that outlive a run: safetensors with timm's own keys, and a JSON that describes them."""

import json
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from heatssl.backbones import create_backbone
from heatssl.backbones.create import TIMM_SOURCES, without_starting_weights
from heatssl.errors import UserError
from heatssl.files import write_atomically

FORMAT = "heatssl-backbone-3"
_UNSAID: dict[str, dict[str, Any]] = {  # earlier formats: of gau_* and flash_*, what was meant where nothing was said
    "heatssl-backbone-1": {"norm_place": "post", "value_activation": "silu", "mixed_share": 1.0},
    "heatssl-backbone-2": {"mixed_share": 1.0},
}
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # files of weights, by the end of their name


@dataclass(frozen=True)
class BackboneInfo:
    """All that is needed to build a backbone again and to feed it: the contents of ``backbone.json``."""

    name: str  # a timm name
    image_size: int  # pixels, square
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    # per colour, of images in [0, 1]
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    step: int = 0  # optimiser steps behind the weights; 0 for weights that no run of ours made
    format: str = FORMAT

    @classmethod
    def from_json(cls, text: str) -> "BackboneInfo":
        """Of this format or an earlier one, whose units had other defaults.

        Raises:
            ValueError, TypeError: on what describes no backbone.
        """
        info = cls(**json.loads(text))
        arguments = without_starting_weights(info.arguments)  # older files have them
        if info.format not in _UNSAID:
            return replace(info, arguments=arguments)
        unsaid = _UNSAID[info.format] if info.name.startswith(("gau_", "flash_")) else {}
        return replace(info, format=FORMAT, arguments=unsaid | arguments)

    def to_json(self) -> str:
        """The contents of ``backbone.json``, and of the metadata beside weights."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    def describe(self) -> str:
        """For messages: ``vit_tiny_patch16_224 (depth=6) at 64 px``."""
        arguments = ", ".join(f"{key}={value}" for key, value in sorted(self.arguments.items()))
        return f"{self.name}{f' ({arguments})' if arguments else ''} at {self.image_size} px"


def save_backbone(folder: Path, backbone: nn.Module, info: BackboneInfo, prefix: str = "") -> None:
    """Write ``<prefix>backbone.safetensors`` and ``<prefix>backbone.json``, each whole or not at all.

    Raises:
        UserError: when the disk is full or cannot be written.
    """
    # Names a compiled wrapper has given must not reach the file: plain timm loads it.
    state = {key.replace("_orig_mod.", ""): value for key, value in backbone.state_dict().items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    description = info.to_json()
    weights = safetensors.torch.save(tensors, metadata={"backbone": description})
    write_atomically(folder / f"{prefix}backbone.safetensors", lambda file: file.write(weights))
    write_atomically(folder / f"{prefix}backbone.json", lambda file: file.write(description.encode()))


def keep_backbone(run: Path, backbone: nn.Module, info: BackboneInfo) -> None:
    """Write ``checkpoints/step_STEP_backbone.safetensors``, which later steps leave alone; a source as any other.

    Raises:
        UserError: when the disk is full or cannot be written.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    save_backbone(folder, backbone, info, prefix=f"step_{info.step:08d}_")


def kept_backbones(run: Path) -> dict[int, Path]:
    """Step -> weights, ascending: those of :func:`keep_backbone`, the best ones and the last ones.

    Raises:
        UserError: when one is damaged.
    """
    files = [*run.glob("checkpoints/step_*_backbone.safetensors"), *run.glob("*backbone.safetensors")]
    by_step = {_described_by(path).step: path for path in files}
    return dict(sorted(by_step.items()))


def load_backbone(
    source: str | Path, *, classifier: bool = False, seed: int | None = None
) -> tuple[nn.Module, BackboneInfo]:
    """A backbone with its weights, in evaluation mode on the CPU, and what is known about it.

    Args:
        source: a run folder (its last weights); ``RUN/best`` (best by online kNN); ``timm:NAME`` (pretrained
            weights) or ``timm:NAME?random`` (random ones, see ``seed``);
            ``hf-hub:USER/NAME`` and ``local-dir:FOLDER`` as timm takes them; ``FILE.safetensors`` that heatssl wrote,
            of a classifier its backbone; ``FILE?NAME``, weights (.safetensors, .pth, .pt, .bin) of timm's model NAME,
            classifier or none.
        classifier: keep the one that the weights came with.
        seed: of random weights; torch's global generator stays as it was. None: they are drawn from it.

    Raises:
        UserError: when the folder is missing or holds no backbone, when the weights do not fit the
            architecture that the JSON or the name describes, when timm has no weights for the name, and when they have
            no classifier but one is asked for. That of ``heatssl finetune`` is :func:`load_head`'s.
    """
    text = str(source)
    if text.startswith(("timm:", *TIMM_SOURCES)):
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return _from_timm(text.removeprefix("timm:"), classifier)
    path, name = _file_and_name(text)
    if not is_run(source) and name:
        return _from_file(path, name, classifier)
    if classifier:
        raise _without_classifier(text)
    weights_path, info = _find(Path(source)) if is_run(source) else (path, _described_by(path))
    weights_path.open("rb").close()  # safetensors would call a forbidden file a missing one
    backbone = create_backbone(info.name, info.image_size, **info.arguments)
    try:
        tensors = safetensors.torch.load_file(weights_path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{weights_path} is damaged ({error}): copy it again or pretrain again") from error
    wanted = backbone.state_dict()
    tensors = _backbone_tensors(tensors, wanted)
    mismatch = first_mismatch(tensors, wanted)
    if mismatch:
        raise UserError(
            f"{weights_path} holds weights of {_described_in(weights_path)}, "
            f"but {weights_path.with_suffix('.json').name} describes {info.describe()}: {mismatch}"
        )
    backbone.load_state_dict(tensors)
    return backbone.eval(), info


@dataclass(frozen=True)
class Head:
    """The linear layer that ``heatssl finetune`` has trained on the mean over positions."""

    weight: Tensor  # (K, C)
    bias: Tensor  # (K,)
    classes: list[str]  # K names


def load_head(source: str | Path) -> Head | None:
    """The head of a file of ``heatssl finetune``, whose backbone :func:`load_backbone` gives; None: it has none.

    Raises:
        UserError: when the file says nothing of the classes, or something else.
    """
    path, name = _file_and_name(str(source))
    if is_run(source) or name or path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if not {"head.weight", "head.bias"} <= set(file.keys()) or "classes" not in (file.metadata() or {}):
                return None
            head = Head(
                file.get_tensor("head.weight"), file.get_tensor("head.bias"), json.loads(file.metadata()["classes"])
            )
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from error
    if len(head.classes) != len(head.weight):
        raise UserError(f"{path} has {len(head.weight)} logits, but {len(head.classes)} classes: copy it again")
    return head


def _backbone_tensors(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The backbone of a file of ``heatssl finetune``, whose keys say ``backbone.`` first; other files as they are."""
    inside = {key.removeprefix("backbone."): value for key, value in found.items() if key.startswith("backbone.")}
    return inside if inside and wanted.keys().isdisjoint(found) else found


def first_mismatch(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first difference in names or shapes of two state dicts, or None when one loads into the other."""
    for key in [*wanted, *found]:
        if key not in found:
            return f"{key} is missing"
        if key not in wanted:
            return f"{key} has no place"
        if found[key].shape != wanted[key].shape:
            return f"{key} is {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
    return None


def is_run(source: str | Path) -> bool:
    """Whether a source stands for a run folder, and not for weights from elsewhere."""
    return not str(source).startswith(("timm:", *TIMM_SOURCES)) and _file_and_name(str(source))[0].suffix not in WEIGHTS


def run_folder(source: str | Path) -> Path:
    """The run folder of ``RUN`` or ``RUN/best``; the latter is no folder of its own, it names the best weights."""
    source = Path(source)
    return source.parent if source.name == "best" and not source.exists() else source


def _find(source: Path) -> tuple[Path, BackboneInfo]:
    """Weights and description of a run folder or RUN/best."""
    folder = run_folder(source)
    best = folder != source
    prefix = "best_" if best else ""
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist: give one of heatssl pretrain, or timm:NAME")
    weights, description = folder / f"{prefix}backbone.safetensors", folder / f"{prefix}backbone.json"
    if not weights.exists() or not description.exists():
        if not (folder / "config.yaml").exists():
            raise UserError(f"{folder} is not a run folder, it has no config.yaml: give one of heatssl pretrain")
        if best:
            raise UserError(f"{folder} has no best weights, trainer.knn_every=N chooses them: use {folder}")
        raise UserError(f"{folder} has no weights yet: let heatssl pretrain reach its first checkpoint")
    try:
        info = BackboneInfo.from_json(description.read_text())
    except (ValueError, TypeError) as error:
        raise UserError(f"{description} describes no backbone ({error}): restore it from the run") from error
    if info.format != FORMAT:
        raise UserError(f"{description} has format {info.format!r}, not {FORMAT!r}: update heatssl")
    return weights, info


def _described_in(weights: Path) -> str:
    info = _description(weights)
    return info.describe() if info else "an unknown architecture"


def _description(weights: Path) -> BackboneInfo | None:
    """What a file of heatssl says of its architecture; None for files of others."""
    with safetensors.safe_open(weights, framework="pt") as file:
        description = (file.metadata() or {}).get("backbone")
    return BackboneInfo.from_json(description) if description else None


def _file_and_name(source: str) -> tuple[Path, str]:
    """``FILE?NAME`` in its parts; a file may have a ``?`` in its name."""
    path, mark, name = source.rpartition("?")
    return (Path(path), name) if mark and Path(path).suffix in WEIGHTS else (Path(source), "")


def _without_classifier(name: str) -> UserError:
    return UserError(
        f"no classifier of {name} can be explained: use target=self, or train one with heatssl probe for target=probe"
    )


def _from_file(path: Path, name: str, classifier: bool) -> tuple[nn.Module, BackboneInfo]:
    """Anybody's weights, of a model of timm's."""
    _check_file(path)
    settings = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    image_size = settings.input_size[-1] if settings else 224  # an unknown name is answered by what comes next
    backbone = create_backbone(name, image_size)
    found = _load_file(backbone, path, name)
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier")
    # A distilled model has two, which answer together.
    head = found.get(f"{names if isinstance(names, str | None) else names[0]}.weight")
    if classifier:
        if head is None:
            raise _without_classifier(str(path))
        backbone = create_backbone(name, image_size, classes=len(head))
        _load_file(backbone, path, name)
    return backbone.eval(), _info(name, image_size, backbone)


def _described_by(path: Path) -> BackboneInfo:
    """What a file of heatssl's own says of itself."""
    _check_file(path)
    try:
        info = _description(path) if path.suffix == ".safetensors" else None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from error
    if info is None:
        raise UserError(f"{path} does not say which model it is of: write {path}?NAME with a name of timm's")
    return info


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"there is no file {path}: give one of weights, a run folder, or timm:NAME")


def _load_file(backbone: nn.Module, path: Path, name: str) -> dict[str, Any]:
    """Load weights as others publish them: in a table, with a classifier or a decoder, named as elsewhere.

    Returns:
        What the file holds, by timm's names.
    """
    try:
        found = timm.models.load_state_dict(str(path))
    except Exception as error:  # files are broken in many ways
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"{path} cannot be read as weights ({reason}): copy it again, or save it as safetensors"
        ) from error
    # timm's own models translate the names of their authors' files.
    translate = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    wanted = backbone.state_dict()
    found = _backbone_tensors(found, wanted)
    found = translate(found, backbone) if translate else found
    mismatch = first_mismatch({key: found[key] for key in found if key in wanted}, wanted)
    if mismatch:
        raise UserError(f"{path} does not hold weights of {name}: {mismatch}")
    heads = ("head.", "head_dist.", "fc.", "classifier.")
    left_out = [key for key in found if key not in wanted and not key.startswith(heads)]
    if left_out:
        warnings.warn(
            f"{path}: {len(left_out)} tensors that {name} lacks are left out, {left_out[0]} first", stacklevel=2
        )
    backbone.load_state_dict(found, strict=False)
    return dict(found)


def _from_timm(name: str, classifier: bool) -> tuple[nn.Module, BackboneInfo]:
    """A model of timm's, with its published weights or random ones."""
    name, _, option = name.partition("?")
    if option not in ("", "random"):
        raise UserError(f"timm:{name}?{option}: the only option is ?random")
    pretrained = option == ""
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if pretrained and settings is not None and not settings.has_weights:
        raise UserError(f"timm has no pretrained weights for {name}: use timm:{name}?random")
    try:
        image_size = settings.input_size[-1] if settings else _image_size(name)
        backbone = create_backbone(name, image_size, pretrained=pretrained, classes=None if classifier else 0)
    except UserError:
        raise
    except Exception as error:
        # Each downloader behind timm has exceptions of its own; to the user they all mean the same.
        if not pretrained:
            raise UserError(f"{name} cannot be created ({type(error).__name__}: {error}): choose another") from error
        raise UserError(
            f"the weights of {name} could not be loaded ({type(error).__name__}): "
            f"check the name and the network, fill timm's cache, or use timm:NAME?random"
        ) from error
    if classifier and not getattr(backbone, "num_classes", 0):
        raise _without_classifier(name)
    return backbone.eval(), _info(name, image_size, backbone)


def _info(name: str, image_size: int, backbone: nn.Module) -> BackboneInfo:
    found = getattr(backbone, "pretrained_cfg", {})
    return BackboneInfo(name, image_size, mean=list(found.get("mean", ())), std=list(found.get("std", ())))


def _image_size(name: str) -> int:
    """Pixels that the configuration beside weights of ``hf-hub:`` or ``local-dir:`` names."""
    if not name.startswith(TIMM_SOURCES):
        return 224  # an unknown name, which create_backbone answers
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise UserError(f"{name} is no folder: give one with config.json and model.safetensors, as timm saves them")
    model: Any = timm.create_model(name, num_classes=0)  # without its weights
    return int(model.pretrained_cfg["input_size"][-1])
