"""FINOLA's law: z_x = A norm(z), z_y = B norm(z), linear but for a normalisation over channels at each position.

Stated by the source (arXiv 2410.08498, section 2.2, which restates FINOLA, 2305.16319): the two equations;
norm(z) = (z - mu) / sigma with mean and standard deviation over the channels of one position; A and B full, learned,
shared by all positions and images; a field grows from one vector, at its centre; for several paths the vector is
split, each part grows with the same A and B, and the fields are added. In Masked FINOLA each position of a visible
quarter predicts the three that lie half a map away.

Ours: forward differences of one patch, z(x+1, y) = z + A norm(z); to the left and up the same equations with a step
of minus one, z(x-1, y) = z - A norm(z); the mean of both orders where a move goes along x and y; the small number
under the root; the initial values.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from heatssl.heat.law import Propagator, apply_matrix


def normalise_channels(z: Tensor, epsilon: float = 1e-6) -> Tensor:
    """(z - mu) / sqrt(sigma^2 + epsilon) with mean and variance over a position's channels: (B, C, H, W) -> same."""
    variance, mean = torch.var_mean(z, dim=1, keepdim=True, correction=0)
    return (z - mean) * torch.rsqrt(variance + epsilon)


class NormLinear(Propagator):
    """The law z_x = A norm(z), z_y = B norm(z) on fields of C channels.

    A step adds a vector of bounded length, so fields grow at most linearly, whatever A and B are. Steps back are no
    exact inverses of steps forth, and the two orders of a diagonal move differ, by terms of second order.
    Parameters: 2 C^2; a step costs C^2 multiply-adds per position.

    Args:
        channels: C, at least 2: one channel alone is always normalised to zero.
        scale: standard deviation that one step adds to each channel at the start.

    Raises:
        ValueError: on fewer than two channels.
    """

    def __init__(self, channels: int, scale: float = 0.1) -> None:
        super().__init__(channels)
        if channels < 2:
            raise ValueError("norm + linear needs at least 2 channels: one alone is normalised to zero")
        self.A = nn.Parameter(scale * torch.randn(channels, channels) / math.sqrt(channels))
        self.B = nn.Parameter(scale * torch.randn(channels, channels) / math.sqrt(channels))

    def move(self, zeta: Tensor, dx: float = 0, dy: float = 0) -> Tensor:
        """|dx| + |dy| steps: (B, C, H, W) -> same. A diagonal move is the mean of x first and y first.

        Raises:
            ValueError: on a fractional offset.
        """
        if dx != int(dx) or dy != int(dy):
            raise ValueError(f"norm + linear moves by whole patches, not by ({dx}, {dy})")
        x_first = self._walk(self._walk(zeta, self.A, int(dx)), self.B, int(dy))
        if not dx or not dy:
            return x_first
        y_first = self._walk(self._walk(zeta, self.B, int(dy)), self.A, int(dx))
        return (x_first + y_first) / 2

    def extend(self, z: Tensor, *, left: int = 0, right: int = 0, up: int = 0, down: int = 0) -> Tensor:
        """Let a field grow at its edges, one patch at a time, each position from its nearest neighbour inwards.

        From one position this fills a map around it; from a visible quarter it fills the hidden ones element by
        element (:meth:`propagate` fills them as a block). Corners are the mean of columns first and rows first.

        Args:
            z: field (B, C, H, W).
            left: columns to add before the first.
            right: columns to add after the last.
            up: rows to add above the first.
            down: rows to add below the last.

        Returns:
            (B, C, up + H + down, left + W + right); z itself stands unchanged inside.
        """
        columns = partial(self._grow, matrix=self.A, before=left, after=right, dim=3)
        rows = partial(self._grow, matrix=self.B, before=up, after=down, dim=2)
        return (rows(columns(z)) + columns(rows(z))) / 2

    def expand(self, vectors: Tensor, height: int, width: int) -> Tensor:
        """A field from the vector at its centre, position (height // 2, width // 2).

        Args:
            vectors: (B, C), or (B, M, C) for M paths, each grown with the same A and B, and added.
            height: rows of the field.
            width: its columns.

        Returns:
            (B, C, height, width).
        """
        paths = vectors if vectors.ndim == 3 else vectors[:, None]
        seeds = self.enter(paths.flatten(0, 1)[:, :, None, None])
        row, column = height // 2, width // 2
        fields = self.extend(seeds, left=column, right=width - 1 - column, up=row, down=height - 1 - row)
        return fields.unflatten(0, paths.shape[:2]).sum(dim=1)

    def _walk(self, z: Tensor, matrix: Tensor, steps: int) -> Tensor:
        sign = 1 if steps > 0 else -1
        for _ in range(abs(steps)):
            z = z + sign * apply_matrix(matrix, normalise_channels(z))
        return z

    def _grow(self, z: Tensor, matrix: Tensor, before: int, after: int, dim: int) -> Tensor:
        """Add slices before the first and after the last one along a spatial dimension."""
        slices = [z]
        first, last = z.narrow(dim, 0, 1), z.narrow(dim, z.shape[dim] - 1, 1)
        for _ in range(before):
            first = self._walk(first, matrix, -1)
            slices.insert(0, first)
        for _ in range(after):
            last = self._walk(last, matrix, 1)
            slices.append(last)
        return torch.cat(slices, dim=dim)
