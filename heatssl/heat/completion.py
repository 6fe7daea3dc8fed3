"""Filling a field in from scattered positions: what is visible is held, heat flows from it to what is not.

The heat prior for visible patches anywhere, of which QB-Heat's quarter block (arXiv 2211.13228) is one case. Ours.
Two readings, both linear in the visible values. Their weights are positive and sum to one, so that a completed
value never leaves the range of those it comes from, but where it is said:

* the Dirichlet problem: the steady state, z_xx + s z_yy = 0 at hidden positions, visible ones held,
  no flux through the edges of the grid; with complex s, z_xx + S z_yy = 0 in the eigenbasis of S, whose weights
  still sum to one but are positive no more;
* the heat kernel: what flows from each visible position in a time t, exp(-|p - q|^2 / 4t), normalised over them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.heat.semigroup import cosines, eigenvalues


def coordinates(index: Tensor, columns: int) -> Tensor:
    """Row-major indices (...,) long -> positions (..., 2) float: x, then y, in patches."""
    return torch.stack([index % columns, index // columns], dim=-1).float()


def complete(values: Tensor, weights: Tensor) -> Tensor:
    """Values at the queried positions from those at the visible ones.

    Args:
        values: (B, n, C); the two halves of the channels are real and imaginary parts, see ``Transport``.
        weights: (B, K, m, n), one set for each of K groups of C / 2K complex channels; complex ones multiply them
            as complex numbers.

    Returns:
        (B, m, C).

    Raises:
        ValueError: when C / 2 channels do not fall into K groups.
    """
    groups, channels = weights.shape[1], values.shape[2]
    if channels % (2 * groups):
        raise ValueError(f"{channels} channels do not fall into two halves of {groups} groups")
    parts = values.unflatten(2, (2, groups, -1)).permute(0, 3, 1, 2, 4).flatten(3)  # B K n (2 C/2K)
    if weights.is_complex():
        pairs = torch.complex(*parts.to(weights.real.dtype).chunk(2, dim=3))
        filled = torch.view_as_real(weights @ pairs).movedim(4, 3).to(parts.dtype)
    else:
        filled = (weights.to(parts.dtype) @ parts).unflatten(3, (2, -1))  # B K m 2 C/2K
    return filled.permute(0, 2, 3, 1, 4).flatten(2)


def heat_kernel_weights(visible: Tensor, queried: Tensor, times: Tensor) -> Tensor:
    """How much of each visible position has reached each queried one, relative to the others.

    Args:
        visible: positions (B, n, 2) in patches.
        queried: positions (B, m, 2).
        times: (K,) positive, in patches squared; a visible neighbour twice as far counts exp(3 / 4t) times less.

    Returns:
        (B, K, m, n), positive, each row sums to one; a short time leaves only the nearest position.
    """
    square_distance = (queried[:, :, None] - visible[:, None]).square().sum(dim=-1)
    return torch.softmax(-square_distance[:, None] / (4 * times[:, None, None]), dim=-1)


def harmonic_weights(visible: Tensor, queried: Tensor, grid: tuple[int, int], anisotropy: Tensor) -> Tensor:
    """How much of each visible position there is in each queried one at rest: the harmonic measure.

    Solves the five-point Dirichlet problem z_xx + s z_yy = 0 on the hidden positions exactly, for each mask.
    A random walk from the queried position, with steps along y s times as likely, ends at a visible one with
    these probabilities. Each mask takes a system of as many unknowns as positions are visible, not hidden: heat
    enters there alone, and what it makes of the grid is known in closed form.

    Args:
        visible: row-major indices (B, n) long, distinct.
        queried: row-major indices (B, m) long; a visible one keeps its own value.
        grid: rows and columns.
        anisotropy: s (K,), positive. Solved in float64 where the device has it: from 1e-6 to 1e6 the weights are good
            to about 1e-6. MPS has float32 alone, in which they go wrong by 5e-3 at 1e4. Or complex, anything but
            negative (there the equation is a wave's, and has no such state): eigenvalues of the S of z_xx + S z_yy = 0,
            the law of :class:`heatssl.heat.CorrelatedLaplace`, for channels that are coordinates in its eigenbasis.

    Returns:
        (B, K, m, n) of the anisotropy's type, each row sums to one; not negative where the anisotropy is real.

    Raises:
        torch.linalg.LinAlgError: when visible positions are not distinct.
    """
    precise = torch.promote_types(anisotropy.dtype, torch.float64)
    wide = anisotropy if anisotropy.device.type == "mps" else anisotropy.to(precise)
    green = greens_function(grid, wide).flatten(1)  # K N*N
    among, reach = (  # B K n n and B K m n: what a unit source at a visible position makes of a position
        green[:, index[:, :, None] * math.prod(grid) + visible[:, None]].movedim(0, 1) for index in (visible, queried)
    )
    # The field is G c + k: sources c at the visible positions alone, which sum to nothing, as no heat leaves the grid.
    bordered = F.pad(among, (0, 1, 0, 1), value=1.0)
    bordered[..., -1, -1] = 0.0
    sources = torch.linalg.inv(bordered)[..., :-1]  # B K n+1 n: c and k of each visible position's unit value
    weights = F.pad(reach, (0, 1), value=1.0) @ sources
    if not anisotropy.is_complex():
        weights = weights.clamp_min(0)  # what rounding has left below zero
    return weights.to(anisotropy.dtype)


def greens_function(grid: tuple[int, int], anisotropy: Tensor) -> Tensor:
    """What a unit of heat, let in at one position for all time, makes of every other: the inverse of -(z_xx + s z_yy).

    No flux through the edges, so that cosines diagonalise it. Of their modes the constant one has no inverse; it counts
    as 1 here, which nothing depends on where sources sum to nothing.

    Args:
        grid: rows and columns, of N positions.
        anisotropy: s (K,), positive, or complex and not negative.

    Returns:
        (K, N, N) of its type, symmetric, positions in row-major order.
    """
    modes_y, modes_x = (cosines(size, anisotropy) for size in grid)
    along_y, along_x = (eigenvalues(size, "neumann", "5pt", anisotropy) for size in grid)
    strength = along_x + anisotropy[:, None, None] * along_y[:, None]  # K rows columns
    strength = strength.masked_fill(strength == 0, 1.0)
    modes = torch.kron(modes_y, modes_x)  # N N, one mode a row
    return modes.T @ (modes / strength.flatten(1)[:, :, None])
