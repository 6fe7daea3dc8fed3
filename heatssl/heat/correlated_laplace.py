"""The correlated Laplace equation z_xx + S z_yy = 0: a field at rest whose channels conduct heat into each other.

QB-Heat's "linear correlated" Laplacian (arXiv 2211.13228), S a C x C matrix. Every solution of the first-order law
z_x = A z, z_y = B z obeys it with S = -A^2 B^-2. The parametrisations of S and the start at the identity are ours.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.errors import check_choice
from heatssl.heat.law import Law
from heatssl.ops import Boundary, check_boundary, depthwise_stencil, full_precision

Coupling = Literal["full", "grouped", "diagonal"]

_SECOND_X = torch.tensor([[0, 0, 0], [1, -2, 1], [0, 0, 0]], dtype=torch.float64)


class CorrelatedLaplace(Law):
    """The law z_xx + S z_yy = 0, S learned, starting as Laplace's equation (S = I).

    Eigenvalues of S on the positive real axis make the equation elliptic, a field at rest; negative ones make it a
    wave equation along x. Nothing bounds S. Parameters: C^2 / G in G groups, as many multiply-adds per position.

    Args:
        channels: C.
        coupling: ``full`` S; ``grouped``: S is block-diagonal, channels couple within their group only;
            ``diagonal``: each channel has its own ratio of conduction along y and x.
        groups: number of groups, a divisor of C; for ``grouped`` only.
        boundary: ``interior``, ``replicate`` or ``reflect``, see :func:`heatssl.ops.depthwise_stencil`.
        spacing: distance between neighbouring positions (1.0: derivatives per patch).

    Raises:
        ValueError: on an unknown coupling or boundary, groups that do not divide the channels, or a spacing that is
            not positive.
    """

    def __init__(
        self,
        channels: int,
        coupling: Coupling = "full",
        groups: int | None = None,
        boundary: Boundary = "interior",
        spacing: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("coupling", coupling, get_args(Coupling))
        if (coupling == "grouped") != (groups is not None):
            raise ValueError(f"coupling={coupling!r} with groups={groups}: give groups with coupling='grouped' only")
        self.groups = {"full": 1, "diagonal": channels}.get(coupling, groups or 0)
        if channels < 1 or self.groups < 1 or channels % self.groups:
            raise ValueError(f"{channels} channels cannot be divided into {self.groups} groups")
        check_boundary(boundary)
        if spacing <= 0:
            raise ValueError(f"spacing must be positive, not {spacing}")
        self.boundary: Boundary = boundary
        self.spacing = spacing
        size = channels // self.groups
        # (C, C / groups), the blocks of S - I, stacked: weight decay pulls towards Laplace's equation.
        self.deviation = nn.Parameter(torch.zeros(channels, size))

    @property
    def blocks(self) -> Tensor:
        """The diagonal blocks of S, stacked: (C, C / groups)."""
        identity = torch.eye(self.deviation.shape[1], dtype=self.deviation.dtype, device=self.deviation.device)
        return self.deviation + identity.repeat(self.groups, 1)

    @property
    def S(self) -> Tensor:  # noqa: N802 (the paper's symbol)
        """The coupling matrix (C, C)."""
        return torch.block_diag(*self.blocks.chunk(self.groups))

    def operator(self, z: Tensor) -> Tensor:
        """z_xx + S z_yy by central differences: (B, C, H, W) -> (B, C, H-2, W-2) for ``interior``, else (B, C, H, W).

        Raises:
            ValueError: on the wrong number of channels, or a field too small to have a neighbourhood.
        """
        if z.ndim != 4 or z.shape[1] != len(self.deviation):
            raise ValueError(f"this law expects a field (B, {len(self.deviation)}, H, W), not {tuple(z.shape)}")
        z_xx = depthwise_stencil(z, _SECOND_X / self.spacing**2, self.boundary)
        z_yy = depthwise_stencil(z, _SECOND_X.T / self.spacing**2, self.boundary)
        with full_precision(z):
            return z_xx + F.conv2d(z_yy, self.blocks.to(z.dtype)[:, :, None, None], groups=self.groups)

    def residual(self, z: Tensor) -> Tensor:
        """Squared :meth:`operator`, mean over channels: z (B, C, H, W) -> (B, H, W), interior (B, H-2, W-2)."""
        return self.operator(z).square().mean(dim=1)

    def extra_repr(self) -> str:
        channels = len(self.deviation)
        return f"channels={channels}, groups={self.groups}, boundary={self.boundary}, spacing={self.spacing}"
