"""Segmentation scores are those of their definition, and frozen maps that hold the classes give them away."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from heatssl.cli import main
from heatssl.config import SegmentConfig
from heatssl.errors import UserError
from heatssl.evaluation import knn_segmentation, linear_segmentation, run_segment, segment
from heatssl.evaluation.segmentation import IGNORED, class_shares, scores


def blobs(count: int, classes: int = 3, noise: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (N, 8, 4, 4) whose positions hold a vector of their class, masks (N, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    grid = torch.randint(classes, (count, 4, 4), generator=generator)
    maps = vectors[grid].permute(0, 3, 1, 2) + noise * torch.randn(count, 8, 4, 4, generator=generator)
    masks = grid.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    return maps, masks


def test_scores_are_scikit_learns() -> None:
    torch.manual_seed(0)
    maps, masks = torch.randn(20, 4, 6, 6), torch.randint(4, (20, 6, 6)).to(torch.uint8)
    masks[torch.rand(masks.shape) < 0.2] = IGNORED
    found = scores(maps, masks, 4)
    counted = masks != IGNORED
    predicted = maps.argmax(1)
    expected = jaccard_score(masks[counted], predicted[counted], average=None)
    assert found.ious == pytest.approx(expected.tolist())
    assert found.mean_iou == pytest.approx(expected.mean())
    assert found.pixel_accuracy == pytest.approx((masks == predicted)[counted].float().mean().item())


def test_a_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    maps = torch.tensor([1.0, 0.0, -5.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    found = scores(maps, torch.zeros(2, 4, 4, dtype=torch.uint8), 3)
    assert found.ious[0] == 1
    assert all(math.isnan(iou) for iou in found.ious[1:])
    assert found.mean_iou == 1


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_maps_that_hold_the_classes_give_them_away(method: str) -> None:
    train, test = blobs(40), blobs(12, seed=1)
    if method == "linear":
        before = torch.random.get_rng_state()
        found, _ = linear_segmentation(*train, *test, 3, epochs=15)
        assert torch.equal(before, torch.random.get_rng_state()), "the caller's generator stays as it was"
        again, _ = linear_segmentation(*train, *test, 3, epochs=15)
        assert found == again
    else:
        found = knn_segmentation(*train, *test, 3, k=5)
        assert found == knn_segmentation(*train, *test, 3, k=5, chunk=7)
    noise, _ = linear_segmentation(torch.randn(40, 8, 4, 4), train[1], torch.randn(12, 8, 4, 4), test[1], 3, epochs=5)
    assert found.mean_iou > 0.6  # interpolation blurs the borders of cells as small as these
    assert noise.mean_iou < 0.35


def test_the_positions_of_train_are_compared_by_chunks(monkeypatch) -> None:
    """All at once they would be 8 GB for 8,000 scenes, more than there may be."""
    train, test = blobs(20), blobs(6, seed=1)
    whole = knn_segmentation(*train, *test, 3, k=5)
    widest, real = [], torch.Tensor.topk

    def topk(self: torch.Tensor, *arguments, **settings):
        widest.append(self.shape[1])
        return real(self, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    assert knn_segmentation(*train, *test, 3, k=5, bank_chunk=50) == whole
    assert 0 < max(widest) <= 50 + 5


def test_pixels_that_do_not_count_change_nothing() -> None:
    (train_maps, train_masks), (test_maps, test_masks) = blobs(20), blobs(6, seed=1)
    hidden = train_masks.clone()
    hidden[:, :4] = IGNORED
    shares = class_shares(hidden, 3, (4, 4))
    assert not shares[:, :, 0].any()
    assert torch.equal(shares[:, :, 1:].sum(1), torch.ones(20, 3, 4))
    found = knn_segmentation(train_maps, hidden, test_maps, test_masks, 3, k=5)
    rest = train_maps[:, :, 1:], train_masks[:, 4:, :]
    kept = knn_segmentation(*rest, test_maps, test_masks, 3, k=5)
    assert found.ious == pytest.approx(kept.ious)


def test_shares_are_those_of_the_pixels_in_a_cell() -> None:
    masks = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8)
    assert class_shares(masks, 2, (1, 1)).flatten().tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps, masks: (maps[0], masks), "train maps must be"),
        (lambda maps, masks: (maps * math.nan, masks), "contain NaN"),
        (lambda maps, masks: (maps, masks + 7), "hold the class"),
    ],
)
def test_bad_input_is_named(change, message: str) -> None:
    maps, masks = blobs(4)
    with pytest.raises(UserError, match=message):
        linear_segmentation(*change(maps, masks), maps, masks, 3)
    with pytest.raises(UserError, match="k=65 neighbours"):
        knn_segmentation(maps, masks, maps, masks, 3, k=65)


def test_the_command_on_scenes(run, capsys) -> None:
    first, twin = run_segment(SegmentConfig(run=str(run), workers=0, epochs=2))
    assert (first.metric, first.weights, twin.weights) == ("segmentation", "pretrained", "random_init")
    assert "mean intersection over union of classes [0, 1]" in first.protocol
    (knn,) = run_segment(SegmentConfig(run=str(run), workers=0, method="knn", k=3, random_init=False))
    assert 0 < knn.accuracy < 1
    assert "intersection over union in % of class 0:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=tree"], "choose one of linear, knn"),
        (["ignore=[0]"], "segmentation needs two classes"),
        (["method=knn", "temperature=0"], "temperature=0 must be positive"),
    ],
)
def test_the_command_names_what_cannot_work(run, capsys, words: list[str], message: str) -> None:
    assert main(["segment", f"run={run}", "workers=0", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_val_of_which_nothing_counts_is_named(run, capsys, monkeypatch, method: str) -> None:
    real = segment._masks
    monkeypatch.setattr(segment, "_masks", lambda *a: real(*a) if a[2] == "train" else torch.full_like(real(*a), 7))
    monkeypatch.setattr(segment, "extract_all_maps", lambda *_, **__: pytest.fail("extracted first"))
    assert main(["segment", f"run={run}", "workers=0", "ignore=[7]", f"method={method}"]) == 2
    error = capsys.readouterr().err
    assert "all pixels of the masks of val are ignored: shorten ignore" in error
    assert error.count("\n") == 1


def test_a_held_out_part_of_which_nothing_counts_is_named() -> None:
    maps, masks = blobs(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    masks[order[0]] = IGNORED
    with pytest.raises(UserError, match=r"masks of the held-out part of train \(0.1\) are ignored: shorten ignore"):
        linear_segmentation(maps, masks, *blobs(4, seed=1), 3, epochs=1)
    linear_segmentation(maps, masks, *blobs(4, seed=1), 3, epochs=1, held_out=0.2)


def test_a_broken_mask_is_named(run, capsys, monkeypatch) -> None:
    def broken(_self: object, i: int) -> np.ndarray:
        raise OSError("truncated")

    monkeypatch.setattr("heatssl.data.masked.MaskedShapes.mask", broken)
    assert main(["segment", f"run={run}", "workers=0"]) == 2
    assert "the mask of train/00000" in capsys.readouterr().err
