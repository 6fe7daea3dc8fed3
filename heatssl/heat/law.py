"""What laws have in common: a residual; and, for laws of first order, moves of a field by an offset."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.ops import accumulator, by_corner, full_precision


class Law(nn.Module):
    """A partial differential equation as a prior on a field z (B, C, H, W)."""

    def residual(self, z: Tensor) -> Tensor:
        """How far z is from obeying at each position: (B, C, H, W) -> (B, H, W), never negative, mean over channels."""
        raise NotImplementedError

    def loss(self, z: Tensor) -> Tensor:
        """Mean of :meth:`residual` over fields and positions, a scalar; of errors that it repeats, each once.

        A law may have a faster way to it.
        """
        return self.residual(z).mean()

    def forward(self, z: Tensor) -> Tensor:
        """Same as :meth:`residual`."""
        return self.residual(z)


class Propagator(Law):
    """A law that also says what stands at an offset from a position: the field can be moved.

    Moves happen between :meth:`enter` and :meth:`leave`, in coordinates in which they are cheapest. Many moves of one
    field share one change of basis, and that basis one computation::

        basis = law.basis()
        zeta = law.enter(z, basis)
        moved = law.leave(torch.cat([law.move(zeta, dx=7), law.move(zeta, dy=7)]), basis)

    Args:
        channels: C of the fields that this law is about.

    Raises:
        ValueError: when that is not positive.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"a law needs a positive number of channels, not {channels}")
        self.channels = channels

    def basis(self) -> Tensor | None:
        """The orthogonal basis (C, C) in which moves are cheapest; None: the field's own."""
        return None

    def enter(self, z: Tensor, basis: Tensor | None = None) -> Tensor:
        """Coordinates in which :meth:`move` is cheapest, (B, C, H, W) -> same.

        Args:
            z: field (B, C, H, W).
            basis: what :meth:`basis` returned; None computes it anew.

        Raises:
            ValueError: on the wrong number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ValueError(f"this law expects a field (B, {self.channels}, H, W), not {tuple(z.shape)}")
        basis = self.basis() if basis is None else basis
        return z if basis is None else apply_matrix(basis.T, z)

    def move(self, zeta: Tensor, dx: float = 0, dy: float = 0) -> Tensor:
        """:meth:`propagate` in the coordinates of :meth:`enter`: zeta (B, C, H, W) -> same."""
        raise NotImplementedError

    def leave(self, zeta: Tensor, basis: Tensor | None = None) -> Tensor:
        """Inverse of :meth:`enter`."""
        basis = self.basis() if basis is None else basis
        return zeta if basis is None else apply_matrix(basis, zeta)

    def propagate(self, z: Tensor, dx: float = 0, dy: float = 0) -> Tensor:
        """The field moved by (dx, dy) patches: what the law says stands dx to the right of and dy below each position.

        Args:
            z: field (B, C, H, W).
            dx: offset to the right in patches, any sign; fractions only where the law says so.
            dy: offset downwards, likewise.

        Returns:
            (B, C, H, W); position p holds the value extrapolated to p + (dx, dy).

        Raises:
            ValueError: on the wrong number of channels, or an offset that this law cannot move by.
        """
        basis = self.basis()
        return self.leave(self.move(self.enter(z, basis), dx, dy), basis)

    def fill_quarters(self, quarter: Tensor, corner: Tensor) -> Tensor:
        """The whole map around one visible quarter: each other quarter is the visible one, moved by half a map.

        Args:
            quarter: field (B, C, H/2, W/2).
            corner: (B,) in ascending order, where it lies: 0 top left, 1 top right, 2 bottom left, 3 bottom right.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: on the wrong number of channels, or corners that are not in ascending order.
        """
        basis = self.basis()
        return self.leave(self.move_to_quarters(self.enter(quarter, basis), corner), basis)

    def move_to_quarters(self, zeta: Tensor, corner: Tensor) -> Tensor:
        """:meth:`fill_quarters` in the coordinates of :meth:`enter`; here one move for each block and corner."""
        height, width = zeta.shape[2:]

        def around(block: Tensor, row: int, column: int) -> Tensor:
            moved = [[self.move(block, (j - column) * width, (i - row) * height) for j in (0, 1)] for i in (0, 1)]
            return torch.cat([torch.cat(line, dim=3) for line in moved], dim=2)

        return torch.cat([around(*group) for group in by_corner(zeta, corner)])

    def residual(self, z: Tensor) -> Tensor:
        """Squared error of predicting each position's right and lower neighbour by one step, mean over channels.

        The last column and row have no such neighbour: there the step that enters stands for the one that would leave.

        Args:
            z: field (B, C, H, W).

        Returns:
            (B, H, W), zero everywhere exactly when z obeys the discrete law.

        Raises:
            ValueError: on the wrong number of channels.
        """
        residual = z.new_zeros(z.shape[0], *z.shape[2:])
        for axis, errors in self._step_errors(z):
            residual = residual + F.pad(errors, (0, 1) if axis == 3 else (0, 0, 0, 1), mode="replicate")
        return residual

    def loss(self, z: Tensor) -> Tensor:
        """Mean squared error of the steps to the right, and that of the steps down, added: (B, C, H, W) -> scalar."""
        return torch.stack([z.new_zeros(()), *(errors.mean() for _, errors in self._step_errors(z))]).sum()

    def _step_errors(self, z: Tensor) -> list[tuple[int, Tensor]]:
        """Squared errors of one step, mean over channels: (3, (B, H, W - 1)) along x, (2, (B, H - 1, W)) along y.

        An axis of one position has no steps.
        """
        errors = []
        with full_precision(z):
            zeta = self.enter(z)  # an orthogonal change of basis keeps norms: the errors are the same in it
            for axis, step in ((3, {"dx": 1}), (2, {"dy": 1})):
                steps = zeta.shape[axis] - 1
                if steps:
                    moved = self.move(zeta.narrow(axis, 0, steps), **step)
                    errors.append((axis, (zeta.narrow(axis, 1, steps) - moved).square().mean(dim=1)))
        return errors

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def relative_residual(law: Law, field: Tensor) -> Tensor:
    """Mean residual of a field (B, C, h, w) over its variance, each channel about its mean over images and positions.

    Returns:
        scalar, the same for every multiple of a field under a linear law.
    """
    field = field.to(accumulator(field.dtype))  # squares overflow in float16
    spread = field - field.mean(dim=(0, 2, 3), keepdim=True)
    return law.loss(field) / spread.square().mean().clamp_min(1e-12)


def apply_matrix(matrix: Tensor, z: Tensor) -> Tensor:
    """Mix channels at each position: (D, C) x (B, C, H, W) -> (B, D, H, W)."""
    return F.conv2d(z, matrix.to(z.dtype)[:, :, None, None])


def commutator(a: Tensor, b: Tensor) -> Tensor:
    """||AB - BA|| / (||A|| ||B||) in Frobenius norms: 0 when moves are independent of their path, at most sqrt(2).

    Args:
        a: matrix (C, C).
        b: matrix (C, C). With a zero matrix the ratio is 0.
    """
    with full_precision(a):
        scale = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
        return torch.linalg.matrix_norm(a @ b - b @ a) / scale.clamp_min(torch.finfo(a.dtype).tiny)


def spectral_radius(step: Tensor) -> Tensor:
    """Largest |eigenvalue| of a step matrix I + A (C, C): above 1, some field grows at each step."""
    return torch.linalg.eigvals(step.to(accumulator(step.dtype))).abs().max()  # half precision has no solver
