"""The exact heat flow: closed forms, an independent matrix exponential, and the properties of a semigroup."""

import math

import pytest
import torch

from heatssl.heat import HeatFlow, heat_semigroup, laplacian

BOUNDARIES = ["neumann", "periodic"]
KINDS = ["continuous", "5pt"]


@pytest.fixture
def field() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 5, 6, dtype=torch.float64)


def laplacian_5pt(z: torch.Tensor, boundary: str) -> torch.Tensor:
    if boundary == "neumann":
        return laplacian(z, "5pt", "replicate")
    return sum(z.roll(shift, dim) for dim in (2, 3) for shift in (1, -1)) - 4 * z


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_5pt_is_the_matrix_exponential_of_the_laplacian(boundary, field):
    units = torch.eye(30, dtype=torch.float64).view(30, 1, 5, 6)
    matrix = laplacian_5pt(units, boundary).view(30, 30).T
    expected = (field.flatten(2) @ torch.matrix_exp(0.7 * matrix).T).view_as(field)
    assert torch.allclose(heat_semigroup(field, 0.7, boundary, "5pt"), expected, atol=1e-12)


@pytest.mark.parametrize("size", [8, 7])
def test_a_cosine_decays_by_its_own_eigenvalue(size):
    """cos(pi k x / N) cos(pi m y / N) is the no-flux mode of a box of N patches: it decays as its square frequency."""
    x = torch.arange(size, dtype=torch.float64) + 0.5
    for k, m in [(0, 0), (1, 0), (2, 3), (size - 1, size - 1)]:
        mode = torch.cos(math.pi * m * x / size)[:, None] * torch.cos(math.pi * k * x / size)
        decay = math.exp(-0.3 * (math.pi / size) ** 2 * (k * k + m * m))
        assert torch.allclose(heat_semigroup(mode[None, None], 0.3)[0, 0], decay * mode, atol=1e-13)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (1, 4)])
def test_periodic_agrees_with_the_fast_fourier_transform(height, width):
    z = torch.randn(2, 3, height, width, dtype=torch.float64)
    square = [(2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64)).square() for n in (height, width)]
    factor = torch.exp(-0.4 * (square[0][:, None] + square[1]))
    expected = torch.fft.ifft2(torch.fft.fft2(z) * factor).real
    assert torch.allclose(heat_semigroup(z, 0.4, "periodic"), expected, atol=1e-12)


def test_a_point_spreads_to_the_variance_of_the_heat_kernel():
    z = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    z[..., 16, 16] = 1
    for boundary in BOUNDARIES:
        spread = heat_semigroup(z, 2.0, boundary)[0, 0]
        x = torch.arange(33, dtype=torch.float64) - 16
        kernel = torch.exp(-x.square() / 8) / math.sqrt(8 * math.pi)
        assert torch.allclose(spread, kernel[:, None] * kernel, atol=1e-8)


def test_5pt_tends_to_the_continuous_flow_with_the_second_order():
    def error(size: int) -> float:
        """The same smooth field on [0, 1] on a finer grid: a unit of time is size^2 squared patches."""
        x = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        z = (torch.cos(math.pi * x) * torch.cos(2 * math.pi * x)[:, None])[None, None]
        discrete, exact = (heat_semigroup(z, 0.02 * size**2, "neumann", kind) for kind in ("5pt", "continuous"))
        return (discrete - exact).abs().max().item()

    assert error(16) / error(32) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_it_is_a_semigroup_that_keeps_the_mean_and_is_its_own_adjoint(boundary, kind, field):
    def flow(z: torch.Tensor, t: float) -> torch.Tensor:
        return heat_semigroup(z, t, boundary, kind)

    other = torch.randn_like(field)
    assert torch.allclose(flow(field, 0.0), field, atol=1e-12)
    assert torch.allclose(flow(flow(field, 0.3), 0.9), flow(field, 1.2))
    assert torch.allclose(flow(field, 1.7).mean(dim=(2, 3)), field.mean(dim=(2, 3)))
    at_rest = field.mean(dim=(2, 3), keepdim=True).expand_as(field)
    assert torch.allclose(flow(field, 1e4), at_rest, atol=1e-9)
    assert (flow(field, 0.5) * other).sum().item() == pytest.approx((field * flow(other, 0.5)).sum().item())
    for turn in (lambda z: z.flip(2), lambda z: z.flip(3), lambda z: z.transpose(2, 3)):
        assert torch.allclose(flow(turn(field), 0.5), turn(flow(field, 0.5)))
    if boundary == "periodic":
        assert torch.allclose(flow(field.roll(2, 3), 0.5), flow(field, 0.5).roll(2, 3))


def test_times_per_channel_and_per_sample(field):
    times = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    by_channel = heat_semigroup(field, times)
    by_sample = heat_semigroup(field, times[:2].view(2, 1, 1, 1))
    for k, t in enumerate(times.tolist()):
        assert torch.allclose(by_channel[:, k : k + 1], heat_semigroup(field[:, k : k + 1], t))
    for k, t in enumerate(times[:2].tolist()):
        assert torch.allclose(by_sample[k : k + 1], heat_semigroup(field[k : k + 1], t))
    assert torch.allclose(heat_semigroup(field, times[1]), heat_semigroup(field, 0.5))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_in_field_and_time(boundary):
    z = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, t: heat_semigroup(z, t, boundary), (z, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, field):
    exact = heat_semigroup(field.to(dtype).double(), 0.5)
    low = heat_semigroup(field.to(dtype), 0.5)
    assert low.dtype == dtype
    assert torch.allclose(low.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_autocast_does_not_lower_the_precision(field):
    z = field.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = heat_semigroup(z, 0.5)
    assert torch.equal(inside, heat_semigroup(z, 0.5))


def test_heat_flow_holds_two_fields_against_each_other(field):
    law = HeatFlow(3, time=1.0).double()
    later = heat_semigroup(field, 1.0)
    assert law(field, later).shape == (2, 5, 6)
    assert law(field, later).max() < 1e-25
    assert law.residual(later, field).mean() > 0.01  # heat does not flow back
    assert law.residual(field).mean() > 0.01
    assert law.residual(torch.ones_like(field)).max() < 1e-25


@pytest.mark.parametrize(("start", "direction"), [(0.2, -1), (0.8, 0), (3.0, 1)])
def test_the_gradient_leads_to_the_time_that_passed(start, direction, field):
    """Group by group: the first channel's field has moved on by 0.8, the others' have not moved at all."""
    later = torch.cat([heat_semigroup(field[:, :1], 0.8), field[:, 1:]], dim=1)
    law = HeatFlow(3, time=start).double()
    law(field, later).mean().backward()
    slope = law.log_time.grad
    assert slope[0].sign().item() * (slope[0].abs() > 1e-7).item() == direction
    assert bool((slope[1:] > 1e-3).all())
    shared = HeatFlow(4, groups=2, time=start)
    assert shared.time.tolist() == pytest.approx([start] * 4)
    shared.log_time.data[0] = 0
    assert shared.time.tolist() == pytest.approx([1, 1, start, start])


def test_wrong_settings_are_refused(field):
    for arguments, fix in [
        ((1.0, "dirichlet"), "neumann, periodic"),
        ((1.0, "neumann", "7pt"), "continuous, 5pt"),
        ((-1.0,), "back in time"),
        ((torch.ones(2),), r"\(3,\) for the channels"),
        ((torch.ones(1, 3, 5, 6),), "broadcasts"),
    ]:
        with pytest.raises(ValueError, match=fix):
            heat_semigroup(field, *arguments)
    with pytest.raises(ValueError, match="2 groups"):
        HeatFlow(3, groups=2)
    for settings, fix in (
        ({"time": 0.0}, "time"),
        ({"time": float("inf")}, "finite"),
        ({"boundary": "reflect"}, "unknown boundary 'reflect'"),
        ({"laplacian": "9pt"}, "unknown laplacian '9pt'"),
    ):
        with pytest.raises(ValueError, match=fix):
            HeatFlow(3, **settings)
    assert "groups=3" in repr(HeatFlow(3))


def test_what_is_no_field_or_time_of_one_is_refused(field):
    batch, channels = field.shape[:2]
    for time in (torch.ones(batch + 1, channels, 1, 1), torch.ones(1, channels + 1, 1, 1), torch.ones(channels + 2)):
        with pytest.raises(ValueError, match="t has shape"):
            heat_semigroup(field, time)
    with pytest.raises(ValueError, match="nor for ever"):
        heat_semigroup(field, math.inf)
    with pytest.raises(ValueError, match="floating-point"):
        heat_semigroup(field.to(torch.uint8), 1.0, "periodic")
    with pytest.raises(ValueError, match="floating-point"):
        heat_semigroup(field[:, :, :0], 1.0)
    with pytest.raises(ValueError, match=f"\\(B, {channels + 1}, H, W\\)"):
        HeatFlow(channels + 1).residual(field)
