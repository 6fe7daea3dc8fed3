"""Channels of frozen maps without correlation: what is trained on them by gradients then has one scale for all.

Frozen features share a few strong directions, and what tells classes apart is often in the weak ones. What follows
could undo that, as it is linear, but gradient descent reaches the weak directions last.
"""

import torch
from torch import Tensor, nn

from heatssl.evaluation.linear import ROWS, as_rows, moments


class Whitening(nn.Module):
    """((1 - s) R + s I)^(-1/2) (z - mean) / std, R the channels' correlations: maps (B, C, h, w) -> same, float32.

    Args:
        sample: maps (N, C, h, w) whose positions give mean, std and R.
        shrinkage: s, over 0, at most 1; 1: channels are standardised, and stay correlated.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, sample: Tensor, shrinkage: float) -> None:
        super().__init__()
        mean, std = moments(sample)
        matrix = torch.eye(len(mean), dtype=torch.float64)
        if shrinkage < 1:
            strengths, directions = torch.linalg.eigh(_correlations(sample, mean, std))
            shrunk = (1 - shrinkage) * strengths.clamp_min(0) + shrinkage
            matrix = (directions * shrunk.rsqrt()) @ directions.T
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("matrix", (matrix / std).float())

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, C, h, w) of any floating type -> (B, C, h, w)."""
        return torch.einsum("dc,bchw->bdhw", self.matrix, maps.to(self.mean) - self.mean)


def _correlations(maps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    positions = maps[0, 0].numel()
    found = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for chunk in maps.split(max(1, ROWS // positions)):
        rows = (as_rows(chunk) - mean) / std
        found += rows.T @ rows / (len(maps) * positions)
    return found
