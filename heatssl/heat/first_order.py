"""The first-order law of QB-Heat: z_x = A z, z_y = B z.

Any solution also obeys z_xx + S z_yy = 0 with S = -A^2 B^-2, the steady state of a heat equation whose
channels are coupled (arXiv 2211.13228, eq. of the "linear correlated" Laplacian). With forward differences
of one patch, a step is z(x+1, y) = (I + A) z(x, y), and n steps are a matrix power. A move in the two
directions is independent of the path exactly when A and B commute.
"""

import math

import torch
from torch import Tensor, nn

from heatssl.heat.law import Propagator, apply_matrix
from heatssl.ops import accumulator, fill_quarters_commuting, fill_quarters_full, full_precision, turn


class FirstOrder(Propagator):
    """The law z_x = A z, z_y = B z on fields of C channels.

    Two parametrisations:

    * ``commuting=False``: A and B are free C x C matrices, as QB-Heat states it. Moves are whole patches;
      a move goes along x first, then along y, and a negative one applies the inverse step. Nothing keeps
      AB = BA or the step stable: watch :func:`heatssl.heat.commutator` and :func:`heatssl.heat.spectral_radius`.
    * ``commuting=True`` (ours): the steps share an orthogonal basis Q, in which channels k and k + C/2 form
      one complex number and a step multiplies it by exp(g_k), g = decay + i rotation:
      I + A = Q exp(diag(g_x)) Q^T, I + B = Q exp(diag(g_y)) Q^T. So A and B commute, eigenvalues lie
      within exp(+-max_decay), and a move by any real offset is one elementwise product: O(C) per position.

    Args:
        channels: C; even when commuting.
        commuting: which parametrisation.
        max_decay: bound on |decay| per patch (commuting only). At the default of 0.1 a move over 7 patches
            can at most double a channel, or halve it.
        max_rotation: rotations start evenly spread over +- this angle, in radians per patch (commuting only).

    Raises:
        ValueError: when ``channels`` is odd and ``commuting`` is set, or not positive; when ``max_rotation`` is not in
            [0, pi).
    """

    def __init__(
        self, channels: int, commuting: bool = True, max_decay: float = 0.1, max_rotation: float = math.pi / 8
    ) -> None:
        super().__init__(channels)
        if commuting and channels % 2:
            raise ValueError(f"a commuting first-order law needs an even number of channels, not {channels}")
        if not 0 <= max_rotation < math.pi:
            raise ValueError(f"max_rotation={max_rotation} must be 0 or more and below pi, in radians per patch")
        self.commuting = commuting
        self.max_decay = max_decay
        if commuting:
            # Q = Cayley(K - K^T): orthogonal for every K. Raw values pass through tanh to their bounds.
            self.basis_skew = nn.Parameter(torch.randn(channels, channels) / channels)
            self.raw_decay = nn.Parameter(0.01 * torch.randn(2, channels // 2))
            start = max_rotation * (2 * torch.rand(2, channels // 2) - 1)
            self.raw_rotation = nn.Parameter(torch.atanh(start / math.pi))
        else:
            self.matrix_a = nn.Parameter(0.02 * torch.randn(channels, channels) / math.sqrt(channels))
            self.matrix_b = nn.Parameter(0.02 * torch.randn(channels, channels) / math.sqrt(channels))

    def no_weight_decay(self) -> set[str]:
        """Parameters that nothing should pull to zero, where the law would be a copy."""
        return {"raw_decay", "raw_rotation"} if self.commuting else set()

    @property
    def A(self) -> Tensor:  # noqa: N802 (the paper's symbol)
        """A (C, C) of z(x+1, y) = (I + A) z(x, y)."""
        return self._step_matrix(0) if self.commuting else self.matrix_a

    @property
    def B(self) -> Tensor:  # noqa: N802 (the paper's symbol)
        """B (C, C) of z(x, y+1) = (I + B) z(x, y)."""
        return self._step_matrix(1) if self.commuting else self.matrix_b

    def basis(self) -> Tensor | None:
        """The shared orthogonal basis Q (C, C) of the commuting form: (I - K)^-1 (I + K), K skew (Cayley).

        Full matrices share none: None.
        """
        if not self.commuting:
            return None
        skew = self.basis_skew - self.basis_skew.T
        wide = skew.to(accumulator(skew.dtype))  # half precision has no solver
        identity = torch.eye(self.channels, dtype=wide.dtype, device=skew.device)
        return torch.linalg.solve(identity - wide, identity + wide).to(skew.dtype)

    def generators(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the steps' eigenvalues along x and y, commuting form.

        Returns:
            decay (2, C/2) within +-max_decay and rotation (2, C/2) within +-pi, both per patch; row 0 is x.
        """
        return self.max_decay * torch.tanh(self.raw_decay), math.pi * torch.tanh(self.raw_rotation)

    def move(self, zeta: Tensor, dx: float = 0, dy: float = 0) -> Tensor:
        """:meth:`propagate` in the coordinates of :meth:`enter`: zeta (B, C, H, W) -> same.

        Raises:
            ValueError: on a fractional offset without ``commuting``.
        """
        if dx == 0 and dy == 0:
            return zeta
        if self.commuting:
            return self._rotate(zeta, dx, dy)
        if dx != int(dx) or dy != int(dy):
            raise ValueError(f"full matrices move by whole patches, not by ({dx}, {dy}): use commuting=True")
        wide = accumulator(self.matrix_a.dtype)  # half precision has no inverse
        identity = torch.eye(self.channels, dtype=wide, device=zeta.device)
        with full_precision(zeta):
            move_x = torch.linalg.matrix_power(identity + self.matrix_a.to(wide), int(dx))
            move_y = torch.linalg.matrix_power(identity + self.matrix_b.to(wide), int(dy))
            both = move_y @ move_x
        return apply_matrix(both, zeta)

    def move_to_quarters(self, zeta: Tensor, corner: Tensor) -> Tensor:
        """See :meth:`Propagator.move_to_quarters`: all blocks of all images in one operation."""
        if self.commuting:
            return fill_quarters_commuting(zeta, corner, *self.generators())
        identity = torch.eye(self.channels, dtype=self.matrix_a.dtype, device=zeta.device)
        return fill_quarters_full(zeta, corner, identity + self.matrix_a, identity + self.matrix_b)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, commuting={self.commuting}"

    def _rotate(self, zeta: Tensor, dx: float, dy: float) -> Tensor:
        """Multiply the complex coordinates zeta (B, C, H, W) by exp(dx g_x + dy g_y): halves are real and imaginary."""
        decay, rotation = self.generators()
        modulus = torch.exp(dx * decay[0] + dy * decay[1])
        angle = dx * rotation[0] + dy * rotation[1]
        return turn(zeta, modulus[:, None, None], angle[:, None, None], dim=1)

    def _step_matrix(self, axis: int) -> Tensor:
        """A (axis 0) or B (axis 1) of the commuting form: one step of each basis vector, less the identity."""
        identity = torch.eye(self.channels, dtype=self.raw_decay.dtype, device=self.raw_decay.device)
        columns = identity[:, :, None, None]  # C fields of one position each: row k is basis vector e_k
        with full_precision(columns):
            moved = self.propagate(columns, dx=1 - axis, dy=axis)
        return moved[:, :, 0, 0].T - identity
