"""pictures.npz: what the objective sees and what it makes of it, for a few images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatssl.config import DataConfig
from heatssl.data import ImageData, Subset, denormalise, eval_loader, normalise
from heatssl.errors import UserError
from heatssl.files import write_atomically
from heatssl.objectives import Objective
from heatssl.training.spread import spread_over_classes

PIXEL_MAPS = ("visible", "reconstruction", "from_rest", "first_view", "second_view")  # maps that are images


@torch.no_grad()
def write_pictures(path: Path, objective: Objective, data: ImageData, config: DataConfig, count: int = 8) -> None:
    """Write what the objective sees and makes of ``count`` images, spread over classes.

    Arrays: ``image`` (N, S, S, 3) uint8 and ``label`` (N,) class names; of those that the objective has:
    ``visible``, ``reconstruction``, ``from_rest``, ``first_view``, ``second_view`` (N, s, s, 3) uint8;
    ``law_residual`` (N, h, w) float32; ``story``, the objective's :class:`heatssl.objectives.Story` as JSON. Masks and
    views are the same whenever they are drawn.

    Raises:
        UserError: when none of the images can be read.
    """
    chosen = Subset(data, spread_over_classes(data.labels, seed=0)[:count])
    batch = next(iter(eval_loader(chosen, config, batch_size=len(chosen))))
    if not len(batch.images):
        raise UserError(f"no pictures can be made, none of {len(chosen)} val images can be read: check val of the data")
    device = next(objective.parameters()).device
    was_training = objective.training
    objective.eval()
    images = normalise(batch.images.to(device), config)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        maps = objective.maps(images)
    objective.train(was_training)

    def pixels(normalised: Tensor) -> np.ndarray:
        return (denormalise(normalised, config) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    arrays: dict[str, Any] = {"image": pixels(images)} | {
        name: pixels(maps[name]) for name in PIXEL_MAPS if name in maps
    }
    if "law_residual" in maps:
        arrays["law_residual"] = maps["law_residual"].float().cpu().numpy()
    arrays["story"] = np.array(json.dumps(objective.story._asdict()))
    arrays["label"] = np.array([data.classes[label] for label in batch.labels.tolist()])
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
