"""Several contexts of an image, fused: single view, mean logit, mean probability and NBCE, with 1 to 16 contexts.

python benchmarks/contexts.py runs/a [runs/b ...]   # run folders of heatssl pretrain that held out a tenth of train

A linear probe of the features of train at the size of training is the classifier. An image is read as tiles of that
size at 2 and 4 times it, the whole image beside them or not, as crops of a quarter and of half of its area, and as its
middle at four scales; and several images of one class are one object, as seen from several sides.
Pooling, beta, prior and truncation of NBCE are chosen on the tenth of train that the run has not seen, for each kind of
contexts; val is then met once by what was chosen, and by the usual fusions. Rows go to
benchmarks/results/contexts.jsonl.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from heatssl.backbones import pooled_features
from heatssl.config import DataConfig
from heatssl.config_file import load_config
from heatssl.data import eval_loader, normalise, open_split
from heatssl.evaluation import LinearProbe, extract_features, linear_probe
from heatssl.evaluation.contexts import crops, scales, tiles
from heatssl.evaluation.nbce import mean_logits, mean_probabilities, nbce
from heatssl.evaluation.results import commit, hardware
from heatssl.export import load_backbone

RESULTS = Path(__file__).parent / "results" / "contexts.jsonl"
MOST = 16  # contexts
BETAS = (0.0, 0.25, 1.0, 3.0)
TOP_P = (None, 0.95, 0.8)
SIDES = (1.0, 0.85, 0.7, 0.55)  # of the middle at several scales, as shares of the image's side
SEVERAL = "images of one class"
KINDS = ("single view", "2x, tiles", "4x, tiles", "crops of 1/4", "crops of 1/2", "scales", SEVERAL)


def main() -> None:
    """Measure every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--images", type=int, default=None, help="of val; all without")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of contexts; all without")
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        for run in arguments.runs:
            for row in measure(run, arguments.images, arguments.kinds):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


def measure(run: Path, images: int | None, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one run: kinds of contexts, then how many, then fusions."""
    config = load_config(run / "config.yaml")
    backbone, _ = load_backbone(str(run))
    data = config.data
    if not data.held_out:
        raise SystemExit(
            f"{run} has seen all of train: pretrain with data.held_out=0.1, to have something to choose on"
        )
    train = open_split(data, "train")
    train_x, train_y = extract_features(backbone, train, data)
    whole_val = dataclasses.replace(data, held_out=0.0, val_size=images)
    chosen_on, reported_on = contexts(backbone, data, data, kinds), contexts(backbone, whole_val, whole_val, kinds)
    view, view_y = chosen_on["single view"]
    probe = linear_probe(train_x, train_y, view[:, 0], view_y).probe
    empty = probe.logits(pooled_features(backbone, torch.zeros(1, 3, data.image_size, data.image_size)).detach())[0]
    about = {"run": config.objective["name"], "seed": config.seed}
    about |= {"hardware": hardware(torch.device("cpu")), "commit": commit()}
    for kind, (features, labels) in reported_on.items():
        here, there = logits_of(probe, chosen_on[kind][0]), logits_of(probe, features)
        chosen_y = chosen_on[kind][1]
        numbers = sorted({1, 2, 4, 8, features.shape[1]} & set(range(features.shape[1] + 1)))
        for number in numbers if kind.startswith(("crops", "scales", SEVERAL)) else [features.shape[1]]:
            settings = choose(here[:, :number], chosen_y, empty)
            answers = {
                "mean logit": mean_logits(there[:, :number]),
                "mean probability": mean_probabilities(there[:, :number]),
                "nbce": nbce(there[:, :number], *prior_of(settings, empty), **arguments_of(settings)),
            }
            for fusion, answer in answers.items():
                accuracy = (answer.argmax(dim=1) == labels).float().mean().item()
                row = about | {"images": len(labels), "contexts": kind, "number": number, "fusion": fusion}
                yield row | {"accuracy": accuracy} | ({"settings": settings} if fusion == "nbce" else {})


@torch.inference_mode()
def contexts(
    backbone: nn.Module, config: DataConfig, shown: DataConfig, kinds: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features (N, K, C) of kinds of contexts of val, and labels (N,); the single view is always there."""
    size = config.image_size
    large = dataclasses.replace(shown, image_size=4 * size)
    found: dict[str, list[Tensor]] = {}
    parts = []
    generator = torch.Generator().manual_seed(0)
    for batch in tqdm(eval_loader(open_split(shown, "val"), large, batch_size=32), desc="contexts", disable=None):
        four = normalise(batch.images, shown)
        two, one = (F.interpolate(four, (k * size, k * size), mode="bilinear", antialias=True) for k in (2, 1))
        views = {
            "single view": one[:, None],
            "2x, tiles": tiles(two, size),
            "4x, tiles": tiles(four, size),
            "crops of 1/4": crops(two, MOST, 0.25, size, generator),
            "crops of 1/2": crops(two, MOST, 0.5, size, generator),
            "scales": scales(four, list(SIDES), size),
        }
        for kind, view in views.items():
            if kind in (*kinds, "single view"):
                pooled = pooled_features(backbone, view.flatten(0, 1)).unflatten(0, view.shape[:2])
                found.setdefault(kind, []).append(pooled)
        parts.append(batch.labels)
    labels = torch.cat(parts)
    features = {kind: (torch.cat(parts).clone(), labels) for kind, parts in found.items()}
    single = features["single view"][0]
    for kind in [kind for kind in ("2x, tiles", "4x, tiles") if kind in features]:
        features[f"{kind} and whole"] = torch.cat([features[kind][0], single], dim=1), labels
    if SEVERAL in kinds:
        features[SEVERAL] = groups(single[:, 0], labels, MOST, generator)
    return features


def groups(features: Tensor, labels: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, C) of one class, ``number`` together: (G, number, C) and labels (G,); those left over are not used."""
    rows = []
    for label in labels.unique():
        of_class = (labels == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        rows.append(of_class[: len(of_class) // number * number].view(-1, number))
    chosen = torch.cat(rows)
    return features[chosen], labels[chosen[:, 0]]


def logits_of(probe: LinearProbe, features: Tensor) -> Tensor:
    """(N, K, C) -> (N, K, classes)."""
    return probe.logits(features.flatten(0, 1)).unflatten(0, features.shape[:2])


def choose(logits: Tensor, labels: Tensor, empty: Tensor) -> dict[str, Any]:
    """The settings of NBCE that do best here; of equals the first."""
    grid = itertools.product(("mean", "maximum", "entropy"), ("uniform", "empty image"), BETAS, TOP_P)
    options = [dict(zip(("pooling", "prior", "beta", "top_p"), values, strict=True)) for values in grid]

    def right(settings: dict[str, Any]) -> float:
        answer = nbce(logits, *prior_of(settings, empty), **arguments_of(settings))
        return (answer.argmax(dim=1) == labels).float().mean().item()

    return max(options, key=right)


def prior_of(settings: dict[str, Any], empty: Tensor) -> tuple[Tensor | None]:
    return (empty if settings["prior"] == "empty image" else None,)


def arguments_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "prior"}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: contexts down, fusions across; mean and extremes over runs."""
    fusions = list(dict.fromkeys(row["fusion"] for row in rows))
    lines = ["| contexts | number | " + " | ".join(fusions) + " | runs |", "|---" * (len(fusions) + 3) + "|"]
    for kind, number in dict.fromkeys((row["contexts"], row["number"]) for row in rows):
        cells = []
        for fusion in fusions:
            key = (kind, number, fusion)
            values = [100 * r["accuracy"] for r in rows if (r["contexts"], r["number"], r["fusion"]) == key]
            extremes = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{extremes}")
        lines.append(f"| {kind} | {number} | " + " | ".join([*cells, str(len(values))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
