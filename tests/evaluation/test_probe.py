"""The probe's number is the project's headline: it must equal another solver's and never peek at test."""

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe, linear_probe, load_probe, save_probe
from heatssl.evaluation.gradient_descent import gradient_descent
from heatssl.evaluation.probe import SOLVERS

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _features(
    train: int, test: int, decades: float, separation: float = 0.3, channels: int = 48, seed: int = 0
) -> Split:
    """Ten Gaussian classes whose channels are correlated over ``decades`` of scale, as real features are."""
    generator = torch.Generator().manual_seed(seed)
    centres = separation * torch.randn(10, channels, generator=generator)
    labels = torch.randint(10, (train + test,), generator=generator)
    white = centres[labels] + torch.randn(train + test, channels, generator=generator)
    mixing = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    x = (white * torch.logspace(0, -decades, channels)) @ mixing + 3
    return x[:train], labels[:train], x[train:], labels[train:]


@pytest.mark.parametrize("decades", [0, 1, 2])
def test_solver_equals_scikit_learn_at_the_same_strength(decades: float) -> None:
    train_x, train_y, test_x, test_y = _features(1500, 4000, decades)
    mean, std = train_x.mean(0), train_x.std(0, unbiased=False)
    reference = LogisticRegression(C=1.0, max_iter=5000, tol=1e-6).fit((train_x - mean) / std, train_y)
    expected = reference.score((test_x - mean) / std, test_y)
    found = linear_probe(train_x, train_y, test_x, test_y, grid=[1 / 1500], iterations=300)
    assert 0.4 < expected < 0.9
    assert found.accuracy == pytest.approx(expected, abs=0.003)
    logits = torch.from_numpy(reference.decision_function((test_x - mean) / std)).float()
    ours = found.probe.logits(test_x)
    # Adding one number to all logits changes nothing, so both are compared centred.
    ours, logits = ours - ours.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True)
    assert (ours - logits).norm() < 0.02 * logits.norm()


@pytest.mark.parametrize("decades", [0, 2])
def test_selection_is_no_worse_than_scikit_learns_default(decades: float) -> None:
    train_x, train_y, test_x, test_y = _features(3000, 4000, decades)
    mean, std = train_x.mean(0), train_x.std(0, unbiased=False)
    reference = (
        LogisticRegression(max_iter=1000).fit((train_x - mean) / std, train_y).score((test_x - mean) / std, test_y)
    )
    assert linear_probe(train_x, train_y, test_x, test_y).accuracy > reference - 0.003


def test_selection_finds_the_strong_regularisation_that_noise_needs() -> None:
    few = _features(400, 3000, decades=0, separation=0.3)
    chosen = linear_probe(*few)
    weakest = linear_probe(*few, grid=[1e-6])
    assert chosen.selected >= 1e-2
    assert chosen.accuracy > weakest.accuracy + 0.02


def test_a_grid_of_learning_rates_reaches_logistic_regression_where_channels_are_alike() -> None:
    data = _features(3000, 4000, decades=0)
    descended = linear_probe(*data, solver="sgd")
    assert descended.accuracy == pytest.approx(linear_probe(*data).accuracy, abs=0.015)


def test_selection_finds_the_small_learning_rate_that_noise_needs() -> None:
    few = _features(400, 3000, decades=0, separation=0.3)
    chosen = linear_probe(*few, solver="sgd")
    fastest = linear_probe(*few, solver="sgd", grid=[10.0])
    assert chosen.selected < 1
    assert chosen.accuracy > fastest.accuracy + 0.02


def test_learning_rates_trained_together_equal_each_alone() -> None:
    train_x, train_y, _, _ = _features(700, 1, decades=1)
    together = gradient_descent(train_x, train_y, (0.01, 0.3), classes=10, epochs=2, seed=3)
    alone = gradient_descent(train_x, train_y, (0.3,), classes=10, epochs=2, seed=3)
    torch.testing.assert_close(together[1].weight, alone[0].weight)
    assert not torch.allclose(together[0].weight, alone[0].weight)

    # The same by torch's own optimizer, in batches of the same order.
    mean, std = train_x.mean(0), train_x.std(0, unbiased=False)
    head = torch.nn.Linear(48, 10)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for rows in torch.randperm(700, generator=generator).split(256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head((train_x[rows] - mean) / std), train_y[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(alone[0].weight, head.weight.detach(), rtol=1e-4, atol=1e-5)


def test_test_labels_do_not_influence_anything() -> None:
    train_x, train_y, test_x, test_y = _features(400, 300, decades=1)
    first = linear_probe(train_x, train_y, test_x, test_y)
    second = linear_probe(train_x, train_y, test_x, (test_y + 1) % 10)
    assert torch.equal(first.probe.weight, second.probe.weight)
    assert (first.selected, first.held_out_accuracy) == (
        second.selected,
        second.held_out_accuracy,
    )
    assert first.accuracy != second.accuracy


def test_random_labels_give_chance() -> None:
    train_x, train_y, test_x, test_y = _features(1000, 3000, decades=0)
    shuffled = train_y[torch.randperm(1000, generator=torch.Generator().manual_seed(3))]
    assert linear_probe(train_x, shuffled, test_x, test_y).accuracy < 0.2


@pytest.mark.parametrize("solver", SOLVERS)
def test_deterministic_by_seed(solver: str) -> None:
    data = _features(300, 100, decades=1)
    torch.manual_seed(5)
    first = linear_probe(*data, solver=solver, seed=1)
    torch.manual_seed(6)
    second = linear_probe(*data, solver=solver, seed=1)
    assert torch.equal(first.probe.weight, second.probe.weight)
    assert first.accuracy == second.accuracy


def test_scale_constant_channels_and_half_precision_do_no_harm() -> None:
    train_x, train_y, test_x, test_y = _features(800, 2000, decades=0)
    plain = linear_probe(train_x, train_y, test_x, test_y).accuracy

    def disguise(x: Tensor) -> Tensor:
        return torch.cat([x * torch.logspace(-2, 2, x.shape[1]), torch.full((len(x), 3), 7.0)], dim=1)

    assert linear_probe(disguise(train_x), train_y, disguise(test_x), test_y).accuracy == pytest.approx(
        plain, abs=0.005
    )
    assert linear_probe(train_x.half(), train_y, test_x.half(), test_y).accuracy == pytest.approx(plain, abs=0.005)


def test_more_channels_than_images() -> None:
    data = _features(60, 200, decades=1, separation=1.0, channels=128)
    assert linear_probe(*data).accuracy > 0.5


def test_bad_input_is_named() -> None:
    train_x, train_y, test_x, test_y = _features(100, 50, decades=0)
    broken = train_x.clone()
    broken[0, 0] = float("inf")
    for message, arguments in {
        "train features contain NaN": (broken, train_y, test_x, test_y),
        "at least two classes": (train_x, train_y * 0, test_x, test_y * 0),
        "train lacks": (train_x, train_y, test_x, test_y + 1),
        "negative": (train_x, train_y - 1, test_x, test_y),
        "at least two per class": (train_x[:2], torch.tensor([0, 1]), test_x[:2], torch.tensor([0, 1])),
    }.items():
        with pytest.raises(UserError, match=message):
            linear_probe(*arguments)
    with pytest.raises(UserError, match="grid must hold positive"):
        linear_probe(train_x, train_y, test_x, test_y, grid=[0.0])
    with pytest.raises(UserError, match="choose one of logistic_regression, sgd"):
        linear_probe(train_x, train_y, test_x, test_y, solver="adam")


def test_the_saved_probe_gives_the_same_logits(tmp_path: Path) -> None:
    train_x, train_y, test_x, test_y = _features(200, 50, decades=0)
    probe = linear_probe(train_x, train_y, test_x, test_y).probe
    names = [f"class {index}" for index in range(10)]
    save_probe(tmp_path / "probe.safetensors", probe, names)
    loaded, classes = load_probe(tmp_path / "probe.safetensors")
    assert isinstance(loaded, LinearProbe)
    assert classes == names
    assert torch.equal(loaded.logits(test_x), probe.logits(test_x))
    by_hand = ((test_x - probe.mean) / probe.std) @ probe.weight.T + probe.bias
    torch.testing.assert_close(loaded.logits(test_x), by_hand)


def test_a_missing_or_damaged_probe_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="heatssl probe run="):
        load_probe(tmp_path / "probe.safetensors")
    (tmp_path / "probe.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged"):
        load_probe(tmp_path / "probe.safetensors")
