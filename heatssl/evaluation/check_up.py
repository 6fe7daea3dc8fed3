"""``heatssl health``: figures of frozen features that need no label, beside those of random weights."""

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor, nn

from heatssl.backbones import feature_map, pooled_features
from heatssl.config import DataConfig, HealthConfig
from heatssl.data import BadFiles, eval_loader, normalise, open_split
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.features import evaluation_mode
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
    views, images = _views(data, config)
    figures = {
        weights: _figures(backbone, source, views, images)
        for weights, backbone in backbones_of(source, config.random_init, config.seed)
    }
    compared = ""
    if other is not None:
        backbone, info = other
        same = _images(shown_to(info, data), config)
        features = (_features(each, shown, source) for each, shown in ((source.backbone, images), (backbone, same)))
        figures[source.weights]["cka"] = linear_cka(*features).item()
        compared = f"; CKA to {config.other} at {info.image_size} px"
    split = "the held-out share of train" if source.split == "held-out" else "val"
    about = f"{len(images)} images of {split}, {config.views} views of each, at {source.data.image_size} px"
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


def _views(data: DataConfig, config: HealthConfig) -> tuple[Tensor, Tensor]:
    """Random views (N, Q, 3, S, S) and the images themselves (N, 3, S, S), normalised."""
    settings = view_settings(data.image_size, (0.3, 1.0), 0.4, 0.2, 0.0)
    torch.manual_seed(config.seed)
    images = _images(data, config)
    views = [
        torch.stack([random_view(shown, settings, data.mean, data.std) for _ in range(config.views)], 1)
        for shown in images.split(config.batch_size)
    ]
    return torch.cat(views), images


def _images(data: DataConfig, config: HealthConfig) -> Tensor:
    """The readable images of val (N, 3, S, S), normalised.

    Raises:
        UserError: when too many cannot be read, or fewer than two can.
    """
    bad, images = BadFiles(data.bad_fraction), []
    loader = eval_loader(open_split(data, "val"), data, batch_size=config.batch_size)
    for batch in progress_bar(loader, name="images", unit="batch"):
        bad.update(batch)
        images.append(normalise(batch.images, data))
    bad.check()
    found = torch.cat(images)
    if len(found) < 2:
        raise UserError(f"{len(found)} image can be read, and figures compare two at least: give a data set of more")
    return found


def _figures(backbone: nn.Module, source: Source, views: Tensor, images: Tensor) -> dict[str, float]:
    features = _features(backbone, views.flatten(0, 1), source).unflatten(0, views.shape[:2])
    own = _features(backbone, images, source)
    with evaluation_mode(backbone), torch.no_grad():
        maps = feature_map(backbone.to(source.device), images[:LARGEST].to(source.device)).float()
    looks_at = receptive_field(backbone, images[:LARGEST].to(source.device))
    found = {
        "rankme": rankme(own).item(),
        "lidar": lidar(features).item(),
        "alignment": alignment(features[:, 0], features[:, 1]).item(),
        "uniformity": uniformity(own).item(),
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
    parts = progress_bar(images.split(256), name="features")
    with evaluation_mode(backbone):
        return torch.cat([pooled_features(backbone, part.to(source.device)).float().cpu() for part in parts])


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
