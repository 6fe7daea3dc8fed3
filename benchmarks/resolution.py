"""Other resolutions than that of training: frozen features at half to four times the size, without tuning.

python benchmarks/resolution.py runs/gau_softmax runs/vit          # pretrained: benchmarks/objectives.py --keep runs
python benchmarks/resolution.py --labels gau_relu2 vit --root imagenette96.tar        # trained with labels here first
python benchmarks/resolution.py --labels gau_relu2 vit --crop-scale 0.6 1             # on the generated scenes

A classifier of the features of train at the size of training (a linear probe and kNN; with labels the model's own
head) meets other images at every size: a held-out tenth of train, or val with --final, once for a figure that is
reported. Nothing is trained again; positions and the normaliser are switched, the position table of timm's ViT is
interpolated. A window is as long as offsets in training, one less than a side of what was encoded. "Centred" is the
same after the difference has been taken off that the size makes to the mean of some images of train, without labels;
"aligned" after what the size does to the features of these images has been undone as far as it is linear.
Each row is added to benchmarks/results/resolution.jsonl; --table prints what stands there.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from heatssl.allocator import keep_freed_memory
from heatssl.backbones import (
    PositionSettings,
    create_backbone,
    geometry,
    pooled_features,
    set_normaliser,
    set_positions,
)
from heatssl.config import DataConfig
from heatssl.config_file import load_config
from heatssl.data import ImageData, augment, balanced_subset, normalise, open_split, train_loader
from heatssl.evaluation import Alignment, extract_features, knn_accuracy, linear_probe
from heatssl.evaluation.results import commit, hardware
from heatssl.export import load_backbone

RESULTS = Path(__file__).parent / "results" / "resolution.jsonl"
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
QUARTERS = ("heat_jepa", "qb_heat", "finola")  # objectives that encode quarters alone; others see all of an image
SIDE = 8  # patches of an image in training with labels
READ = ("", ", centred", ", aligned")  # how features of another size are read
GAU = {"embed_dim": 128, "depth": 8, "key_width": 32, "dynamic_img_size": True}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"gau_{normaliser}": ("gau_tiny_patch16_224", {**GAU, "normaliser": normaliser})
        for normaliser in ("softmax", "softmax_plus", "relu2", "relu2_fixed")
    },
    "gau_table": ("gau_tiny_patch16_224", {**GAU, "pos_embed": "learn"}),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 128, "depth": 4, "num_heads": 4}),
}


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders of heatssl pretrain")
    parser.add_argument("--labels", nargs="+", choices=BACKBONES, default=[], help="train these with labels first")
    parser.add_argument("--root", help="with --labels: imagenette96.tar or its like; without, the scenes")
    parser.add_argument("--core-seconds", type=float, default=600.0, help="with --labels: of training")
    parser.add_argument("--image-size", type=int, default=64, help="with --labels: in training")
    parser.add_argument("--seed", type=int, default=0, help="with --labels")
    parser.add_argument("--crop-scale", nargs=2, type=float, default=[0.2, 1.0], help="with --labels: of the area")
    parser.add_argument("--final", action="store_true", help="measure on val, for a figure that will be reported")
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--ways", nargs="+", help="of positions; all without")
    parser.add_argument("--window", type=float, help="of rerope and leaky_rerope, in patches; without: as above")
    parser.add_argument("--images", type=int, default=1000, help="at most, the same at every size")
    parser.add_argument("--unlabelled", type=int, default=500, help="images of train that tell what a size does to all")
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if not arguments.table:
        for run in arguments.runs:
            config = load_config(run / "config.yaml")
            backbone, info = load_backbone(str(run))
            described = {
                "model": described_model(info.name, info.arguments),
                "trained": config.objective["name"],
                "blur": config.objective.get("blur", 0.0),
                "seed": config.seed,
                "steps": config.trainer.steps,
            }
            if not (arguments.final or config.data.held_out):
                raise SystemExit(f"{run} has seen all of train: pretrain with data.held_out=0.1, or --final for val")
            data = dataclasses.replace(config.data, held_out=0.0) if arguments.final else config.data
            grid = geometry(backbone, data.image_size)
            encoded = grid.quarter()[0] if config.objective["name"] in QUARTERS else grid.rows
            keep(measure(backbone, None, data, described, reach=encoded - 1, arguments=arguments))
        for name in arguments.labels:
            data = DataConfig("tar", arguments.root, arguments.image_size, arguments.crop_scale, workers=0)
            data = data if arguments.root else dataclasses.replace(data, name="shapes", train_size=8000)
            data = data if arguments.final else dataclasses.replace(data, held_out=0.1)
            backbone, head = train_with_labels(name, data, arguments)
            described = {
                "model": described_model(*BACKBONES[name]),
                "trained": "labels",
                "seed": arguments.seed,
                "core_seconds": arguments.core_seconds,
            }
            keep(measure(backbone, head, data, described, reach=SIDE - 1, arguments=arguments))
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


def described_model(name: str, arguments: dict[str, Any]) -> str:
    """Kind and normaliser, and what gated units are that those of earlier rows were not.

    Rows without "linear values" are of SiLU values in post-norm, those without "few mixed" of units that mix all.
    """
    kind = name.partition("_")[0]
    if kind != "gau":
        return kind
    traits = {
        "linear values": arguments.get("value_activation", "none") == "none",
        "few mixed": arguments.get("mixed_share") is None,
        "table": arguments.get("pos_embed", "none") == "learn",
    }
    kind = f"gau {arguments.get('normaliser', 'softmax_plus')}"
    return ", ".join([kind, *(trait for trait, has in traits.items() if has)])


def keep(rows: Iterator[dict[str, Any]]) -> None:
    """Add rows to the file as they come."""
    for row in rows:
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def measure(
    backbone: nn.Module,
    head: nn.Module | None,
    data: DataConfig,
    described: dict[str, Any],
    reach: float,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """One row for each way to meet larger images and each size."""
    train_x, train_y = extract_features(backbone, open_split(data, "train"), data)
    centre, spread = train_x.mean(dim=0), train_x.std(dim=0) + 1e-6
    here = extract_features(backbone, unlabelled(data, arguments.unlabelled), data)[0]
    reach = reach if arguments.window is None else arguments.window
    described |= {
        **({"data": data.name} if data.name == "shapes" else {}),
        "image_size": data.image_size,
        "window": reach,
        "unlabelled": arguments.unlabelled,
        "crop_scale": list(data.crop_scale),
        "split": "val" if arguments.final else "held-out",
    }
    probe = None
    for way, scale in itertools.product(arguments.ways or ways(backbone), arguments.scales):
        switch(backbone, way, scale, reach)
        # Opened anew at each size: the generated scenes are drawn at it, not enlarged.
        there = dataclasses.replace(data, image_size=round(data.image_size * scale))
        val = open_split(dataclasses.replace(there, val_size=arguments.images), "val")
        batch_size = round(min(256, max(1, 256 / scale**4)))  # as many pairs at every size
        val_x, val_y = extract_features(backbone, val, there, batch_size=batch_size)
        same = extract_features(backbone, unlabelled(there, arguments.unlabelled), there, batch_size=batch_size)[0]
        centred = val_x - same.mean(dim=0) + here.mean(dim=0)
        read = dict(zip(READ, (val_x, centred, Alignment(same, here)(val_x)), strict=True))
        row = described | {"way": way, "scale": scale, "images": len(val_y)}
        if head is None:
            if probe is None:
                probe = linear_probe(train_x, train_y, val_x, val_y).probe
            for mark, features in read.items():
                row["linear" + mark] = (probe.logits(features).argmax(dim=1) == val_y).float().mean().item()
                bank, asked = ((x - centre) / spread for x in (train_x, features))
                row["knn" + mark] = knn_accuracy(bank, train_y, asked, val_y)
        else:
            with torch.no_grad():
                for mark, features in read.items():
                    row["head" + mark] = (head(features).argmax(dim=1) == val_y).float().mean().item()
        yield row | {"hardware": hardware(torch.device("cpu")), "commit": commit()}


def unlabelled(data: DataConfig, number: int) -> ImageData:
    """The images of train that tell what a size does, the same ones at every size."""
    return balanced_subset(open_split(data, "train"), number)


def ways(backbone: Any) -> list[str]:
    """Positions, and what the normaliser does at another length than that of training."""
    if not hasattr(backbone, "normaliser"):
        return ["interpolated positions"]
    positions = ["rope", "interpolated", "ntk", "ntk_mixed", "rerope", "leaky_rerope"]
    factors = ["", " + log n at test"] if backbone.normaliser.settings.kind == "softmax" else [""]
    return [position + factor for factor in factors for position in positions]


def switch(backbone: Any, way: str, scale: float, reach: float) -> None:
    """Set a trained model up for images that are ``scale`` times as large as in training."""
    if way == "interpolated positions":
        return
    kind: Any
    kind, _, factor = way.partition(" + ")
    growth = None if kind == "interpolated" else max(1.0, scale)  # it follows the grid by itself
    set_positions(backbone, PositionSettings(kind, scale=growth, window=reach))
    settings = dataclasses.replace(backbone.normaliser.settings, log_n_at_test=bool(factor))
    set_normaliser(backbone, settings)


def train_with_labels(name: str, data: DataConfig, arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Cross-entropy on the mean token, AdamW, for so many seconds of this process; backbone and head."""
    torch.manual_seed(arguments.seed)
    model, settings = BACKBONES[name]
    backbone = create_backbone(model, data.image_size, patch_size=data.image_size // SIDE, **settings)
    train = open_split(data, "train")
    head = nn.Linear(backbone.num_features, len(train.classes))  # type: ignore[arg-type]
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95))
    started = time.process_time()
    for batch in train_loader(train, data, batch_size=64, seed=arguments.seed):
        spent = (time.process_time() - started) / arguments.core_seconds
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 50 * spent, 0.01 + 1.03 * (1 - spent))  # up in 2 %, then straight down
        images = normalise(augment(batch.images, data), data)
        loss = F.cross_entropy(head(pooled_features(backbone, images)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return backbone.eval(), head


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each model and way, the sizes across; mean over seeds, of each the row that came last."""
    measures = [name + mark for name in ("linear", "knn", "head") for mark in READ]
    groups: dict[tuple[str, ...], dict[float, dict[int, float]]] = {}
    for row in rows:
        for measured in measures:
            if measured in row:
                crops = "{:g} to {:g}".format(*row.get("crop_scale", (0.2, 1.0)))
                blurred = f"{row.get('blur', 0.0):g}"
                length = str(row.get("steps", f"{row['core_seconds']:g} s" if "core_seconds" in row else ""))
                about = (
                    row.get("data", "imagenette"),
                    row["trained"],
                    length,
                    measured,
                    row.get("split", "val"),
                    row["model"],
                )
                shown = (str(row.get(name, usual)) for name, usual in (("image_size", 64), ("unlabelled", 500)))
                window = f", window {row['window']:g}" if "rerope" in row["way"] and "window" in row else ""
                key = (*about, *shown, crops, blurred, row["way"] + window)
                group = groups.setdefault(key, {})
                group.setdefault(row["scale"], {})[row["seed"]] = 100 * row[measured]
    scales = sorted({row["scale"] for row in rows})
    heading = (
        "| data | trained with | steps | measured | split | model | 1x is | unlabelled | crops | blur | positions | "
    )
    lines = [heading + " | ".join(f"{s:g}x" for s in scales) + " | seeds |"]
    lines.append("|---" * (12 + len(scales)) + "|")
    for key, group in sorted(groups.items()):
        cells = [f"{statistics.mean(group[s].values()):.1f}" if s in group else "" for s in scales]
        lines.append("| " + " | ".join([*key, *cells, str(max(map(len, group.values())))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
