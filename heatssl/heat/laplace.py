"""Laplace's equation z_xx + z_yy = 0: what a field at rest obeys when heat spreads alike in all directions.

The steady state of the heat equation dz/dt = z_xx + z_yy, read as a prior on feature maps
(QB-Heat, arXiv 2211.13228; its isotropic case).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from heatssl.errors import check_choice
from heatssl.heat.law import Law
from heatssl.ops import Boundary, check_boundary, depthwise_stencil, residual_loss

Stencil = Literal["5pt", "9pt"]

# Weights for a unit spacing. Both are exact to second order, but the leading error of the 9-point stencil is
# (h^2 / 12) times the Laplacian of the Laplacian: it vanishes on harmonic fields and prefers no direction.
_STENCILS: dict[str, list[list[float]]] = {
    "5pt": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    "9pt": [[1 / 6, 4 / 6, 1 / 6], [4 / 6, -20 / 6, 4 / 6], [1 / 6, 4 / 6, 1 / 6]],
}


def laplacian_stencil(stencil: Stencil, spacing: float = 1.0) -> Tensor:
    """Weights (3, 3), float64, of the discrete Laplacian.

    Args:
        stencil: ``5pt`` or the isotropic ``9pt``.
        spacing: distance h between neighbouring positions, in the unit in which derivatives are wanted.

    Raises:
        ValueError: on an unknown stencil, or a spacing that is not positive.
    """
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, not {spacing}")
    check_choice("stencil", stencil, get_args(Stencil))
    return torch.tensor(_STENCILS[stencil], dtype=torch.float64) / spacing**2


def laplacian(z: Tensor, stencil: Stencil = "5pt", boundary: Boundary = "interior", spacing: float = 1.0) -> Tensor:
    """Discrete Laplacian z_xx + z_yy of each channel.

    Args:
        z: field (B, C, H, W).
        stencil: ``5pt`` or the isotropic ``9pt``.
        boundary: see :func:`heatssl.ops.depthwise_stencil`.
        spacing: distance h between neighbouring positions, in the unit in which derivatives are wanted.

    Returns:
        (B, C, H-2, W-2) for ``interior``, else (B, C, H, W).

    Raises:
        ValueError: on an unknown stencil or boundary, or a spacing that is not positive.
    """
    return depthwise_stencil(z, laplacian_stencil(stencil, spacing), boundary)


class Laplace(Law):
    """The law z_xx + z_yy = 0.

    Args:
        stencil: ``5pt`` or ``9pt``.
        boundary: ``interior``, ``replicate`` or ``reflect``.
        spacing: distance between neighbouring positions (1.0: derivatives per patch).

    Raises:
        ValueError: on an unknown stencil or boundary, or a spacing that is not positive.
    """

    def __init__(self, stencil: Stencil = "5pt", boundary: Boundary = "interior", spacing: float = 1.0) -> None:
        super().__init__()
        laplacian_stencil(stencil, spacing)
        check_boundary(boundary)
        self.stencil: Stencil = stencil
        self.boundary: Boundary = boundary
        self.spacing = spacing

    def residual(self, z: Tensor) -> Tensor:
        """Squared Laplacian, mean over channels: z (B, C, H, W) -> (B, H, W), interior (B, H-2, W-2)."""
        return laplacian(z, self.stencil, self.boundary, self.spacing).square().mean(dim=1)

    def loss(self, z: Tensor) -> Tensor:
        """``residual(z).mean()``, a scalar in float32 or wider, by the fused :func:`heatssl.ops.residual_loss`.

        Cheap enough to regularise any layer's field. For large fields on a CPU its first call compiles C++.
        """
        # Tokens less their class token are a view with gaps, which only a copy makes fit for the fused loss.
        if z.ndim == 4:
            z = z.contiguous(memory_format=torch.channels_last if z.stride(1) == 1 else torch.contiguous_format)
        return residual_loss(z, laplacian_stencil(self.stencil, self.spacing), self.boundary)

    def extra_repr(self) -> str:
        return f"stencil={self.stencil}, boundary={self.boundary}, spacing={self.spacing}"
