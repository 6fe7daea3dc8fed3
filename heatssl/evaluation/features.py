"""Frozen features of a whole split."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from heatssl.backbones import pooled_features
from heatssl.config import DataConfig
from heatssl.data import BadFiles, ImageData, eval_loader, normalise
from heatssl.errors import UserError


def extract_features(
    backbone: nn.Module,
    data: ImageData,
    config: DataConfig,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean-pooled features of every readable image, in order, resized and centre-cropped.

    Args:
        backbone: moved to ``device``; runs in evaluation mode, and its modes are restored.
        data: one split, see :func:`heatssl.data.open_split`.
        config: image size, normalisation, workers and the tolerated share of unreadable files.
        batch_size: images per forward pass; changes nothing but speed and memory.
        device: where the backbone runs.
        progress: show a bar on a terminal once the work has taken two seconds.

    Returns:
        features (N, C) float32 and labels (N,) long, both on the CPU.

    Raises:
        UserError: when too many files cannot be read, or none can.
    """
    backbone.to(device)
    bad = BadFiles(config.bad_fraction)
    # None: tqdm stays silent where nobody watches, in a file or a pipe.
    hidden = None if progress else True
    features, labels = [], []
    loader = eval_loader(data, config, batch_size=batch_size)
    with evaluation_mode(backbone), torch.inference_mode():
        for batch in tqdm(loader, desc="features", unit="batch", delay=2, leave=False, disable=hidden):
            bad.update(batch)
            if len(batch.images):
                images = normalise(batch.images.to(device, non_blocking=True), config)
                features.append(pooled_features(backbone, images).float().cpu())
                labels.append(batch.labels)
    bad.check()
    if not features:
        raise UserError(f"none of the {len(data)} images can be read: check data.root={config.root}")
    # Out of inference mode: callers may train on what they get.
    return torch.cat(features).clone(), torch.cat(labels)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every module then gets back the mode of its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
