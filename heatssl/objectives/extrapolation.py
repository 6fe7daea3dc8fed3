"""What a law makes of the features of one quarter, beside the features that are there when all of the image is seen."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heatssl.backbones import encode_visible, feature_map
from heatssl.objectives.targets import from_rows, rows


class Extrapolation(NamedTuple):
    """Fields of images of which a quarter was seen."""

    filled: Tensor  # (B, C, h, w): the quarter's own features, and elsewhere what the law says
    seen: Tensor  # (B, C, h, w): the features of the whole image, in the same coordinates
    visible: Tensor  # (B, h, w) bool: the quarter


def fill_from_corner(
    backbone: nn.Module,
    to_field: nn.Module,
    images: Tensor,
    grid: tuple[int, int],
    fill: Callable[[Tensor, Tensor], Tensor],
) -> Extrapolation:
    """The extrapolation of the top left quarter, for objectives that encode single patches.

    Args:
        backbone: a timm transformer.
        to_field: features (..., D) to the field (..., C).
        images: normalised (B, 3, S, S).
        grid: rows h and columns w of patches.
        fill: values (B, n, C) at row-major patches (B, n) -> the law's at every patch (B, h w, C).
    """
    index = torch.arange(grid[0] * grid[1], device=images.device).view(grid)
    visible = index[: grid[0] // 2, : grid[1] // 2].flatten().expand(len(images), -1)
    values = to_field(encode_visible(backbone, images, visible))
    filled = fill(values, visible).scatter(1, visible[..., None].expand_as(values), values)
    seen = to_field(rows(feature_map(backbone, images)))
    mask = torch.zeros_like(filled[..., 0], dtype=torch.bool).scatter(1, visible, True)
    filled, seen = (from_rows(field, grid) for field in (filled, seen))
    return Extrapolation(filled, seen, mask.unflatten(1, grid))
