"""A 3x3 stencil slid over every channel of a field, as one grouped convolution."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.errors import check_choice
from heatssl.ops.precision import full_precision

Boundary = Literal["interior", "replicate", "reflect"]
Weights = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]


def depthwise_stencil(z: Tensor, stencil: Tensor, boundary: Boundary = "interior") -> Tensor:
    """Apply one 3x3 stencil to each channel of a field.

    All channels go through a single convolution with C groups, so z is read once and no shifted copy of
    it is made. Autocast is left out: a field's own type decides, since its neighbours' differences cancel. Half
    precision is computed in float32, in which the weights still sum to what they should, and rounded once.

    Args:
        z: field (B, C, H, W), floating point.
        stencil: weights (3, 3) as they lie on the grid: row 0 weighs the neighbours above.
        boundary: ``interior`` leaves out the outermost positions; ``replicate`` repeats them outwards
            (no flux through an edge that lies half a patch outside); ``reflect`` mirrors the field at them
            (no flux through the outermost positions themselves).

    Returns:
        (B, C, H-2, W-2) for ``interior``, else (B, C, H, W).

    Raises:
        ValueError: on an unknown boundary, or a field too small to have a neighbourhood.
    """
    check_field(z, boundary)
    channels = z.shape[1]
    if boundary != "interior":
        z = F.pad(z, (1, 1, 1, 1), mode=boundary)
    with full_precision(z):
        wide = z.to(accumulator(z.dtype))
        return F.conv2d(wide, stencil.to(wide).expand(channels, 1, 3, 3), groups=channels).to(z.dtype)


def check_boundary(boundary: Boundary) -> None:
    """Refuse a boundary that there is not; raises as :func:`depthwise_stencil` does."""
    check_choice("boundary", boundary, get_args(Boundary))


def check_field(z: Tensor, boundary: Boundary) -> None:
    """Refuse what no 3x3 stencil can be applied to; raises as :func:`depthwise_stencil` does."""
    check_boundary(boundary)
    height, width = z.shape[2:]
    smallest = {"interior": 3, "replicate": 1, "reflect": 2}[boundary]
    if min(height, width) < smallest:
        raise ValueError(
            f"boundary {boundary!r} needs a field of at least {smallest}x{smallest} positions, not {height}x{width}"
        )


def check_stencil(stencil: Tensor) -> None:
    """Refuse what is no stencil of a fused loss.

    Raises:
        ValueError: on another shape than (3, 3), or when it asks for gradients: the fused loss has none for it.
    """
    if stencil.shape != (3, 3):
        raise ValueError(f"a stencil has weights (3, 3), not {tuple(stencil.shape)}")
    if stencil.requires_grad:
        raise ValueError("the fused loss does not train its stencil: use depthwise_stencil(z, stencil) instead")


def weights_of(stencil: Tensor) -> Weights:
    """A stencil (3, 3) as numbers, for kernels that take them one by one."""
    above, middle, below = ((row[0], row[1], row[2]) for row in stencil.tolist())
    return above, middle, below


def responses(z: Tensor, boundary: Boundary) -> int:
    """Number of responses of a stencil on z (B, C, H, W): channels times positions times fields."""
    rim = 2 if boundary == "interior" else 0
    return z.shape[0] * z.shape[1] * (z.shape[2] - rim) * (z.shape[3] - rim)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over a field of this type are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
