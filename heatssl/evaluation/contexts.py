"""Several contexts of one image, each of the size that a backbone was trained with: tiles, crops, scales."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def tiles(images: Tensor, size: int) -> Tensor:
    """Cover large images: as few tiles a side as can, evenly spaced, overlapping where they do not fit.

    Args:
        images: (B, 3, H, W), no side shorter than ``size``.
        size: pixels of the square tiles.

    Returns:
        (B, K, 3, size, size), row by row.

    Raises:
        ValueError: when an image is smaller than a tile.
    """
    height, width = images.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"images of {height} x {width} pixels are smaller than a tile of {size}: resize them first")
    parts = [
        images[..., top : top + size, left : left + size]
        for top in _starts(height, size)
        for left in _starts(width, size)
    ]
    return torch.stack(parts, dim=1)


def _starts(length: int, size: int) -> list[int]:
    number = math.ceil(length / size)
    return [round(k * (length - size) / max(1, number - 1)) for k in range(number)]


def crops(images: Tensor, number: int, area: float, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Squares at random places of each image.

    Args:
        images: (B, 3, S, S).
        number: K.
        area: share of the image that each covers, in (0, 1].
        size: pixels of each result.
        generator: of the places, on the CPU; None: torch's global one.

    Returns:
        (B, K, 3, size, size).

    Raises:
        ValueError: on an area outside (0, 1].
    """
    if not 0 < area <= 1:
        raise ValueError(f"area must be in (0, 1], not {area}")
    side = math.sqrt(area)
    batch = len(images)
    middle = (1 - side) * (2 * torch.rand(batch * number, 2, generator=generator) - 1)
    affine = torch.zeros(batch * number, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = side, side, middle
    grid = F.affine_grid(affine.to(images), [batch * number, images.shape[1], size, size], align_corners=False)
    repeated = images.repeat_interleave(number, dim=0)
    return F.grid_sample(repeated, grid, align_corners=False, padding_mode="border").unflatten(0, (batch, number))


def scales(images: Tensor, sides: list[float], size: int) -> Tensor:
    """The middle of each image at several scales.

    Args:
        images: (B, 3, S, S).
        sides: of the squares, as shares of the image's side, in (0, 1]; one context each.
        size: pixels of each result.

    Returns:
        (B, K, 3, size, size).
    """
    made = []
    for side in sides:
        edge = max(1, round(side * images.shape[-1]))
        start = (images.shape[-1] - edge) // 2
        part = images[..., start : start + edge, start : start + edge]
        made.append(F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False))
    return torch.stack(made, dim=1)
