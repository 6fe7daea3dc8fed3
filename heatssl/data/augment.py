"""Changes drawn for each image of a batch, on its device, and the way to and from the network's range."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from heatssl.colours import colour_changes
from heatssl.config import DataConfig


def augment(images: Tensor, config: DataConfig) -> Tensor:
    """Flip, colour jitter and grey as configured, each image on its own.

    Random numbers come from torch's global generator alone: ``torch.manual_seed`` repeats a batch.

    Args:
        images: uint8 (B, 3, S, S), or float in [0, 1].
        config: ``flip``: mirror half of the images left to right. ``colour_jitter`` s > 0: change
            brightness, contrast and saturation by up to s and hue by up to s / 4, in 80 % of the images.
            ``grey``: probability of turning grey. See :func:`heatssl.colours.colour_changes`.

    Returns:
        float32 (B, 3, S, S) in [0, 1].
    """
    pixels = _to_unit_range(images)
    if len(pixels) == 0:
        return pixels
    if config.flip:
        mirrored = torch.rand(len(pixels)).lt(0.5).to(pixels.device)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    if config.colour_jitter > 0 or config.grey > 0:
        with torch.autocast(pixels.device.type, enabled=False), torch.no_grad():  # kornia is not safe in half
            pixels = _colour_changes(config.colour_jitter, config.grey)(pixels)
    return pixels


def normalise(images: Tensor, config: DataConfig) -> Tensor:
    """Centre and scale the channels for the network: (x - mean) / std.

    Args:
        images: uint8 (B, 3, S, S), or float in [0, 1].
        config: ``mean`` and ``std`` per channel.

    Returns:
        float32 (B, 3, S, S).
    """
    mean, std = _channels(config.mean, images), _channels(config.std, images)
    return (_to_unit_range(images) - mean) / std


def denormalise(images: Tensor, config: DataConfig) -> Tensor:
    """The inverse of ``normalise``: float32 (B, 3, S, S) clamped to [0, 1], to be looked at."""
    return (images.float() * _channels(config.std, images) + _channels(config.mean, images)).clamp(0, 1)


def _to_unit_range(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _channels(values: list[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=images.device).view(3, 1, 1)


@lru_cache(maxsize=4)
def _colour_changes(strength: float, grey: float) -> nn.Module:
    return nn.Sequential(*colour_changes(strength, grey))
