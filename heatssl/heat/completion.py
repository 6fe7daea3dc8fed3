"""Filling a field in from scattered positions: what is visible is held, heat flows from it to what is not.

The heat prior for visible patches anywhere, of which QB-Heat's quarter block (arXiv 2211.13228) is one case. Ours.
Two readings, both linear in the visible values. Their weights are positive and sum to one, so that a completed
value never leaves the range of those it comes from, but where it is said:

* the Dirichlet problem: the steady state, z_xx + s z_yy = 0 at hidden positions, visible ones held,
  no flux through the edges of the grid; with complex s, z_xx + S z_yy = 0 in the eigenbasis of S, whose weights
  still sum to one but are positive no more;
* the heat kernel: what flows from each visible position in a time t, exp(-|p - q|^2 / 4t), normalised over them.
"""

import torch
from torch import Tensor


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
    these probabilities.

    Args:
        visible: row-major indices (B, n) long, distinct.
        queried: row-major indices (B, m) long; a visible one keeps its own value.
        grid: rows and columns.
        anisotropy: s (K,), positive. Solved in float64 where the device has it: from 1e-6 to 1e6 the weights are good
            to about 1e-6. MPS has float32 alone, in which they go wrong by 1e-3 at 1e4. Or complex, anything but
            negative (there the equation is a wave's, and has no such state): eigenvalues of the S of z_xx + S z_yy = 0,
            the law of :class:`heatssl.heat.CorrelatedLaplace`, for channels that are coordinates in its eigenbasis.

    Returns:
        (B, K, m, n) of the anisotropy's type, each row sums to one; not negative where the anisotropy is real.
    """
    rows, columns = grid
    along_x = torch.kron(torch.eye(rows), path_laplacian(columns))
    along_y = torch.kron(path_laplacian(rows), torch.eye(columns))
    precise = torch.promote_types(anisotropy.dtype, torch.float64)
    wide = anisotropy if anisotropy.device.type == "mps" else anisotropy.to(precise)
    operator = along_x.to(wide) + wide[:, None, None] * along_y.to(wide)  # K N N
    held = torch.zeros(len(visible), rows * columns, dtype=torch.bool, device=visible.device).scatter(1, visible, True)
    identity = torch.eye(rows * columns, dtype=wide.dtype, device=wide.device)
    system = torch.where(held[:, None, :, None], identity, operator)  # a held position keeps its value
    sources = identity[visible].transpose(1, 2)[:, None]  # B 1 N n
    everywhere = torch.linalg.solve(system, sources.expand(-1, len(wide), -1, -1))
    weights = torch.take_along_dim(everywhere, queried[:, None, :, None], dim=2)
    if not anisotropy.is_complex():
        weights = weights.clamp_min(0)  # what rounding has left below zero
    return weights.to(anisotropy.dtype)


def path_laplacian(length: int) -> Tensor:
    """Minus the second difference along a line with no flux through its ends: (length, length), rows sum to zero."""
    steps = torch.diff(torch.eye(length), dim=0)
    return steps.T @ steps
