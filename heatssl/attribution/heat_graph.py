"""The graph of alike positions of an image, and heat at rest on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.ops import full_precision


@torch.no_grad()
def affinity(field: Tensor, sharpness: float, neighbours: float) -> Tensor:
    """W of :func:`heatssl.attribution.methods.heat_flow.heat_flow`: how alike positions are, more beside each other.

    Fields (B, C, h, w) -> (B, n, n), symmetric, zero on the diagonal.
    """
    features = field.float().flatten(2).mT
    features = F.normalize(features - features.mean(dim=1, keepdim=True), dim=2)
    with full_precision(field):
        weights = (features @ features.mT).clamp_min(0) ** sharpness
    rows, columns = field.shape[2:]
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], dim=1).float().to(field.device)
    distance = torch.cdist(places, places, p=1)
    return weights * (1 + neighbours * (distance == 1)) * (distance > 0)


@torch.no_grad()
def steady_state(source: Tensor, weights: Tensor, conductivity: float, border: float) -> Tensor:
    """Solve (I + lambda (I - D^-1 W + b E)) u = s: source (B, h, w), affinities (B, n, n) -> (B, h, w).

    Solved as (D + lambda (D - W + b D E)) u = D s, which is symmetric and positive definite, by Cholesky. A position
    that is like no other keeps its source.
    """
    degree = weights.sum(dim=2)
    held = degree.clamp_min(1e-6)
    lost = border * sides_at_border(source.shape[1], source.shape[2]).to(source) * degree
    with full_precision(source):
        system = torch.diag_embed(held + conductivity * (degree + lost)) - conductivity * weights
        rested = torch.cholesky_solve((held * source.flatten(1))[..., None], torch.linalg.cholesky(system))
    return rested[..., 0].unflatten(1, tuple(source.shape[1:])).clamp_min(0)


def sides_at_border(rows: int, columns: int) -> Tensor:
    """E: how many sides of each position lie on the border of the grid, (rows * columns,) float32."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    touching = [row == 0, row == rows - 1, column == 0, column == columns - 1]
    return torch.stack(touching).sum(dim=0).flatten().float()
