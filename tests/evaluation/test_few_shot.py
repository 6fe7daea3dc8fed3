"""Few labels: the right images, the classifier that is claimed, and a spread that is one of draws."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from heatssl.cli import main
from heatssl.config import ProbeConfig
from heatssl.errors import UserError
from heatssl.evaluation import run_probe
from heatssl.evaluation.few_shot import draw, few_shot_probe


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    centres = torch.randn(4, 16)
    train_y, test_y = torch.arange(200) % 4, torch.arange(400) % 4
    train_x, test_x = (centres[y] + 1.5 * torch.randn(len(y), 16) for y in (train_y, test_y))
    return train_x, train_y, test_x, test_y


def test_draws_are_balanced_and_differ():
    labels = torch.tensor([0] * 30 + [2] * 60)
    generator = torch.Generator().manual_seed(0)
    first, second = (draw(labels, 5, None, generator) for _ in range(2))
    assert labels[first].tolist() == [0] * 5 + [2] * 5
    assert len(set(first.tolist())) == 10
    assert set(first.tolist()) != set(second.tolist())
    assert labels[draw(labels, None, 0.1, generator)].tolist() == [0] * 3 + [2] * 6
    assert len(draw(labels, None, 0.001, generator)) == 2, "at least one image of each class"


def test_accuracies_are_scikit_learns_on_the_same_images(features):
    train_x, train_y, test_x, test_y = features
    found = few_shot_probe(*features, shots=5, draws=3, seed=1)
    generator = torch.Generator().manual_seed(1)
    expected = []
    for _ in range(3):
        rows = draw(train_y, 5, None, generator)
        scaler = StandardScaler().fit(train_x[rows])
        model = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(scaler.transform(train_x[rows]), train_y[rows])
        expected.append(model.score(scaler.transform(test_x), test_y))
    assert found.accuracies == pytest.approx(expected, abs=0.005)
    assert found.accuracy == pytest.approx(np.mean(expected), abs=0.005)
    assert found.deviation == pytest.approx(np.std(found.accuracies, ddof=1))


def test_more_labels_do_better_and_the_seed_decides(features):
    one, ten = (few_shot_probe(*features, shots=shots, seed=0) for shots in (1, 10))
    assert one.accuracy < ten.accuracy
    assert one.accuracies == few_shot_probe(*features, shots=1, seed=0).accuracies
    assert one.accuracies != few_shot_probe(*features, shots=1, seed=1).accuracies
    assert few_shot_probe(*features, share=0.02, draws=1).deviation == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give shots=N"),
        ({"shots": 1, "share": 0.1}, "not both"),
        ({"shots": 0}, "at least 1"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"shots": 51}, "has only 50 images: set shots to at most 50"),
    ],
)
def test_what_cannot_be_drawn_is_named(features, settings, message):
    with pytest.raises(UserError, match=message):
        few_shot_probe(*features, **settings)


def test_the_command_says_what_it_did(run, capsys):
    (result,) = run_probe(ProbeConfig(run=str(run), workers=0, shots=2, draws=3, random_init=False))
    assert result.metric == "2-shot"
    assert result.deviation is not None
    assert "C = 1, on 2 images of each class, mean of 3 draws" in result.protocol
    assert f"± {100 * result.deviation:.1f} %" in capsys.readouterr().out
    assert not (run / "probe.safetensors").exists()
    assert main(["probe", f"run={run}", "workers=0", "shots=2", "head=block"]) == 2
    assert "shots and share are for head=linear" in capsys.readouterr().err
