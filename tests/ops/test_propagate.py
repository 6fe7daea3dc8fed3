"""All quarters at once against the law's own moves, image by image and block by block."""

import pytest
import torch

from heatssl.heat import Copy, FirstOrder, NormLinear, Propagator


def by_moves(law: Propagator, quarter: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    height, width = quarter.shape[2:]
    fields = []
    for z, visible in zip(quarter[:, None], corner.tolist(), strict=True):
        row, column = divmod(visible, 2)
        blocks = [[law.propagate(z, (j - column) * width, (i - row) * height) for j in (0, 1)] for i in (0, 1)]
        fields.append(torch.cat([torch.cat(line, dim=3) for line in blocks], dim=2))
    return torch.cat(fields)


@pytest.mark.parametrize(
    "law",
    [FirstOrder(6), FirstOrder(6, commuting=False), NormLinear(6), Copy(6)],
    ids=["commuting", "full", "norm", "copy"],
)
def test_equals_one_move_per_block_and_its_gradient(law):
    law = law.double()
    quarter = torch.randn(5, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    corner = torch.tensor([0, 0, 1, 3, 3])  # unequal groups, and a corner that no image shows
    filled = law.fill_quarters(quarter, corner)
    expected = by_moves(law, quarter, corner)
    assert torch.allclose(filled, expected)
    inputs = [quarter, *law.parameters()]
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((filled * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs)


def test_the_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match="6"):
        FirstOrder(6).fill_quarters(torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("law", [Copy(4), FirstOrder(4, commuting=False), NormLinear(4)])
def test_corners_that_are_not_in_order_are_refused(law):
    quarters = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="in ascending order"):
        law.fill_quarters(quarters, torch.tensor([3, 0]))
    assert law.fill_quarters(quarters[:0], torch.zeros(0).long()).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("law", [Copy(4), FirstOrder(4), FirstOrder(4, commuting=False), NormLinear(4)])
@pytest.mark.parametrize(("corner", "message"), [([0, 4], "0 to 3"), ([-1, 0], "0 to 3"), ([0], "each of 2 quarters")])
def test_corners_that_there_are_not_are_refused(law, corner, message):
    """The whole map would be extrapolated, the visible quarter with it."""
    with pytest.raises(ValueError, match=message):
        law.fill_quarters(torch.randn(2, 4, 3, 3), torch.tensor(corner))


@pytest.mark.parametrize("commuting", [True, False])
def test_quarters_in_half_precision(commuting):
    """Which has neither inverse nor solver."""
    torch.manual_seed(0)
    law, quarters, corner = FirstOrder(4, commuting=commuting), torch.randn(4, 4, 3, 2), torch.arange(4)
    exact = law.fill_quarters(quarters, corner)
    low = law.bfloat16().fill_quarters(quarters.bfloat16(), corner)
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() / exact.norm() < 0.03
    back = law.propagate(quarters.bfloat16(), dx=-1)
    assert (back.float() - law.float().propagate(quarters, dx=-1)).norm() / exact.norm() < 0.03
