"""Sorted maps and their ties: a coarse map has many equal pixels, and their order must not matter."""

import torch
from torch import Tensor


def ends_of_ties(ordered: Tensor) -> Tensor:
    """The place of the last of its equals, for each place of sorted rows: (B, N) -> (B, N) long."""
    places = torch.arange(ordered.shape[1], device=ordered.device)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    # From the right, each place takes the nearest end.
    return torch.where(last, places, ordered.shape[1]).flip(1).cummin(dim=1).values.flip(1)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps, equals sharing their mean rank: (B, H, W) twice -> (B,) in [-1, 1].

    A flat map agrees with none: 0.
    """
    a, b = _ranks(first), _ranks(second)
    spread = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    return torch.where(spread > 0, (a * b).sum(dim=1) / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)


def _ranks(maps: Tensor) -> Tensor:
    """Mean ranks, centred, in shares of the number of pixels: (B, H, W) -> (B, N) float32."""
    ordered, order = maps.float().flatten(1).sort(dim=1)
    count = ordered.shape[1]
    ends = ends_of_ties(ordered)
    starts = count - 1 - ends_of_ties(ordered.flip(1)).flip(1)
    middle = ((starts + ends).float() - (count - 1)) / (2 * count)
    return torch.empty_like(ordered).scatter_(1, order, middle)
