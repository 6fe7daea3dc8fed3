"""One count of right answers behind all numbers: exact, and that of others."""

import pytest
import torch
from sklearn.metrics import accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from heatssl.evaluation import accuracy as module
from heatssl.evaluation.accuracy import accuracy, right_answers
from heatssl.evaluation.few_shot import few_shot_probe
from heatssl.evaluation.knn import knn_accuracy
from heatssl.evaluation.linear import LinearProbe, accuracy_and_loss
from heatssl.evaluation.segmentation import IGNORED, scores
from heatssl.evaluation.token_probe import token_probe


def test_it_is_the_share_in_float64_whatever_the_labels_are() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(-3, 40, (2, 3 * 7 * 11), generator=generator).unbind()
    predicted[::3] = labels[::3]
    expected = (predicted == labels).double().mean().item()
    assert accuracy(predicted, labels) == expected == accuracy_score(labels, predicted)
    assert 0.3 < expected < 0.4
    classes = predicted.clamp_min(0), labels.clamp_min(0)
    assert accuracy(*classes) == pytest.approx(multiclass_accuracy(*classes, 40, average="micro").item(), abs=1e-7)
    assert accuracy(labels, labels) == 1.0
    assert accuracy(labels + 1, labels) == 0.0


def test_counts_of_processes_add_up_to_that_of_all() -> None:
    predicted, labels = torch.randint(4, (2, 100), generator=torch.Generator().manual_seed(1)).unbind()
    parts = zip(predicted.split(37), labels.split(37), strict=True)
    assert sum(right_answers(*part) for part in parts) / 100 == accuracy(predicted, labels)


def test_every_protocol_counts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = module.multiclass_stat_scores
    monkeypatch.setattr(
        module, "multiclass_stat_scores", lambda a, b, **settings: counted.append(len(a)) or real(a, b, **settings)
    )
    x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(2)), torch.arange(30) % 3
    maps = x[:, :, None, None]
    zeros = torch.zeros(4)
    for measure in (
        lambda: accuracy_and_loss(LinearProbe(torch.eye(3, 4), torch.zeros(3), zeros, zeros + 1), x, y),
        lambda: knn_accuracy(x, y, x, y, k=3),
        lambda: few_shot_probe(x, y, x, y, shots=2, draws=1),
        lambda: token_probe(maps, y, maps, y, epochs=1, learning_rates=[0.1]),
    ):
        counted.clear()
        measure()
        assert counted[-1] == 30


def test_the_mean_iou_is_torchmetrics_jaccard_index() -> None:
    """The mean over the classes that are there or were predicted; of five, one is neither."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(6, 5, 8, 8, generator=generator)
    maps[:, 4] = -9
    masks = torch.randint(4, (6, 8, 8), generator=generator).to(torch.uint8)
    masks[0, 0] = IGNORED
    expected = multiclass_jaccard_index(maps.argmax(1), masks.long(), 5, ignore_index=IGNORED)
    assert scores(maps, masks, 5).mean_iou == pytest.approx(expected.item(), abs=1e-6)
