"""Frozen features or feature maps of a whole split."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from heatssl.backbones import feature_map, pooled_features
from heatssl.config import DataConfig
from heatssl.data import BadFiles, ImageData, eval_loader, normalise
from heatssl.errors import UserError

MOST_BYTES = 4 * 2**30  # of memory for the maps of one split


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
    features: list[Tensor] = []

    def keep(images: Tensor) -> None:
        features.append(pooled_features(backbone, images).float().cpu())

    labels = _each_batch(keep, backbone, data, config, batch_size, device, progress)
    # Out of inference mode: callers may train on what they get.
    return torch.cat(features).clone(), labels


def extract_maps(
    backbone: nn.Module,
    data: ImageData,
    config: DataConfig,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Final feature maps of every readable image; arguments are those of :func:`extract_features`.

    Returns:
        maps (N, C, h, w) float16 and labels (N,) long, both on the CPU.

    Raises:
        UserError: when too many files cannot be read, or none can, or the maps would take more than ``MOST_BYTES``.
    """
    maps, filled = torch.empty(0), 0

    def keep(images: Tensor) -> None:
        nonlocal maps, filled
        found = feature_map(backbone, images)
        if not filled:
            maps = _room(len(data), found.shape[1:])
        maps[filled : filled + len(found)] = found
        filled += len(found)

    labels = _each_batch(keep, backbone, data, config, batch_size, device, progress)
    return maps[:filled], labels


def extract_all_maps(backbone: nn.Module, data: ImageData, config: DataConfig, **settings: Any) -> Tensor:
    """Maps (N, C, h, w) float16 as of :func:`extract_maps`, of images none of which may be missing.

    Raises:
        UserError: see there, and when an image cannot be read: what belongs to it would be another's.
    """
    maps, _ = extract_maps(backbone, data, config, **settings)
    if len(maps) != len(data):
        raise UserError(
            f"{len(data) - len(maps)} images cannot be read: repair them, or take them and what belongs to them out"
        )
    return maps


def _each_batch(
    keep: Callable[[Tensor], None],
    backbone: nn.Module,
    data: ImageData,
    config: DataConfig,
    batch_size: int,
    device: torch.device | str,
    progress: bool,
) -> Tensor:
    """Hand every batch of readable, normalised images (B, 3, H, W) to ``keep``; the labels (N,) of them all."""
    backbone.to(device)
    bad = BadFiles(config.bad_fraction)
    # None: tqdm stays silent where nobody watches, in a file or a pipe.
    hidden = None if progress else True
    labels = []
    loader = eval_loader(data, config, batch_size=batch_size)
    with evaluation_mode(backbone), torch.inference_mode():
        for batch in tqdm(loader, desc="features", unit="batch", delay=2, leave=False, disable=hidden):
            bad.update(batch)
            if len(batch.images):
                keep(normalise(batch.images.to(device, non_blocking=True), config))
                labels.append(batch.labels)
    bad.check()
    if not labels:
        raise UserError(f"none of the {len(data)} images can be read: check data.root={config.root}")
    return torch.cat(labels)


def _room(count: int, shape: torch.Size) -> Tensor:
    """Memory for all maps at once: joining a list of them in the end would take it twice."""
    needed = 2 * count * shape.numel()
    if needed > MOST_BYTES:
        raise UserError(
            f"the feature maps of {count} images, {' x '.join(map(str, shape))} each, would take "
            f"{needed / 1e9:.1f} GB of memory, more than {MOST_BYTES / 1e9:.1f}: "
            "use fewer images (data.train_size, data.val_size) or head=linear"
        )
    with torch.inference_mode(False):  # callers may train on what they get
        return torch.empty(count, *shape, dtype=torch.float16)


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
