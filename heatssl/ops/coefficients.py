"""A 3x3 stencil with a boundary, written as coefficients per position: the linear map L, and L^T L."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.ops.stencil import Boundary

Weights = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
Offset = tuple[int, int]  # rows down, columns to the right
Value = TypeVar("Value")


def weights_of(stencil: Tensor) -> Weights:
    """A stencil (3, 3) as numbers, which compiled code is specialised on.

    Raises:
        ValueError: on another shape, or when it asks for gradients: the fused loss has none for its stencil.
    """
    if stencil.shape != (3, 3):
        raise ValueError(f"a stencil has weights (3, 3), not {tuple(stencil.shape)}")
    if stencil.requires_grad:
        raise ValueError("the fused loss does not train its stencil: use depthwise_stencil(z, stencil) instead")
    above, middle, below = ((row[0], row[1], row[2]) for row in stencil.double().tolist())
    return above, middle, below


def weighted_offsets(weights: Weights) -> dict[Offset, float]:
    """Neighbours that a stencil weighs: {(rows down, columns right): weight}, without zeros."""
    return {(i - 1, j - 1): weights[i][j] for i in range(3) for j in range(3) if weights[i][j]}


def combine(weights: Weights, at: Callable[[Offset], Tensor]) -> Tensor:
    """Sum over neighbours of weight times ``at(offset)``; neighbours of one weight are added first."""
    groups: dict[float, list[Offset]] = {}
    for offset, weight in weighted_offsets(weights).items():
        groups.setdefault(weight, []).append(offset)
    total: Tensor | None = None
    for weight, offsets in groups.items():
        group = at(offsets[0])
        for offset in offsets[1:]:
            group = group + at(offset)
        group = group if weight == 1 else group * weight
        total = group if total is None else total + group
    return torch.zeros_like(at((0, 0))) if total is None else total


def shifted(grid: Tensor, offset: Offset) -> Tensor:
    """A grid (H, W) read at position + offset, zero outside."""
    height, width = grid.shape
    dy, dx = offset
    return F.pad(grid, (2, 2, 2, 2))[2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]


def response_coefficients(weights: Weights, boundary: Boundary, height: int, width: int) -> dict[Offset, Tensor]:
    """L: {offset: (H, W) float64}, the weight at each position of its neighbour there.

    A neighbour outside the image counts for the position that stands in for it, one of the nine around as well.
    For ``interior`` the outermost positions have no response and all their coefficients are zero.
    """
    grids = {(i, j): torch.zeros(height, width, dtype=torch.float64) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    inner = 1 if boundary == "interior" else 0
    for y in range(inner, height - inner):
        for x in range(inner, width - inner):
            for (dy, dx), weight in weighted_offsets(weights).items():
                source = (_inside(y + dy, height, boundary) - y, _inside(x + dx, width, boundary) - x)
                grids[source][y, x] += weight
    return {offset: grid for offset, grid in grids.items() if grid.any()}


def normal_coefficients(response: dict[Offset, Tensor]) -> dict[Offset, Tensor]:
    """L^T L from L, in the same form: at most 25 neighbours, up to two steps away."""
    normal: dict[Offset, Tensor] = {}
    for back, weight in response.items():  # the response at position - back reads this position
        for side, coefficient in response.items():
            offset = (side[0] - back[0], side[1] - back[1])
            term = shifted(weight * coefficient, (-back[0], -back[1]))
            normal[offset] = normal[offset] + term if offset in normal else term
    return {offset: grid for offset, grid in normal.items() if grid.any()}


def _inside(index: int, size: int, boundary: Boundary) -> int:
    if boundary == "reflect":
        return abs(index) if index < size else 2 * size - 2 - index
    return min(max(index, 0), size - 1)
