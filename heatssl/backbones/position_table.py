"""A table of absolute positions, one learned vector for each patch of the grid of training."""

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_module
from torch import Tensor, nn


class PositionTable(nn.Module):
    """The table, resampled for another grid than its own.

    Args:
        grid: rows and columns of patches at training.
        width: d.
    """

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.weight = nn.Parameter(torch.empty(1, self.rows * self.columns, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Of the patches of a grid, in row-major order: (1, n, d)."""
        if grid[0] == self.rows and grid[1] == self.columns:
            return self.weight
        return self.resampled(grid)

    @torch.jit.unused
    def resampled(self, grid: tuple[int, int]) -> Tensor:
        """As timm resamples the tables of its ViTs, bicubic and antialiased."""
        table: Tensor = resample_abs_pos_embed(self.weight, list(grid), [self.rows, self.columns], num_prefix_tokens=0)
        return table


register_notrace_module(PositionTable)  # branches on the size of the image
