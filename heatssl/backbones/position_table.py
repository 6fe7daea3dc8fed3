"""A table of absolute positions, one learned vector for each patch of the grid of training."""

import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_module
from torch import Tensor, nn

from heatssl.backbones.timm_records import grid_of_checkpoint


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

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Places are not decayed."""
        return {"weight"}

    def resampled(self, grid: tuple[int, int]) -> Tensor:
        """As timm resamples the tables of its ViTs, bicubic and antialiased."""
        table: Tensor = resample_abs_pos_embed(self.weight, list(grid), [self.rows, self.columns], num_prefix_tokens=0)
        return table


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights as a model of another size takes them, where timm loads them (``pretrained=True``).

    A table of another grid is resampled as in the forward pass. Where the checkpoint does not say of which, one of
    another number of patches had as many rows as columns.
    """
    table = state_dict.get("position_table.weight")
    wanted = model.position_table
    if table is None or wanted is None:
        return state_dict
    grid = grid_of_checkpoint(model, state_dict.get("patch_embed.proj.weight"), table.shape[1])
    if grid is None:
        side = math.isqrt(table.shape[1])
        if table.shape[1] == wanted.weight.shape[1] or side * side != table.shape[1]:
            return state_dict  # it could be any grid: loading names both shapes
        grid = (side, side)
    if grid == (wanted.rows, wanted.columns):
        return state_dict
    resampled = resample_abs_pos_embed(table, [wanted.rows, wanted.columns], list(grid), num_prefix_tokens=0)
    return state_dict | {"position_table.weight": resampled}


register_notrace_module(PositionTable)  # branches on the size of the image
