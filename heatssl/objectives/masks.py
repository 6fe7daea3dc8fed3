"""Which patches are visible and which are asked for, drawn anew for each image: row-major indices."""

import math

import torch
from torch import Tensor


def random_parts(batch: int, positions: int, visible: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Disjoint random sets of visible patches, each with all the others hidden.

    Args:
        batch: number of images B.
        positions: number of patches N.
        visible: patches n in each set.
        parts: number of sets P for each image; P n <= N.
        device: of the result.

    Returns:
        visible (P B, n) and hidden (P B, N - n), both in random order; set k of image i is row k B + i.
    """
    order = torch.rand(batch, positions, device=device).argsort(dim=1)
    turned = torch.cat([order.roll(-k * visible, dims=1) for k in range(parts)])
    return turned[:, :visible], turned[:, visible:]


def random_blocks(
    batch: int, grid: tuple[int, int], block: tuple[int, int], parts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A visible rectangle at any place of the grid, all other patches hidden.

    Args:
        batch: number of images B.
        grid: rows and columns, N in all.
        block: rows and columns of the rectangle, n in all.
        parts: rectangles P for each image, each with a place of its own.
        device: of the result.

    Returns:
        visible (P B, n) in row-major order and hidden (P B, N - n) in random order.
    """
    rows, columns = grid
    top = torch.randint(rows - block[0] + 1, (parts * batch, 1, 1), device=device)
    left = torch.randint(columns - block[1] + 1, (parts * batch, 1, 1), device=device)
    inside_row = top + torch.arange(block[0], device=device)[:, None]
    visible = (inside_row * columns + left + torch.arange(block[1], device=device)).flatten(1)
    order = torch.rand(parts * batch, rows * columns, device=device).scatter(1, visible, 2.0).argsort(dim=1)
    return visible, order[:, : rows * columns - visible.shape[1]]


def random_cells(
    batch: int, grid: tuple[int, int], side: int, visible: int, parts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Disjoint sets of several visible blocks each: cells of a coarser grid, as SimMIM masks (arXiv 2111.09886).

    Args:
        batch: number of images B.
        grid: rows and columns, multiples of ``side``, N in all.
        side: rows and columns of a block; 1 is :func:`random_parts`.
        visible: blocks in each set, n = visible side^2 patches.
        parts: sets P for each image, at most as many as there are blocks for.
        device: of the result.

    Returns:
        visible (P B, n), block by block, and hidden (P B, N - n) in random order.
    """
    rows, columns = (length // side for length in grid)
    chosen, rest = random_parts(batch, rows * columns, visible, parts, device)
    inside = torch.arange(side, device=device)
    inside = (inside[:, None] * grid[1] + inside).flatten()

    def patches(cells: Tensor) -> Tensor:
        corner = (cells // columns * grid[1] + cells % columns) * side
        return (corner[..., None] + inside).flatten(1)

    hidden = patches(rest)
    order = torch.rand(hidden.shape, device=device).argsort(dim=1)
    return patches(chosen), hidden.gather(1, order)


def random_scales(
    batch: int, grid: tuple[int, int], visible: int, parts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Visible patches that all lie in one rectangle, from the smallest square that holds them on, anywhere on the grid.

    Args:
        batch: number of images B.
        grid: rows and columns, N in all.
        visible: patches n in each set, a random choice of its rectangle's.
        parts: sets P for each image, each with a rectangle of its own.
        device: of the result.

    Returns:
        visible (P B, n) and hidden (P B, N - n), both in random order.
    """
    inside = torch.ones(parts * batch, *grid, dtype=torch.bool, device=device)
    smallest = math.ceil(math.sqrt(visible * grid[0] / grid[1]))
    for axis, least in ((1, smallest), (2, math.ceil(visible / smallest))):
        side = torch.randint(least, grid[axis - 1] + 1, (parts * batch, 1), device=device)
        start = (torch.rand(side.shape, device=device) * (grid[axis - 1] - side + 1)).long()
        index = torch.arange(grid[axis - 1], device=device)
        inside &= ((index >= start) & (index < start + side)).unsqueeze(3 - axis)
    order = (torch.rand(inside.shape, device=device) + ~inside).flatten(1).argsort(dim=1)
    chosen = order[:, :visible]
    rest = torch.rand(order.shape, device=device).scatter(1, chosen, 2.0).argsort(dim=1)
    return chosen, rest[:, : order.shape[1] - visible]
