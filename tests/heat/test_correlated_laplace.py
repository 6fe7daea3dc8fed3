"""z_xx + S z_yy = 0 against closed-form solutions, and how S behaves when the image is turned."""

import pytest
import torch

from heatssl.heat import CorrelatedLaplace, FirstOrder, Laplace

COUPLINGS = [{"coupling": "full"}, {"coupling": "grouped", "groups": 2}, {"coupling": "diagonal"}]


def random_law(**settings) -> CorrelatedLaplace:
    torch.manual_seed(0)
    law = CorrelatedLaplace(4, **settings).double()
    with torch.no_grad():
        law.deviation.copy_(0.5 * torch.randn_like(law.deviation))
    return law


def couple(law: CorrelatedLaplace, matrix: torch.Tensor) -> None:
    law.deviation.data.copy_(matrix - torch.eye(len(matrix)))


def solution(size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """V [exp(b x sqrt(s)) cos(b y)] solves z_xx + V diag(s) V^-1 z_yy = 0; returned with S and the grid's spacing."""
    torch.manual_seed(3)
    s, b = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 1.5, 0.7])
    mixing = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = axis[:, None], axis[None, :]
    waves = torch.stack([torch.exp(bk * sk.sqrt() * x) * torch.cos(bk * y) for sk, bk in zip(s, b, strict=True)])
    coupling = mixing @ torch.diag(s.double()) @ torch.linalg.inv(mixing)
    return torch.einsum("dc,chw->dhw", mixing, waves)[None], coupling, float(axis[1] - axis[0])


@pytest.mark.parametrize("settings", COUPLINGS)
@pytest.mark.parametrize("boundary", ["interior", "replicate", "reflect"])
def test_it_starts_as_laplace(settings, boundary):
    field = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    law = CorrelatedLaplace(4, boundary=boundary, spacing=0.5, **settings).double()
    assert torch.allclose(law(field), Laplace(boundary=boundary, spacing=0.5).residual(field))
    assert torch.equal(law.S, torch.eye(4, dtype=torch.float64))


def test_error_on_an_exact_solution_falls_fourfold_when_the_grid_is_halved():
    def worst(size: int, isotropic: bool = False) -> float:
        field, coupling, spacing = solution(size)
        law = CorrelatedLaplace(4, spacing=spacing).double()
        if not isotropic:
            couple(law, coupling)
        stride = (size - 1) // 8  # the same 49 points of the domain, whatever the grid
        return law.operator(field)[..., stride - 1 :: stride, stride - 1 :: stride].abs().max().item()

    coarse, fine = worst(17), worst(33)
    assert coarse / fine == pytest.approx(4, rel=0.02)
    assert worst(33, isotropic=True) > 50 * fine


def test_the_first_order_law_obeys_it_with_s_from_a_and_b():
    """S = -A^2 B^-2 of the generators; in small steps the grown field has a small residual, and not with S = I."""
    torch.manual_seed(1)
    fine = FirstOrder(4).double()
    with torch.no_grad():
        fine.raw_rotation.copy_(torch.tensor([[0.02, 0.03], [0.03, 0.01]]))
        fine.raw_decay.fill_(0.2)
    a, b = fine.A, fine.B
    law = CorrelatedLaplace(4).double()
    seed = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    rows = [torch.cat([fine.propagate(seed, dx=x, dy=y) for x in range(5)], dim=3) for y in range(5)]
    field = torch.cat(rows, dim=2)
    isotropic = law.residual(field).mean()
    inverse = torch.linalg.inv(b)
    couple(law, -a @ a @ inverse @ inverse)
    assert law.residual(field).mean() < 0.05 * isotropic


@pytest.mark.parametrize("settings", COUPLINGS)
def test_only_channels_of_a_group_couple(settings):
    law = random_law(**settings)
    size = 4 // law.groups
    inside = torch.block_diag(*[torch.ones(size, size)] * law.groups).bool()
    assert bool((law.S[inside] != 0).all())
    assert bool((law.S[~inside] == 0).all())
    field = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    d_xx = field[..., 1:-1, 2:] - 2 * field[..., 1:-1, 1:-1] + field[..., 1:-1, :-2]
    d_yy = field[..., 2:, 1:-1] - 2 * field[..., 1:-1, 1:-1] + field[..., :-2, 1:-1]
    assert torch.allclose(law.operator(field), d_xx + torch.einsum("dc,bchw->bdhw", law.S, d_yy))


def test_with_no_flux_through_the_edges_the_adjoint_has_s_transposed():
    law = random_law(boundary="replicate")
    transposed = CorrelatedLaplace(4, boundary="replicate").double()
    couple(transposed, law.S.T)
    z, w = torch.randn(2, 1, 4, 5, 6, dtype=torch.float64)
    # S mixes channels and D_yy positions: they commute, and D_xx, D_yy are symmetric
    assert (law.operator(z) * w).sum().item() == pytest.approx((z * transposed.operator(w)).sum().item())


def test_flips_leave_s_and_transposition_inverts_it():
    law = random_law()
    field = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    for dim in (2, 3):
        assert torch.allclose(law.residual(field.flip(dim)), law.residual(field).flip(dim - 1))
    orthogonal = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q  # so that S^-1 keeps the residual's norm
    couple(law, orthogonal)
    turned = CorrelatedLaplace(4).double()
    couple(turned, orthogonal.T)
    assert torch.allclose(turned.residual(field.transpose(2, 3)), law.residual(field).transpose(1, 2))


@pytest.mark.parametrize("settings", COUPLINGS)
def test_gradients_reach_field_and_coupling(settings):
    law = random_law(**settings)
    field = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, _: law.residual(z), (field, law.deviation))


def test_bf16_stays_close_to_float64():
    law = random_law()
    field = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    exact = law.operator(field)
    low = law.float().operator(field.bfloat16()).double()
    assert (low - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"coupling": "none"}, "full, grouped, diagonal"),
        ({"coupling": "grouped"}, "give groups"),
        ({"groups": 2}, "give groups"),
        ({"coupling": "grouped", "groups": 3}, "cannot be divided into 3 groups"),
        ({"spacing": 0.0}, "spacing"),
    ],
)
def test_wrong_settings_are_refused(settings, fix):
    with pytest.raises(ValueError, match=fix):
        CorrelatedLaplace(4, **settings)


def test_a_wrong_field_is_refused():
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\)"):
        CorrelatedLaplace(4).residual(torch.randn(1, 3, 4, 4))
    assert "groups=1" in repr(CorrelatedLaplace(4))
