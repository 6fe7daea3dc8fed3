"""pictures.npz: what the objective sees and what it makes of it, for a few images."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heatssl.config import DataConfig
from heatssl.data import ImageData, Subset, denormalise, eval_loader, normalise
from heatssl.export import write_atomically
from heatssl.objectives import Objective
from heatssl.training.spread import spread_over_classes


@torch.no_grad()
def write_pictures(path: Path, objective: Objective, data: ImageData, config: DataConfig, count: int = 8) -> None:
    """Write what the objective sees and makes of ``count`` images, spread over classes.

    Arrays: ``image``, ``visible``, ``reconstruction`` (N, S, S, 3) uint8; ``law_residual`` (N, h, w) float32;
    ``label`` (N,) class names.
    """
    chosen = Subset(data, spread_over_classes(data.labels, seed=0)[:count])
    batch = next(iter(eval_loader(chosen, config, batch_size=len(chosen))))
    device = next(objective.parameters()).device
    was_training = objective.training
    objective.eval()
    images = normalise(batch.images.to(device), config)
    maps = objective.maps(images)
    objective.train(was_training)

    def pixels(normalised: Tensor) -> np.ndarray:
        return (denormalise(normalised, config) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    write_atomically(
        path,
        lambda file: np.savez_compressed(
            file,
            image=pixels(images),
            visible=pixels(maps["visible"]),
            reconstruction=pixels(maps["reconstruction"]),
            law_residual=maps["law_residual"].float().cpu().numpy(),
            label=np.array([data.classes[label] for label in batch.labels.tolist()]),
        ),
    )
