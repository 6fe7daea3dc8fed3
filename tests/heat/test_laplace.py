"""The Laplace residual against fields whose Laplacian is known in closed form."""

import pytest
import torch

from heatssl.heat import Laplace, laplacian, laplacian_stencil


def sample(function, size: int = 9, low: float = -1.0, high: float = 1.0) -> tuple[torch.Tensor, float]:
    """A scalar function on a size x size grid as a field (1, 1, H, W), and the grid's spacing."""
    axis = torch.linspace(low, high, size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return function(x, y)[None, None], float(axis[1] - axis[0])


# Polynomials up to the third degree: their fourth derivatives vanish, so both stencils are exact.
HARMONIC = {
    "constant": lambda x, y: torch.full_like(x, 3.0),
    "linear": lambda x, y: 2 * x - 5 * y,
    "xy": lambda x, y: x * y,
    "x2-y2": lambda x, y: x**2 - y**2,
    "x3-3xy2": lambda x, y: x**3 - 3 * x * y**2,
    "3x2y-y3": lambda x, y: 3 * x**2 * y - y**3,
}


@pytest.mark.parametrize("stencil", ["5pt", "9pt"])
@pytest.mark.parametrize("name", HARMONIC)
def test_harmonic_polynomials_obey_to_rounding(name, stencil):
    field, spacing = sample(HARMONIC[name])
    assert Laplace(stencil, spacing=spacing).residual(field).max() < 1e-22


@pytest.mark.parametrize("stencil", ["5pt", "9pt"])
@pytest.mark.parametrize("boundary", ["interior", "replicate", "reflect"])
def test_a_field_that_is_not_harmonic_is_seen(stencil, boundary):
    field, spacing = sample(lambda x, y: x**2 + y**2)  # Laplacian 4 everywhere
    value = laplacian(field, stencil, boundary, spacing)
    assert torch.allclose(value[..., 1:-1, 1:-1], torch.tensor(4.0, dtype=torch.float64))
    assert torch.allclose(
        Laplace(stencil, "interior", spacing).residual(field), torch.tensor(16.0, dtype=torch.float64)
    )


@pytest.mark.parametrize(("stencil", "order"), [("5pt", 2), ("9pt", 6)])
def test_error_on_exp_cos_falls_with_the_stencils_order(stencil, order):
    """exp(ax) cos(ay) is harmonic; halving the grid divides the 5-point error by 4. On harmonic fields the 9-point
    stencil's h^2 and h^4 terms are powers of the Laplacian and vanish: 64."""

    def worst(size: int) -> float:
        field, spacing = sample(lambda x, y: torch.exp(3 * x) * torch.cos(3 * y), size)
        return (
            laplacian(field, stencil, spacing=spacing)[..., :: (size - 1) // 8, :: (size - 1) // 8].abs().max().item()
        )

    coarse, fine = worst(17), worst(33)
    # compare the same physical point: the corner of the interior moves with the grid, so allow a fifth
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_spacing_scales_the_laplacian_by_its_inverse_square():
    field = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert torch.allclose(laplacian(field, spacing=0.5), 4 * laplacian(field))
    assert torch.allclose(Laplace(spacing=0.5).residual(field), 16 * Laplace().residual(field))


def test_boundaries_are_what_they_say():
    field = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    f = field[0, 0]
    replicate = laplacian(field, "5pt", "replicate")[0, 0]
    reflect = laplacian(field, "5pt", "reflect")[0, 0]
    assert replicate[0, 0] == pytest.approx((f[0, 1] + f[1, 0] - 2 * f[0, 0]).item())
    assert reflect[0, 0] == pytest.approx((2 * f[0, 1] + 2 * f[1, 0] - 4 * f[0, 0]).item())
    assert laplacian(field, "5pt", "replicate").sum().abs() < 1e-12  # no flux leaves: heat is conserved


def test_channels_do_not_mix_and_their_mean_is_taken():
    field = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    each = torch.stack([Laplace().residual(field[:, k : k + 1]) for k in range(5)]).mean(dim=0)
    assert torch.allclose(Laplace().residual(field), each)
    assert Laplace().residual(field).shape == (2, 4, 4)
    assert Laplace(boundary="reflect")(field).shape == (2, 6, 6)


@pytest.mark.parametrize("move", [lambda z: z.flip(3), lambda z: z.flip(2), lambda z: z.transpose(2, 3)])
@pytest.mark.parametrize("stencil", ["5pt", "9pt"])
def test_flips_and_transposition_commute_with_the_law(move, stencil):
    field = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    residual = Laplace(stencil).residual(field)
    moved = move(residual[:, None])[:, 0]
    assert torch.allclose(Laplace(stencil).residual(move(field)), moved)


@pytest.mark.parametrize("boundary", ["interior", "replicate", "reflect"])
def test_gradients(boundary):
    field = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Laplace("9pt", boundary).residual, field)


def test_without_flux_through_the_edges_the_laplacian_is_its_own_adjoint():
    z, w = torch.randn(2, 1, 2, 4, 5, dtype=torch.float64)
    for stencil in ("5pt", "9pt"):
        forth, back = (laplacian(z, stencil, "replicate") * w).sum(), (z * laplacian(w, stencil, "replicate")).sum()
        assert forth.item() == pytest.approx(back.item())


@pytest.mark.parametrize("stencil", ["5pt", "9pt"])
def test_bf16_stays_close_to_float64(stencil):
    field = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exact = laplacian(field, stencil)
    assert (laplacian(field.bfloat16(), stencil).double() - exact).norm() / exact.norm() < 0.01


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="5pt, 9pt"):
        Laplace("7pt")
    with pytest.raises(ValueError, match="interior, replicate, reflect"):
        Laplace(boundary="periodic").residual(torch.randn(1, 1, 4, 4))
    with pytest.raises(ValueError, match="at least 3x3"):
        Laplace().residual(torch.randn(1, 1, 2, 4))
    with pytest.raises(ValueError, match="spacing"):
        Laplace(spacing=0)
    with pytest.raises(ValueError, match="spacing must be positive, not -1"):
        laplacian(torch.randn(1, 1, 4, 4), spacing=-1)
    assert "9pt" in repr(Laplace("9pt"))
    assert laplacian_stencil("9pt").sum().abs() < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stencil", ["5pt", "9pt"])
def test_a_constant_is_at_rest_in_half_precision_too(stencil, dtype):
    """Weights that are rounded to half precision no longer sum to nothing."""
    assert laplacian(torch.full((1, 2, 6, 6), 100.0, dtype=dtype), stencil).abs().max() < 1e-3
    field = (5 + 0.05 * torch.randn(2, 8, 12, 12)).to(dtype)
    law = Laplace(stencil)
    torch.testing.assert_close(law.residual(field).float().mean(), law.loss(field), rtol=0.02, atol=0)
