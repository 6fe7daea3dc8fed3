"""SIGReg: zero only for what looks normal from every side, the same number as its closed form and as lightly's."""

import math

import pytest
import torch

from heatssl.objectives.isotropy import sigreg


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_on_a_line_it_is_the_closed_form_of_epps_and_pulley():
    """Integrated over all frequencies, the statistic is a double sum over pairs of samples."""
    x = normal(40, 1).double() * 1.7 + 0.3
    pairs = torch.exp(-((x - x.T) ** 2) / 2).sum() / 40
    single = torch.exp(-(x**2) / 4).sum() * math.sqrt(2)
    expected = math.sqrt(2 * math.pi) * (pairs - single + 40 / math.sqrt(3))
    assert sigreg(x, 3, 400, reach=9.0).item() == pytest.approx(expected.item(), rel=1e-8)
    assert sigreg(x).item() == pytest.approx(expected.item(), rel=0.02), "the default quadrature is good to 2 %"


def test_of_normal_samples_the_mean_is_known_and_does_not_depend_on_their_number():
    frequency = torch.linspace(-3, 3, 2001, dtype=torch.double)
    expected = torch.trapezoid((1 - torch.exp(-(frequency**2))) * torch.exp(-(frequency**2) / 2), frequency)
    torch.manual_seed(0)
    for samples in (30, 300):
        values = [sigreg(normal(samples, 8, seed=seed), 32).item() for seed in range(60)]
        assert sum(values) / 60 == pytest.approx(expected.item(), rel=0.06)


@pytest.mark.parametrize(
    ("case", "spoil"),
    [
        ("collapsed", torch.zeros_like),
        ("one direction", lambda z: z[:, :1].expand_as(z)),
        ("shifted", lambda z: z + 0.5),
        ("scaled", lambda z: 1.5 * z),
        ("anisotropic", lambda z: z * torch.linspace(0.2, 1.8, 6)),
        ("two clusters", lambda z: z / 3 + torch.sign(z[:, :1])),
    ],
)
def test_whatever_is_not_isotropic_and_normal_costs_more(case, spoil):
    torch.manual_seed(0)
    samples = normal(512, 6)
    assert sigreg(samples) < 1.5
    assert sigreg(spoil(samples)) > 4, case


def test_uniform_samples_are_told_from_normal_ones_of_equal_variance():
    """On one axis: sums of many uniform coordinates would be normal again."""
    uniform = (torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) - 0.5) * math.sqrt(12)
    assert sigreg(uniform) > 3 * sigreg(normal(2000, 1)).clamp_min(1)


def test_each_view_has_its_own_statistic():
    views = torch.stack([normal(64, 5), 3 * normal(64, 5, seed=1)])
    torch.manual_seed(2)
    together = sigreg(views)
    parts = []
    for view in views:
        torch.manual_seed(2)
        parts.append(sigreg(view))
    assert together.item() == pytest.approx(sum(parts).item() / 2, rel=1e-5)


def test_directions_repeat_with_their_seed():
    samples = normal(32, 16)

    def measured(seed: int) -> torch.Tensor:
        return sigreg(samples, 4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(measured(1), measured(1))
    assert not torch.equal(measured(1), measured(2))
    torch.manual_seed(5)
    first = sigreg(samples, 4)
    torch.manual_seed(5)
    assert torch.equal(first, sigreg(samples, 4)), "a step of a resumed run repeats"


def test_gradient():
    samples = normal(7, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sigreg(z, 5, generator=torch.Generator().manual_seed(0)), samples)


def test_descent_makes_embeddings_isotropic():
    points = (normal(200, 4) * torch.tensor([1.4, 1.0, 0.5, 0.2]) + 0.5).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.1)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        sigreg(points, 64).backward()
        optimizer.step()
    assert points.mean(0).abs().max() < 0.15
    # Far samples hardly move, as their waves cancel: the widest axis is the last to shrink.
    assert torch.allclose(points.T.cov(), torch.eye(4), atol=0.4)


def test_half_precision_around_it_does_not_reach_it():
    samples = normal(256, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        within = sigreg(samples)
    torch.manual_seed(0)
    assert torch.equal(within, sigreg(samples))


def test_equals_lightly():
    reference = pytest.importorskip("lightly.loss.lejepa_loss").SIGReg(num_vectors=64)
    for samples in (normal(50, 12), normal(3, 20, 12) * 2 + 1):
        torch.manual_seed(4)
        expected = reference(samples)
        torch.manual_seed(4)
        assert sigreg(samples, 64).item() == pytest.approx(expected.item(), rel=1e-5)
