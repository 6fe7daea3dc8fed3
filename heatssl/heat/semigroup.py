"""The heat equation in time: z_t = z_xx + z_yy, solved exactly after any time t.

The Laplacian is diagonal in cosines (no heat flows through the edges: Neumann) or in Fourier modes (periodic), so
that the field after time t is a change of basis, one factor exp(-eigenvalue t) per mode, and the change back: an FFT
where it is periodic, and one matrix product per axis, H + W multiply-adds per position each way, for the cosines.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heatssl.errors import check_choice
from heatssl.heat.law import Law
from heatssl.ops import full_precision

HeatBoundary = Literal["neumann", "periodic"]
Laplacian = Literal["continuous", "5pt"]


def heat_semigroup(
    z: Tensor, t: float | Tensor, boundary: HeatBoundary = "neumann", laplacian: Laplacian = "continuous"
) -> Tensor:
    """Exact solution of z_t = Laplacian z after time t. Differentiable in z and t.

    Args:
        z: field (B, C, H, W); half precision is computed in float32 and rounded once.
        t: time in squared patches, not negative (a tensor's values are not looked at): a number, or a tensor () or
            (C,), per channel, or broadcastable to (B, C, 1, 1). A point of heat spreads to a standard deviation of
            sqrt(2 t) patches.
        boundary: ``neumann``: no flux through edges that lie half a patch outside the outermost positions; modes
            cos(pi k (x + 1/2) / N), an orthonormal DCT-II. ``periodic``: opposite edges meet; Fourier modes.
        laplacian: ``continuous``: eigenvalues (pi k / N)^2, or (2 pi k / N)^2 when periodic, so that the solution is
            exact for the band-limited function through the samples. ``5pt``: 4 sin^2 of half those roots, the exact
            solution for the 5-point Laplacian (its ``replicate`` boundary in :func:`heatssl.heat.laplacian`).

    Returns:
        (B, C, H, W), of the type of z. The mean over positions never changes.

    Raises:
        ValueError: on an unknown boundary or laplacian, a field of another shape or of whole numbers, a number t that
            is negative or infinite, or a tensor t of another shape.
    """
    _check_known(boundary, laplacian)
    if z.ndim != 4 or not z.is_floating_point() or 0 in z.shape[2:]:
        raise ValueError(f"a field is a floating-point tensor (B, C, H, W), not {tuple(z.shape)} of {z.dtype}")
    field = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    time = _broadcast_time(t, field)
    with full_precision(z):
        along_y, along_x = (eigenvalues(size, boundary, laplacian, field) for size in field.shape[2:])
        if boundary == "periodic":
            along_x = along_x[: field.shape[3] // 2 + 1]  # of a real field the other half is redundant
            decay = torch.exp(-(along_y[:, None] + along_x) * time)
            return torch.fft.irfft2(torch.fft.rfft2(field) * decay, s=field.shape[2:]).to(z.dtype)
        cosines_y, cosines_x = (cosines(size, field) for size in field.shape[2:])
        decay = torch.exp(-(along_y[:, None] + along_x) * time)
        modes = cosines_y @ (field @ cosines_x.T)
        return (cosines_y.T @ (modes * decay) @ cosines_x).to(z.dtype)


class HeatFlow(Law):
    """The time-dependent law z_t = Laplacian z between two fields, with learned times per group of channels.

    Parameters: one per group.

    Args:
        channels: C.
        groups: channels of a group share their time; a divisor of C. None: each channel has its own.
        time: at the start, in squared patches, above 0; the same for all groups.
        boundary, laplacian: see :func:`heat_semigroup`.

    Raises:
        ValueError: when the groups do not divide the channels, the time is not positive and finite, or the boundary or
            the Laplacian is unknown.
    """

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        time: float = 1.0,
        boundary: HeatBoundary = "neumann",
        laplacian: Laplacian = "continuous",
    ) -> None:
        super().__init__()
        groups = channels if groups is None else groups
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
        if not 0 < time < math.inf:
            raise ValueError(f"time must be positive and finite, not {time}")
        _check_known(boundary, laplacian)
        self.channels = channels
        self.boundary: HeatBoundary = boundary
        self.laplacian: Laplacian = laplacian
        self.log_time = nn.Parameter(torch.full((groups,), math.log(time)))

    @property
    def time(self) -> Tensor:
        """Time (C,) of each channel, in squared patches, positive."""
        return self.log_time.exp().repeat_interleave(self.channels // len(self.log_time))

    def evolve(self, z: Tensor) -> Tensor:
        """The field after :attr:`time`: (B, C, H, W) -> same.

        Raises:
            ValueError: on the wrong number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ValueError(f"this law expects a field (B, {self.channels}, H, W), not {tuple(z.shape)}")
        return heat_semigroup(z, self.time, self.boundary, self.laplacian)

    def residual(self, z: Tensor, later: Tensor | None = None) -> Tensor:
        """Squared difference between a later field and what the heat flow makes of the earlier one, mean over channels.

        Args:
            z: the earlier field (B, C, H, W).
            later: the later one, likewise; None: z itself, so that only a field at rest has no residual.

        Returns:
            (B, H, W).
        """
        return ((z if later is None else later) - self.evolve(z)).square().mean(dim=1)

    def forward(self, z: Tensor, later: Tensor | None = None) -> Tensor:
        """Same as :meth:`residual`."""
        return self.residual(z, later)

    def extra_repr(self) -> str:
        groups = len(self.log_time)
        return f"channels={self.channels}, groups={groups}, boundary={self.boundary}, laplacian={self.laplacian}"


def _check_known(boundary: str, laplacian: str) -> None:
    check_choice("boundary", boundary, get_args(HeatBoundary))
    check_choice("laplacian", laplacian, get_args(Laplacian))


def _broadcast_time(t: float | Tensor, field: Tensor) -> Tensor:
    """Time as a tensor that broadcasts to (B, C, 1, 1)."""
    if not isinstance(t, Tensor):
        if not 0 <= t < math.inf:
            raise ValueError(f"heat does not flow back in time, nor for ever: t must be 0 or more, not {t}")
        return torch.full((), t, dtype=field.dtype, device=field.device)
    if t.ndim == 1 and len(t) == field.shape[1]:
        t = t[:, None, None]
    elif t.ndim and not (t.ndim == 4 and _spreads(t.shape, (*field.shape[:2], 1, 1))):
        raise ValueError(
            f"t has shape {tuple(t.shape)}: give a number, ({field.shape[1]},) for the channels, "
            "or a shape that broadcasts to (B, C, 1, 1)"
        )
    return t.to(field)


def _spreads(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to another of as many axes."""
    return all(own in (1, whole) for own, whole in zip(shape, wanted, strict=True))


def eigenvalues(size: int, boundary: HeatBoundary, laplacian: Laplacian, like: Tensor) -> Tensor:
    """Of minus the Laplacian on one axis (size,), in the order of the DCT-II or of the FFT."""
    k = torch.arange(size, dtype=torch.float64, device=_fine(like.device))
    root = math.pi * k / size if boundary == "neumann" else 2 * math.pi / size * torch.minimum(k, size - k)
    return (root.square() if laplacian == "continuous" else 4 * torch.sin(root / 2).square()).to(like)


def cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II (size, size), one mode a row."""
    k = torch.arange(size, dtype=torch.float64, device=_fine(like.device))
    modes = math.sqrt(2 / size) * torch.cos(math.pi / size * k[:, None] * (k + 0.5))
    modes[0] = math.sqrt(1 / size)
    return modes.to(like)


def _fine(device: torch.device) -> torch.device | None:
    """Where numbers of float64 can be: Apple's chips have none."""
    return None if device.type == "mps" else device
