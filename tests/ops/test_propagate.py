"""All quarters at once against the law's own moves, block by block."""

import pytest
import torch

from heatssl.heat import FirstOrder
from heatssl.ops import fill_quarters_commuting, fill_quarters_full


def by_moves(law: FirstOrder, quarter: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    height, width = quarter.shape[2:]
    fields = []
    for z, visible in zip(quarter[:, None], corner.tolist(), strict=True):
        row, column = divmod(visible, 2)
        blocks = [[law.move(z, (j - column) * width, (i - row) * height) for j in (0, 1)] for i in (0, 1)]
        fields.append(torch.cat([torch.cat(line, dim=3) for line in blocks], dim=2))
    return torch.cat(fields)


@pytest.mark.parametrize("commuting", [True, False])
def test_equals_one_move_per_block_and_its_gradient(commuting):
    law = FirstOrder(6, commuting=commuting).double()
    quarter = torch.randn(5, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    corner = torch.tensor([0, 0, 1, 3, 3])  # unequal groups, and a corner that no image shows
    if commuting:
        filled = fill_quarters_commuting(quarter, corner, *law.generators())
    else:
        identity = torch.eye(6, dtype=torch.float64)
        filled = fill_quarters_full(quarter, corner, identity + law.A, identity + law.B)
    expected = by_moves(law, quarter, corner)
    assert torch.allclose(filled, expected)
    inputs = [quarter, *(p for p in law.parameters() if p is not getattr(law, "basis_skew", None))]
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((filled * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs)
