"""Scores against masks equal their definitions; a wrong one ranks methods wrongly and nobody sees it."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from heatssl.attribution.scores import (
    average_precision,
    best_iou,
    energy_inside,
    otsu_iou,
    otsu_threshold,
    pointing_game,
)
from heatssl.errors import UserError

EVERY = (average_precision, best_iou, energy_inside, otsu_iou, pointing_game)


def _case(ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Maps with values on and off the object, masks, and pixels that count."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(6, 12, 10, generator=generator) < 0.3
    maps = torch.rand(6, 12, 10, generator=generator) + 0.5 * inside
    counted = torch.rand(6, 12, 10, generator=generator) < 0.8
    return (maps * 5).round() / 5 if ties else maps, inside, counted


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties: bool) -> None:
    maps, inside, counted = _case(ties)
    found = average_precision(maps, inside, counted)
    expected = [
        average_precision_score(inside[i][counted[i]].numpy(), maps[i][counted[i]].numpy()) for i in range(len(maps))
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_ious_are_those_of_the_best_and_of_otsus_threshold_by_search(ties: bool) -> None:
    maps, inside, counted = _case(ties)
    best, otsu, thresholds = (
        best_iou(maps, inside, counted),
        otsu_iou(maps, inside, counted),
        otsu_threshold(maps, counted),
    )
    for i in range(len(maps)):
        values, truth = maps[i][counted[i]].numpy().astype(np.float64), inside[i][counted[i]].numpy()
        ious, between = {}, {}
        for threshold in np.unique(values):
            above = values >= threshold
            ious[threshold] = (truth & above).sum() / (truth | above).sum()
            if above.all():
                continue
            share = above.mean()
            between[threshold] = share * (1 - share) * (values[above].mean() - values[~above].mean()) ** 2
        chosen = max(between, key=between.__getitem__)
        assert best[i].item() == pytest.approx(max(ious.values()), rel=1e-5)
        assert thresholds[i].item() == pytest.approx(chosen)
        assert otsu[i].item() == pytest.approx(ious[chosen], rel=1e-5)


def test_pointing_game_hits_where_the_maximum_lies_on_the_object() -> None:
    maps, inside = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool)
    inside[0, 4, 4] = True
    maps[0, 4, 7] = 1.0  # three pixels beside
    assert [pointing_game(maps, inside, tolerance=pixels).item() for pixels in (0, 2, 3)] == [0, 0, 1]
    maps[0, 4, 4] = 1.0  # a second maximum, on the object: half of them hit
    assert pointing_game(maps, inside).item() == 0.5
    diagonal = torch.zeros(1, 9, 9)
    diagonal[0, 7, 7] = 1.0  # 4.2 away: within a square of 3, not within a disc of 4
    assert [pointing_game(diagonal, inside, tolerance=pixels).item() for pixels in (4, 5)] == [0, 1]


def test_energy_is_the_share_of_the_sum() -> None:
    maps, inside = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[True, False], [False, True]]])
    assert energy_inside(maps, inside).item() == pytest.approx(0.5)
    counted = torch.tensor([[[True, True], [False, True]]])
    assert energy_inside(maps, inside, counted).item() == pytest.approx(5 / 7)


@pytest.mark.parametrize("score", EVERY)
def test_what_does_not_count_changes_nothing(score) -> None:
    """The border of a trimap is neither object nor background."""
    maps, inside, counted = _case(ties=True)
    other = torch.where(counted, maps, 9.0)
    torch.testing.assert_close(score(other, inside ^ ~counted, counted), score(maps, inside, counted))


@pytest.mark.parametrize("score", EVERY)
def test_an_empty_map_counts_as_a_flat_one(score) -> None:
    """A method must not win by saying nothing: it gets what a map without information gets."""
    _, inside, counted = _case(ties=False)
    share = (inside & counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2))
    for flat in (torch.zeros(6, 12, 10), torch.full((6, 12, 10), 0.7)):
        torch.testing.assert_close(score(flat, inside, counted), share)


@pytest.mark.parametrize("score", EVERY)
def test_the_mask_itself_is_a_perfect_map_and_no_object_gives_no_number(score) -> None:
    _, inside, _ = _case(ties=False)
    inside[2] = False
    found = score(inside.to(torch.bfloat16), inside)
    assert found.dtype == torch.float32
    assert math.isnan(found[2])
    assert found[[0, 1, 3, 4, 5]].tolist() == [1] * 5


def test_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="one size"):
        best_iou(torch.rand(2, 4, 4), torch.ones(2, 8, 8, dtype=torch.bool))
