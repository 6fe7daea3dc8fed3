"""Sensitivity, randomisation, rank correlation and intervals; a check must not leave the model changed."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.metrics import sensitivity_max
from scipy.stats import bootstrap, spearmanr
from torch import Tensor, nn

from heatssl.attribution import explain
from heatssl.attribution.scores import bootstrap_interval, max_sensitivity, randomisation, rank_correlation
from heatssl.attribution.targets import make_target
from heatssl.errors import UserError

Create = Callable[..., nn.Module]


def test_sensitivity_is_captums(create: Create, images: Tensor) -> None:
    model = create(num_classes=4)
    target = make_target(model, images, 1)

    def maps_of(points: Tensor) -> Tensor:
        return explain(model, points, "integrated_gradients", target, steps=3).maps

    found = max_sensitivity(maps_of, images, radius=0.05, samples=3, seed=4)
    generator = torch.Generator().manual_seed(4)

    def perturb(inputs: Tensor) -> Tensor:
        return inputs + 0.05 * (2 * torch.rand(inputs.shape[1:], generator=generator) - 1)

    expected = sensitivity_max(
        lambda points: (maps_of(points[0] if isinstance(points, tuple) else points),),
        images,
        perturb_func=perturb,
        n_perturb_samples=3,
        max_examples_per_batch=3,
    )
    assert found.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_map_that_never_changes_is_not_sensitive(images: Tensor) -> None:
    for value in (0.0, 1.0):
        assert max_sensitivity(lambda points: torch.full((3, 4, 4), value), images).tolist() == [0, 0, 0]  # noqa: B023


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _trained_and_twin(create: Create) -> tuple[nn.Module, nn.Module]:
    model = create(num_classes=0)
    torch.manual_seed(9)
    twin = create(num_classes=0)
    with torch.no_grad():
        for value in twin.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model, twin


def test_layers_become_random_from_the_last_on_and_come_back(create: Create, images: Tensor) -> None:
    model, twin = _trained_and_twin(create)
    before = _weights(model)
    states: list[dict[str, Tensor]] = []

    def maps_of() -> Tensor:
        states.append(_weights(model))
        return explain(model, images, "gradcam").maps

    found = randomisation(maps_of, model, twin, stages=3)
    assert found.shape == (3, 3)
    assert len(states) == 4
    changed = [{name for name, value in state.items() if not torch.equal(value, before[name])} for state in states]
    assert changed[0] == set() < changed[1] < changed[2] < changed[3]
    first, *_, last = (name for name, _ in model.named_parameters())
    assert last in changed[1]
    assert first in changed[3] - changed[2]
    expected = explain(twin, images, "gradcam").maps
    torch.testing.assert_close(found[2], rank_correlation(explain(model, images, "gradcam").maps, expected))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_comes_back_after_an_error(small_vit: Create, images: Tensor) -> None:
    model, twin = _trained_and_twin(small_vit)
    before = _weights(model)
    calls = iter([torch.rand(3, 4, 4), torch.rand(3, 4, 4)])
    with pytest.raises(RuntimeError, match="no more"):
        randomisation(lambda: _next_of(calls), model, twin)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="the twin has no"):
        randomisation(lambda: torch.rand(3, 4, 4), model, small_vit(num_classes=0, embed_dim=24))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _next_of(calls) -> Tensor:
    for maps in calls:
        return maps
    raise RuntimeError("no more")


def test_a_method_that_ignores_the_weights_fails_the_check(small_vit: Create, images: Tensor) -> None:
    """An edge detector looks like a good heatmap: the check must give it 1 at every stage."""
    model, twin = _trained_and_twin(small_vit)
    edges = images.diff(dim=3).abs().sum(dim=1)
    assert randomisation(lambda: edges, model, twin).min() == pytest.approx(1)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 6, 7, generator=generator)
    second = 0.5 * first + torch.randn(4, 6, 7, generator=generator)
    if ties:
        first, second = first.relu(), (2 * second).round()
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    assert rank_correlation(first, second).tolist() == pytest.approx(expected, abs=1e-5)
    assert rank_correlation(first, torch.ones(4, 6, 7)).tolist() == [0] * 4


def test_the_interval_is_scipys_within_the_noise_of_draws() -> None:
    values = np.random.default_rng(0).normal(size=60)
    low, high = bootstrap_interval(values, draws=4000)
    expected = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert bootstrap_interval(values, draws=4000) == (low, high)
    assert bootstrap_interval([*values, math.nan], draws=4000) == (low, high)
    assert all(math.isnan(end) for end in bootstrap_interval([math.nan]))
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)
