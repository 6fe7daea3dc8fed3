"""Features of another size: what the size does to them linearly is undone, from images without labels."""

import pytest
import torch
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation import Alignment, linear_probe


@pytest.fixture
def here() -> Tensor:
    """Features (300, 8) of correlated channels, away from zero."""
    torch.manual_seed(0)
    return torch.randn(300, 8) @ torch.randn(8, 8) + 5


def test_a_linear_change_is_undone_on_features_that_were_not_shown(here: Tensor) -> None:
    change = torch.eye(8) + 0.3 * torch.randn(8, 8)
    there = here @ change + 2
    found = Alignment(there[:200], here[:200], ridge=1e-9)(there[200:])
    torch.testing.assert_close(found, here[200:], rtol=1e-3, atol=1e-3)


def test_it_minimises_the_penalised_error(here: Tensor) -> None:
    there = here.tanh() + 0.5 * here.roll(1, dims=1) + torch.randn_like(here)
    alignment = Alignment(there, here, ridge=10.0)

    def objective(change: Tensor) -> Tensor:
        seen, wanted = (x.double() - x.double().mean(dim=0) for x in (there, here))
        return (wanted - seen - seen @ change).square().sum() + 10 * seen.square().mean() * change.square().sum()

    change = alignment.change.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(change), change)
    assert gradient.abs().max() < 1e-4 * objective(torch.zeros_like(change))


def test_a_large_ridge_leaves_the_difference_of_the_means(here: Tensor) -> None:
    there = 0.5 * here + 3
    found = Alignment(there, here, ridge=1e9)(there)
    torch.testing.assert_close(found, there - there.mean(dim=0) + here.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_images_of_one_size_stay_what_they_are(here: Tensor) -> None:
    torch.testing.assert_close(Alignment(here, here)(here), here, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_gives_float32(here: Tensor, dtype: torch.dtype) -> None:
    aligned = Alignment((here + 1).to(dtype), here.to(dtype))((here + 1).to(dtype))
    assert aligned.dtype == torch.float32
    torch.testing.assert_close(aligned, here, rtol=0.05, atol=0.1)


def test_constant_channels_stay_finite(here: Tensor) -> None:
    assert Alignment(torch.ones(4, 3), torch.zeros(4, 3))(torch.ones(2, 3)).abs().max() == 0
    here[:, 2] = 7
    assert Alignment(here, here)(here).isfinite().all()


def test_it_is_kept_with_its_state(here: Tensor) -> None:
    there = 2 * here
    kept = Alignment(there, here)
    other = Alignment(here, here)
    other.load_state_dict(kept.state_dict())
    torch.testing.assert_close(other(there), kept(there))


def test_a_probe_of_one_size_reads_another() -> None:
    """Two classes that a change of size moves to the wrong side of the boundary."""
    torch.manual_seed(1)
    labels = torch.arange(400) % 2
    here = torch.randn(400, 4) + 3 * labels[:, None]
    there = 0.4 * here + 8
    probe = linear_probe(here[:200], labels[:200], here[200:], labels[200:]).probe
    aligned = Alignment(there[:100], here[:100])(there[200:])

    def right(features: Tensor) -> float:
        return (probe.logits(features).argmax(dim=1) == labels[200:]).float().mean().item()

    assert right(there[200:]) < 0.6
    assert right(aligned) >= right(here[200:]) - 0.01


@pytest.mark.parametrize(
    ("there", "here", "ridge", "words"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), 0.1, "same two or more images"),
        (torch.ones(3, 4, 2, 2), torch.ones(3, 4, 2, 2), 0.1, "must be \\(N, C\\)"),
        (torch.ones(1, 4), torch.ones(1, 4), 0.1, "two or more"),
        (torch.full((3, 4), torch.nan), torch.ones(3, 4), 0.1, "not finite"),
        (torch.ones(3, 4), torch.ones(3, 4), 0.0, "ridge=0"),
        (torch.ones(3, 4), torch.ones(3, 4), float("nan"), "ridge=nan"),
    ],
)
def test_what_cannot_be_aligned_is_said(there: Tensor, here: Tensor, ridge: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Alignment(there, here, ridge)
