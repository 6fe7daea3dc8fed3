"""Channels of frozen features without correlation.

Frozen features share a few strong directions, and what tells classes apart is often in the weak ones: cosines do not
see these, and gradient descent reaches them last.
"""

import torch
from torch import Tensor, nn

from heatssl.errors import UserError
from heatssl.evaluation.linear import ROWS, as_rows, moments


class Whitening(nn.Module):
    """((1 - s) R + s I)^(-1/2) (z - mean) / std, R the channels' correlations: (B, C, ...) -> same, float32.

    Args:
        sample: features (N, C) or maps (N, C, h, w), which give mean, std and R.
        shrinkage: s; 1: channels are standardised, and stay correlated.

    Raises:
        UserError: when s is not over 0 and at most 1.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, sample: Tensor, shrinkage: float) -> None:
        check_shrinkage(shrinkage)
        super().__init__()
        mean, std = moments(sample)
        matrix = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        if shrinkage < 1:
            strengths, directions = torch.linalg.eigh(_correlations(sample, mean, std))
            shrunk = (1 - shrinkage) * strengths.clamp_min(0) + shrinkage
            matrix = (directions * shrunk.rsqrt()) @ directions.T
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", (matrix / std).float())

    def forward(self, maps: Tensor) -> Tensor:
        """Features (B, C) or maps (B, C, h, w), of any floating type."""
        mean = self.mean.reshape(-1, *[1] * (maps.ndim - 2))
        return torch.einsum("dc,bc...->bd...", self.matrix, maps.to(mean) - mean)


def check_shrinkage(shrinkage: float) -> None:
    """Refuse what is no share.

    Raises:
        UserError: naming the setting.
    """
    if not 0 < shrinkage <= 1:
        raise UserError(f"shrinkage={shrinkage:g} must be over 0, whitened, and at most 1, standardised")


def preparation(shrinkage: float | None) -> str:
    """Of a protocol: what was done to the features, as an ending."""
    if shrinkage is None:
        return ""
    return f" whitened, correlations shrunk by {shrinkage:g}" if shrinkage < 1 else " standardised"


def _correlations(maps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    positions = maps[0, 0].numel()
    found = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for chunk in maps.split(max(1, ROWS // positions)):
        rows = (as_rows(chunk) - mean) / std
        found += rows.T @ rows / (len(maps) * positions)
    return found
