"""One-way waves: solutions in closed form, speeds that can be read, and what turning the image does to them."""

import pytest
import torch

from heatssl.heat import FirstOrder, HiddenWaves, NormLinear, wave_speeds


def random_law(channels: int = 4) -> HiddenWaves:
    torch.manual_seed(0)
    law = HiddenWaves(channels).double()
    with torch.no_grad():
        law.directions.add_(0.2 * torch.randn_like(law.directions))
    return law


def waves(law: HiddenWaves, size: int) -> tuple[torch.Tensor, float]:
    """z = 2 Re(V zeta), zeta_k = exp(w_k (y + lambda_k x)), on a grid over [0, 1]^2, and its spacing."""
    axis = torch.linspace(0, 1, size, dtype=torch.float64)
    y, x = axis[:, None], axis[None, :]
    frequency = [1.3, 0.7]
    zeta = torch.stack([torch.exp(w * (y + speed * x)) for w, speed in zip(frequency, law.speeds, strict=True)])
    half = len(law.directions) // 2
    directions = torch.complex(law.directions[:, :half], law.directions[:, half:])
    return 2 * torch.einsum("dk,khw->dhw", directions, zeta).real[None].detach(), float(axis[1] - axis[0])


def test_residual_on_exact_waves_falls_with_the_second_order():
    law = random_law()

    def worst(size: int) -> float:
        field, spacing = waves(law, size)
        return (law.residual(field)[..., :-1, :-1].sqrt() / spacing).max().item()

    coarse, fine = worst(17), worst(33)
    assert coarse < 0.05
    assert coarse / fine == pytest.approx(4, rel=0.15)
    assert law.residual(torch.randn(1, 4, 6, 6, dtype=torch.float64)).mean() > 0.1


def test_mixing_has_the_speeds_for_eigenvalues_and_the_directions_for_eigenvectors():
    law = random_law()
    found = torch.linalg.eigvals(law.mixing())
    expected = torch.cat([law.speeds, law.speeds.conj()])
    assert torch.allclose(sorted_complex(found), sorted_complex(expected))
    directions = torch.complex(law.directions[:, :2], law.directions[:, 2:])
    assert torch.allclose(law.mixing().to(directions) @ directions, directions * law.speeds)


def test_waves_are_the_coordinates_of_the_directions():
    law = random_law()
    field, _ = waves(law, 5)
    zeta = law.waves(field)
    directions = torch.complex(law.directions[:, :2], law.directions[:, 2:])
    assert zeta.shape == (1, 2, 5, 5)
    assert torch.allclose(2 * torch.einsum("dk,bkhw->bdhw", directions, zeta).real, field)
    axis = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.allclose(zeta[0, 0], torch.exp(1.3 * (axis[:, None] + law.speeds[0] * axis)))


def test_a_real_speed_shifts_a_pattern():
    """lambda = -1: any pattern that moves one patch down for each patch to the right, whatever it is, obeys exactly."""
    law = random_law()
    with torch.no_grad():
        law.speed_parts.copy_(torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
    pattern = torch.randn(1, 4, 9, dtype=torch.float64)
    moving = torch.stack([pattern.roll(x, dims=2) for x in range(9)], dim=3)
    assert law.residual(moving)[..., :-1, :-1].max() < 1e-25
    assert law.residual(moving.flip(3))[..., :-1, :-1].mean() > 0.1


def test_flips_and_transposition_act_on_the_speeds():
    law, flipped, turned = random_law(), random_law(), random_law()
    with torch.no_grad():
        flipped.speed_parts.neg_()
        inverse = 1 / law.speeds
        turned.speed_parts.copy_(torch.stack([inverse.real, inverse.imag]))
    field = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    residual = law.residual(field)[..., :-1, :-1]
    assert torch.allclose(flipped.residual(field.flip(3))[..., :-1, :-1], residual.flip(2))
    assert torch.allclose(flipped.residual(field.flip(2))[..., :-1, :-1], residual.flip(1))
    grown, _ = waves(law, 33)
    # M^-1 (z_x - M z_y): another norm of the same error, so compared where it vanishes
    assert turned.residual(grown.transpose(2, 3)).max() < 1e-5
    assert law.residual(grown.transpose(2, 3)).max() > 1e-4


@pytest.mark.parametrize("axis", [2, 3])
def test_the_loss_of_a_flipped_field_under_the_flipped_law_is_the_same(axis):
    law, flipped = random_law(), random_law()
    with torch.no_grad():
        flipped.speed_parts.neg_()
    field = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(flipped.loss(field.flip(axis)), law.loss(field))
    torch.testing.assert_close(law.loss(field), law.residual(field)[..., :-1, :-1].mean(), msg="each error once")


def test_the_residual_does_not_depend_on_the_length_of_a_direction():
    law, longer = random_law(), random_law()
    with torch.no_grad():
        longer.directions.mul_(7)
    field = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    assert torch.allclose(law.residual(field), longer.residual(field))


def test_speeds_of_a_first_order_law():
    torch.manual_seed(0)
    a, b = NormLinear(4).double().A, FirstOrder(4, commuting=False).double().B
    speeds = wave_speeds(a, b)
    for speed in speeds:  # A v = lambda B v for some v
        assert torch.linalg.svdvals(a.to(speed) - speed * b.to(speed)).min() < 1e-12
    assert torch.allclose(sorted_complex(wave_speeds(2 * b, b)), torch.full((4,), 2.0, dtype=torch.complex128))


def test_gradients_reach_field_and_law():
    law = random_law()
    field = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (field, law.directions, law.speed_parts)
    assert torch.autograd.gradcheck(lambda z, *_: law.residual(z), inputs)


def test_bf16_stays_close_to_float64():
    law = random_law()
    field = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    exact = law(field)
    low = law.float().residual(field.bfloat16()).double()
    assert (low - exact).norm() / exact.norm() < 0.02


def test_what_cannot_work_is_refused():
    for channels in (3, 0):
        with pytest.raises(ValueError, match="even"):
            HiddenWaves(channels)
    for shape in [(1, 6, 4, 4), (1, 4, 1, 4)]:
        with pytest.raises(ValueError, match=r"\(B, 4, H, W\)"):
            HiddenWaves(4).residual(torch.randn(shape))
    assert "channels=4" in repr(HiddenWaves(4))


def sorted_complex(values: torch.Tensor) -> torch.Tensor:
    return torch.stack(sorted(values.detach(), key=lambda value: (round(value.real.item(), 9), value.imag.item())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_waves_and_residuals(dtype):
    """No solver and no complex numbers are of these types: both are of float32."""
    field = torch.randn(2, 4, 5, 5)
    law = HiddenWaves(4)
    expected = law.waves(field)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(law.waves(field), expected)
    torch.testing.assert_close(law.waves(field.to(dtype)), expected, atol=0.05, rtol=0.05)
    for kind in (HiddenWaves(4), FirstOrder(4)):
        assert kind.to(dtype).residual(field.to(dtype)).isfinite().all()
