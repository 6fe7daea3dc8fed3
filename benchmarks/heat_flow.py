"""Heat flow over every other method: average precision of maps against masks, before and after, for several forms.

python benchmarks/heat_flow.py runs/a [runs/b ...] --data pets-trimap.tar      # masks of train alone: val is not met

Maps are of the target ``self``. Average precision is that of a map's values, interpolated to the pixels, as scores for
"object" (1 in the mask; 2 is background, others are left out), mean over images. The forms are the default of
heat_flow, the default with one setting changed, others that were tried, and flow on the grid alone, which is a blur.
Each row also says what nearness to the centre of the picture reaches. Rows go to benchmarks/results/heat_flow.jsonl.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.attribution import attribute, method_names
from heatssl.attribution.heat_graph import affinity, steady_state
from heatssl.attribution.methods.heat_flow import UNIFORM
from heatssl.backbones import feature_map
from heatssl.config import DataConfig
from heatssl.data import eval_loader, normalise, open_masked
from heatssl.data.crop import centre_crop_mask
from heatssl.evaluation.results import commit, hardware
from heatssl.export import load_backbone

RESULTS = Path(__file__).parent / "results" / "heat_flow.jsonl"
OBJECT, BACKGROUND = 1, 2
LEFT_OUT = {"heat_flow", "cam", "hirescam"}  # of `self`, the last two are gradcam without its ReLU, or gradcam itself
FEWER: dict[str, dict[str, Any]] = {  # samples, so that a run takes a quarter of an hour
    "expected_gradients": {"samples": 16},
    "integrated_gradients": {"steps": 12},
    "layer_integrated_gradients": {"steps": 12},
    "occlusion": {"window": 16, "stride": 8},
    "rise": {"samples": 96},
    "smoothgrad": {"samples": 8},
}


def main() -> None:
    """Measure every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", required=True, help="a tar with masks/train/**/*.png beside train/**/*.jpg")
    parser.add_argument("--images", type=int, default=None, help="the first so many; all without")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for run in settings.runs:
        rows = list(measure(run, settings.data, settings.images))
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{Path(run).name}\n{table(rows)}", flush=True)


def measure(run: str, root: str, count: int | None) -> Iterator[dict[str, Any]]:
    """Rows of one run: the base maps, then each form of flow."""
    backbone, info = load_backbone(run)
    data = DataConfig(
        name="tar", root=root, image_size=info.image_size, mean=list(info.mean), std=list(info.std), workers=0
    )
    train = open_masked(data, "train")
    images = torch.cat([normalise(batch.images, data) for batch in eval_loader(train, data, batch_size=64)])[:count]
    masks = torch.stack([centre_crop_mask(train.mask(i), info.image_size) for i in range(len(images))])
    with torch.no_grad():
        field = torch.cat([feature_map(backbone, part) for part in images.split(64)])
    sources = {}
    for method in sorted(set(method_names()) - LEFT_OUT):
        maps = [
            attribute(backbone, part, method, normalize=False, size="map", **FEWER.get(method, {}))
            for part in images.split(64)
        ]
        sources[method] = torch.cat(maps).abs()
    sources[UNIFORM] = torch.ones(len(images), *field.shape[2:])
    about = {"run": f"{info.name}, step {info.step}", "split": "train", "images": len(images), "seed": 0}
    about |= {"hardware": hardware(torch.device("cpu")), "commit": commit()}
    about["nearness_to_centre"] = round(average_precision(-distance_to_centre(field), masks), 4)
    for form, flow in forms(field).items():
        precision = {method: average_precision(flow(source), masks) for method, source in sources.items()}
        yield about | {"form": form, "average_precision": {key: round(value, 4) for key, value in precision.items()}}


def forms(field: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to a source (B, h, w), by name."""

    def rest(weights: Tensor, conductivity: float = 64.0, border: float = 0.1) -> Callable[[Tensor], Tensor]:
        return lambda source: steady_state(source, weights, conductivity, border)

    def restart(weights: Tensor, conductivity: float = 64.0) -> Callable[[Tensor], Tensor]:
        """A random walk with restart: heat is carried along W and piles up where there is much that is alike."""
        walk = weights / weights.sum(dim=2, keepdim=True)
        goes_on = conductivity / (1 + conductivity)
        system = torch.eye(walk.shape[1]) - goes_on * walk.mT
        return lambda source: torch.linalg.solve(system, source.flatten(1)[..., None]).reshape(source.shape)

    def plain(weights: Tensor, conductivity: float = 64.0) -> Callable[[Tensor], Tensor]:
        """The Laplacian D - W, over the mean of D."""
        degree = weights.sum(dim=2)
        share = conductivity / degree.mean(dim=1)[:, None, None]
        system = torch.eye(weights.shape[1]) + share * (torch.diag_embed(degree) - weights)
        return lambda source: torch.linalg.solve(system, source.flatten(1)[..., None]).reshape(source.shape)

    default = affinity(field, 2.0, 8.0)
    places = torch.cartesian_prod(*(torch.arange(side) for side in field.shape[2:])).float()
    grid = (torch.cdist(places, places, p=1) == 1).float().expand(len(field), -1, -1)
    features = F.normalize(field.flatten(2).mT, dim=2)
    raw = torch.exp((features @ features.mT - 1) / 0.05) * (1 - torch.eye(features.shape[1]))
    return {
        "base": lambda source: source,
        "heat_flow": rest(default),
        "border 0": rest(default, border=0.0),
        "border 0.03": rest(default, border=0.03),
        "border 0.3": rest(default, border=0.3),
        "conductivity 16": rest(default, 16.0),
        "conductivity 256": rest(default, 256.0),
        "sharpness 1": rest(affinity(field, 1.0, 8.0)),
        "sharpness 4": rest(affinity(field, 4.0, 8.0)),
        "neighbours 0": rest(affinity(field, 2.0, 0.0)),
        "neighbours 24": rest(affinity(field, 2.0, 24.0)),
        "grid alone, conductivity 1": rest(grid, 1.0),
        "grid alone, conductivity 16": rest(grid, 16.0),
        "mean left in, exp(20 (cosine - 1))": rest(raw),
        "Laplacian not normalised": plain(default),
        "random walk with restart": restart(default),
        "source squared": lambda source: rest(default)(source.square()),
    }


def distance_to_centre(field: Tensor) -> Tensor:
    """What knows nothing of the image: (B, C, h, w) -> squared distance of each position in patches, (B, h, w)."""
    row, column = (torch.arange(side) - (side - 1) / 2 for side in field.shape[2:])
    return (row[:, None].square() + column.square()).expand(len(field), -1, -1)


def average_precision(maps: Tensor, masks: Tensor) -> float:
    """Maps (B, h, w) against masks (B, S, S): mean over the images that show an object, in [0, 1]."""
    values = F.interpolate(maps[:, None], masks.shape[1:], mode="bilinear", align_corners=False)[:, 0].flatten(1)
    order = values.argsort(dim=1, descending=True)
    ranked = masks.flatten(1).gather(1, order)
    found, seen = (ranked == OBJECT).cumsum(dim=1), ((ranked == OBJECT) | (ranked == BACKGROUND)).cumsum(dim=1)
    precision = (found / seen.clamp_min(1) * (ranked == OBJECT)).sum(dim=1)
    shown = found[:, -1] > 0
    return (precision[shown] / found[shown, -1]).mean().item()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: forms across as gains in points, base methods down."""
    base = rows[0]["average_precision"]
    gains = [{name: 100 * (row["average_precision"][name] - base[name]) for name in base} for row in rows]
    lines = [f"| method | {' | '.join(row['form'] for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    lines += [
        f"| {name} | {100 * base[name]:.1f} | {' | '.join(f'{gain[name]:+.1f}' for gain in gains[1:])} |"
        for name in base
    ]
    means = [sum(gain.values()) / len(gain) for gain in gains[1:]]
    lines.append(f"| mean gain | | {' | '.join(f'{mean:+.1f}' for mean in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
