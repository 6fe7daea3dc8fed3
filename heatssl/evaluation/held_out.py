"""The part of train that selects a setting, so that test is looked at once."""

import torch
from torch import Tensor

from heatssl.errors import UserError


def stratified_split(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows held out: the share of each class, at least one where the class has two.

    Args:
        y: integer labels (N,).
        share: held out, between 0 and 1.
        seed: of the choice.

    Returns:
        row indices to fit (n,) and held out (N - n,), class by class.

    Raises:
        UserError: when no class has two images.
    """
    generator = torch.Generator().manual_seed(seed)
    fit, held = [], []
    for label in y.unique():
        rows = (y == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held.append(rows[:count])
        fit.append(rows[count:])
    if sum(len(rows) for rows in held) == 0:
        raise UserError("every class has a single training image, none can be held out: give at least two per class")
    return torch.cat(fit), torch.cat(held)
