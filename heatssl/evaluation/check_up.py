"""``heatssl health``: figures of frozen features that need no label, beside those of random weights."""

import dataclasses
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heatssl.backbones import evaluation_mode, feature_map, pooled_features
from heatssl.config import DataConfig, HealthConfig
from heatssl.data import BadFiles, eval_loader, normalise, open_split
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.features import extract_features
from heatssl.evaluation.health import alignment, area_holding, lidar, linear_cka, receptive_field, uniformity
from heatssl.evaluation.measure import backbones_of
from heatssl.evaluation.results import commit, hardware
from heatssl.evaluation.source import Source, open_source, shown_to
from heatssl.export import load_backbone
from heatssl.files import check_folder, write_atomically
from heatssl.heat import Laplace, relative_residual
from heatssl.objectives.objective import channel_std, rankme
from heatssl.objectives.views import random_view, view_settings
from heatssl.progress_bar import progress_bar

FIGURES = {  # by key: what it is called, and which way is better
    "rankme": "RankMe, effective number of dimensions of the mean features",
    "lidar": "LiDAR, effective number of those that tell images apart and not views",
    "alignment": "alignment, squared distance of two views; lower is closer",
    "uniformity": "uniformity, log potential of all pairs; lower is more even",
    "channel_std": "deviation of a channel over images and positions",
    "law_residual": "Laplace residual of the map over its variance; white noise: 20",
    "receptive_area": "share of pixels that hold 95 % of what the middle position looks at",
    "cka": "CKA, similarity to the other weights: 1 is the same but for a rotation",
}
LARGEST = 64  # images of the receptive field


@permission_errors()
def run_health(config: HealthConfig) -> dict[str, dict[str, float]]:
    """Measure, print the table, write ``health.json``.

    Returns:
        The figures by weights: those that were given, and their random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    if config.images < 2 or config.views < 2:
        raise UserError("images must be at least 2, and views too: they are compared with each other")
    source = open_source(config)
    check_folder(source.output)
    other = load_backbone(config.other, seed=config.seed) if config.other else None
    data = dataclasses.replace(source.data, val_size=config.images)
    backbones = dict(backbones_of(source, config.random_init, config.seed))
    seen, first = _look(list(backbones.values()), source, data, config)
    figures = {
        weights: _figures(backbone, source, features, first)
        for (weights, backbone), features in zip(backbones.items(), seen, strict=True)
    }
    compared = ""
    if other is not None:
        backbone, info = other
        same = shown_to(info, data)
        images = open_split(same, "val")
        theirs, _ = extract_features(backbone, images, same, batch_size=config.batch_size, device=source.device)
        figures[source.weights]["cka"] = linear_cka(seen[0].images, theirs).item()
        compared = f"; CKA to {config.other} at {info.image_size} px"
    split = "the held-out share of train" if source.split == "held-out" else "val"
    about = f"{len(seen[0].images)} images of {split}, {config.views} views of each, at {source.data.image_size} px"
    record: dict[str, Any] = dict(figures) | {
        "protocol": f"{about}; seed {config.seed}{compared}",
        "hardware": hardware(source.device),
        "source": source.origin,
        "backbone": source.info.describe(),
        "step": source.info.step,
        "commit": commit(),
    }
    print(_table(figures, about), flush=True)
    path, text = source.output / f"{source.mark}health.json", json.dumps(record, indent=2)
    write_atomically(path, lambda file: file.write(text.encode()))
    return figures


class _Features(NamedTuple):
    """What a backbone makes of the readable images, mean-pooled, on the CPU."""

    images: Tensor  # (N, C)
    views: Tensor  # (N, Q, C)


def _look(
    backbones: list[nn.Module], source: Source, data: DataConfig, config: HealthConfig
) -> tuple[list[_Features], Tensor]:
    """Features of each backbone, of the same random views, and the first normalised images (at most 64, 3, S, S).

    A view is gone when all have seen it: those of 1,000 images would take gigabytes.

    Raises:
        UserError: when too many images cannot be read, or fewer than two can.
    """
    settings = view_settings(data.image_size, (0.3, 1.0), 0.4, 0.2, 0.0)
    bad, images = BadFiles(data.bad_fraction), open_split(data, "val")
    own: list[list[Tensor]] = [[] for _ in backbones]
    views: list[list[Tensor]] = [[] for _ in backbones]
    first, kept = [torch.empty(0, 3, data.image_size, data.image_size)], 0
    passes = len(images) * len(backbones) * (1 + config.views)
    torch.manual_seed(config.seed)
    with progress_bar(total=passes, name="features", unit="image") as bar:

        def features(shown: Tensor) -> list[Tensor]:
            """(B, C) of each backbone."""
            found = []
            for backbone in backbones:
                found.append(_features(backbone, shown, source))
                bar.update(len(shown))
            return found

        for batch in eval_loader(images, data, batch_size=config.batch_size):
            bad.update(batch)
            if not len(batch.images):
                continue
            shown = normalise(batch.images, data)
            first.append(shown[: LARGEST - kept].clone())
            kept += len(first[-1])
            for place, found in enumerate(features(shown)):
                own[place].append(found)
            each = [features(random_view(shown, settings, data.mean, data.std)) for _ in range(config.views)]
            for place, of_one in enumerate(zip(*each, strict=True)):
                views[place].append(torch.stack(of_one, 1))
    bad.check()
    count = sum(map(len, own[0]))
    if count < 2:
        raise UserError(f"{count} image can be read, and figures compare two at least: give a data set of more")
    seen = [_Features(torch.cat(mine), torch.cat(theirs)) for mine, theirs in zip(own, views, strict=True)]
    return seen, torch.cat(first)


def _figures(backbone: nn.Module, source: Source, features: _Features, first: Tensor) -> dict[str, float]:
    shown = first.to(source.device)
    with evaluation_mode(backbone), torch.no_grad():
        maps = feature_map(backbone.to(source.device), shown).float()
    looks_at = receptive_field(backbone, shown, progress=True)
    found = {
        "rankme": rankme(features.images).item(),
        "lidar": lidar(features.views).item(),
        "alignment": alignment(features.views[:, 0], features.views[:, 1]).item(),
        "uniformity": uniformity(features.images).item(),
        "channel_std": channel_std(maps).item(),
        "receptive_area": area_holding(0.95, looks_at),
    }
    if min(maps.shape[2:]) >= 3:
        found["law_residual"] = relative_residual(Laplace(), maps).item()
    return {key: found[key] for key in FIGURES if key in found}


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor, source: Source) -> Tensor:
    """Mean-pooled features (N, C) on the CPU."""
    backbone.to(source.device)
    with evaluation_mode(backbone):
        return pooled_features(backbone, images.to(source.device)).float().cpu()


def _table(figures: dict[str, dict[str, float]], about: str) -> str:
    names = list(figures)
    rows = [[key, *(f"{figures[name][key]:.4g}" if key in figures[name] else "" for name in names)] for key in FIGURES]
    rows = [row for row in rows if any(row[1:])]
    widths = [max(len(row[column]) for row in [["", *names], *rows]) for column in range(len(names) + 1)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(["", *names], widths, strict=True))]
    for row in rows:
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"{cells}  {FIGURES[row[0]]}")
    return "\n".join([about, *lines])
