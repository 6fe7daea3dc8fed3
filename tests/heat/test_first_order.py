"""The first-order law against matrix powers and exponentials, and the properties a user relies on."""

import math

import pytest
import torch

from heatssl.heat import FirstOrder, commutator, spectral_radius


@pytest.fixture
def field() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, 4, 5, dtype=torch.float64)


def random_law(commuting: bool, channels: int = 6) -> FirstOrder:
    """A law far from its near-identity start, so that no test passes by moving nothing."""
    torch.manual_seed(0)
    law = FirstOrder(channels, commuting=commuting).double()
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return law


def with_matrices(a: torch.Tensor, b: torch.Tensor) -> FirstOrder:
    law = FirstOrder(a.shape[0], commuting=False).double()
    with torch.no_grad():
        law.matrix_a.copy_(a)
        law.matrix_b.copy_(b)
    return law


def mix(matrix: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    return torch.einsum("dc,bchw->bdhw", matrix, field)


def power(matrix: torch.Tensor, n: int) -> torch.Tensor:
    return torch.linalg.matrix_power(torch.eye(len(matrix), dtype=matrix.dtype) + matrix, n)


@pytest.mark.parametrize("commuting", [True, False])
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, 1), (3, 2), (-2, 0), (-1, -4), (7, -7)])
def test_propagate_is_the_power_of_the_step(commuting, dx, dy, field):
    law = random_law(commuting)
    expected = mix(power(law.B, dy) @ power(law.A, dx), field)
    assert torch.allclose(law.propagate(field, dx=dx, dy=dy), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dx", "dy"), [(0.5, 0), (0, -0.25), (1.75, -2.5), (3, 1)])
def test_commuting_propagate_is_the_matrix_exponential(dx, dy, field):
    """A move by (dx, dy) is exp(dx G_x + dy G_y) with G the logarithm of the step, rebuilt here from its definition."""
    law = random_law(commuting=True)
    basis = law.basis()
    decay, rotation = law.generators()

    def logarithm(axis: int) -> torch.Tensor:
        d, r = torch.diag(decay[axis]), torch.diag(rotation[axis])
        return basis @ torch.cat([torch.cat([d, -r], 1), torch.cat([r, d], 1)]) @ basis.T

    move = torch.linalg.matrix_exp(dx * logarithm(0) + dy * logarithm(1))
    assert torch.allclose(law.propagate(field, dx=dx, dy=dy), mix(move, field), atol=1e-12)


def test_full_matrices_that_commute_are_independent_of_the_path(field):
    """Polynomials in one random matrix commute: then x first or y first is the same."""
    torch.manual_seed(2)
    m = 0.2 * torch.randn(6, 6, dtype=torch.float64)
    law = with_matrices(0.5 * m + 0.1 * m @ m, m - 0.3 * m @ m @ m)
    assert commutator(law.A, law.B) < 1e-14
    x_first = law.propagate(law.propagate(field, dx=3), dy=2)
    y_first = law.propagate(law.propagate(field, dy=2), dx=3)
    assert torch.allclose(x_first, y_first)
    assert torch.allclose(x_first, law.propagate(field, dx=3, dy=2))


def test_full_matrices_that_do_not_commute_depend_on_it(field):
    law = random_law(commuting=False)
    assert commutator(law.A, law.B) > 0.1
    x_first = law.propagate(law.propagate(field, dx=2), dy=2)
    y_first = law.propagate(law.propagate(field, dy=2), dx=2)
    assert not torch.allclose(x_first, y_first, atol=1e-3)


def test_commuting_moves_form_a_group(field):
    law = random_law(commuting=True)
    there_and_back = law.propagate(law.propagate(field, dx=2.3, dy=-1.1), dx=-2.3, dy=1.1)
    in_parts = law.propagate(law.propagate(field, dy=0.7), dx=1.4, dy=0.3)
    assert torch.allclose(there_and_back, field)
    assert torch.allclose(in_parts, law.propagate(field, dx=1.4, dy=1.0))
    assert commutator(law.A, law.B) < 1e-14


def test_commuting_form_is_stable_whatever_the_parameters():
    """No training step can make a step's eigenvalues leave exp(+-max_decay), nor the basis its orthogonality."""
    law = FirstOrder(8, commuting=True, max_decay=0.05).double()
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.copy_(30 * torch.randn_like(parameter))
    identity = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(law.basis() @ law.basis().T, identity, atol=1e-9)
    for matrix in (law.A, law.B):
        moduli = torch.linalg.eigvals(identity + matrix).abs()
        assert moduli.max() <= math.exp(0.05) + 1e-9
        assert moduli.min() >= math.exp(-0.05) - 1e-9


@pytest.mark.parametrize("commuting", [True, False])
def test_a_field_grown_by_the_law_has_no_residual(commuting):
    law = random_law(commuting)
    a, b = law.A, law.B
    if not commuting:
        law = with_matrices(a, 0.5 * a)
        a, b = law.A, law.B
    seed = torch.randn(3, 6, 1, 1, dtype=torch.float64)
    rows = [torch.cat([mix(power(b, y) @ power(a, x), seed) for x in range(5)], dim=3) for y in range(4)]
    grown = torch.cat(rows, dim=2)
    residual = law.residual(grown)
    assert residual.shape == (3, 4, 5)
    assert residual.max() < 1e-20


def test_residual_is_the_mean_square_of_the_step_errors(field):
    law = random_law(commuting=False)
    residual = law(field)
    error_x = field[..., 1:] - mix(power(law.A, 1), field[..., :-1])
    error_y = field[..., 1:, :] - mix(power(law.B, 1), field[..., :-1, :])
    expected = error_x[0, :, 2, 3].square().mean() + error_y[0, :, 2, 3].square().mean()
    assert residual[0, 2, 3].item() == pytest.approx(expected.item())
    edge = error_x[0, :, 2, -1].square().mean() + error_y[0, :, 2, 4].square().mean()
    assert residual[0, 2, 4].item() == pytest.approx(edge.item())  # the last column repeats the step that enters it


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1)])
def test_residual_of_thin_fields(shape):
    law = random_law(commuting=True)
    residual = law.residual(torch.randn(2, 6, *shape, dtype=torch.float64))
    assert residual.shape == (2, *shape)
    assert bool((residual > 0).all()) == (shape != (1, 1))


@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (4, 1), (1, 1)])
def test_the_loss_counts_each_step_once(shape):
    law = random_law(commuting=False)
    field = torch.randn(2, 6, *shape, dtype=torch.float64)
    error_x = field[..., 1:] - mix(power(law.A, 1), field[..., :-1])
    error_y = field[..., 1:, :] - mix(power(law.B, 1), field[..., :-1, :])
    expected = [error.square().mean().item() for error in (error_x, error_y) if error.numel()]
    assert law.loss(field).item() == pytest.approx(sum(expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_loss_of_a_flipped_field_is_the_same_where_steps_turn_alone(axis):
    """A step that only turns has an inverse as long as itself: back and forth, errors are the same."""
    law, flipped = random_law(commuting=True), random_law(commuting=True)
    with torch.no_grad():
        for turning in (law, flipped):
            turning.raw_decay.zero_()
        flipped.raw_rotation[axis].neg_()
    field = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(flipped.loss(field.flip(3 - axis)), law.loss(field))


def test_transposing_the_image_swaps_a_and_b(field):
    law = random_law(commuting=False)
    swapped = with_matrices(law.B, law.A)
    assert torch.allclose(swapped.residual(field.transpose(2, 3)), law.residual(field).transpose(1, 2))


def test_commuting_transposition_swaps_the_axes_and_a_flip_inverts_a_step(field):
    """What stands to the right of z stands to the left of it in the mirror: A's step becomes its inverse."""
    law, swapped, flipped = (random_law(commuting=True) for _ in range(3))
    with torch.no_grad():
        for parameter in (swapped.raw_decay, swapped.raw_rotation):
            parameter.copy_(parameter.flip(0))
        flipped.raw_decay[0].neg_()
        flipped.raw_rotation[0].neg_()
    identity = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(identity + flipped.A, torch.linalg.inv(identity + law.A))
    assert torch.allclose(swapped.residual(field.transpose(2, 3)), law.residual(field).transpose(1, 2))
    moved = law.propagate(field, dx=3, dy=-1)
    assert torch.allclose(swapped.propagate(field.transpose(2, 3), dx=-1, dy=3), moved.transpose(2, 3))
    assert torch.allclose(flipped.propagate(field.flip(3), dx=-3, dy=-1), moved.flip(3))


@pytest.mark.parametrize("commuting", [True, False])
def test_the_adjoint_of_a_move_is_the_transposed_matrix(commuting, field):
    law = random_law(commuting)
    z = field.clone().requires_grad_()
    weight = torch.randn_like(field)
    (adjoint,) = torch.autograd.grad((law.propagate(z, dx=2, dy=1) * weight).sum(), z)
    assert torch.allclose(adjoint, mix((power(law.B, 1) @ power(law.A, 2)).T, weight))


def test_many_moves_can_share_one_basis(field, monkeypatch):
    law = random_law(commuting=True)
    expected = [law.propagate(field, dx=dx) for dx in (1, 2.5)]
    basis = law.basis()
    monkeypatch.setattr(law, "basis", lambda: pytest.fail("the basis was computed again"))
    zeta = law.enter(field, basis)
    for dx, value in zip((1, 2.5), expected, strict=True):
        assert torch.allclose(law.leave(law.move(zeta, dx=dx), basis), value)


@pytest.mark.parametrize("commuting", [True, False])
def test_gradients_reach_field_and_law(commuting):
    law = random_law(commuting, channels=4)
    field = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = tuple(law.parameters())

    def both(z, *_):
        return law.propagate(z, dx=2, dy=-1), law.residual(z)

    assert torch.autograd.gradcheck(both, (field, *parameters))


def test_commutator_and_spectral_radius_in_closed_form():
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert commutator(a, b) == pytest.approx(math.sqrt(2))  # AB - BA = diag(1, -1), the largest ratio there is
    assert commutator(a, a) == 0
    assert commutator(torch.zeros(2, 2), b) == 0
    assert spectral_radius(torch.tensor([[0.0, -2.0], [2.0, 0.0]])) == pytest.approx(2.0)


@pytest.mark.parametrize("angle", [-0.1, 4.0])
def test_a_rotation_that_no_parameter_stands_for_is_refused(angle):
    with pytest.raises(ValueError, match=f"max_rotation={angle}"):
        FirstOrder(4, max_rotation=angle)


def test_bf16_stays_close_to_float64(field):
    law = random_law(commuting=True)
    exact = law.propagate(field, dx=3, dy=-2)
    low = law.float().propagate(field.bfloat16(), dx=3, dy=-2).double()
    assert (low - exact).norm() / exact.norm() < 0.02


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="even number"):
        FirstOrder(5)
    with pytest.raises(ValueError, match="positive number"):
        FirstOrder(0, commuting=False)
    with pytest.raises(ValueError, match="commuting=True"):
        FirstOrder(4, commuting=False).propagate(torch.randn(1, 4, 2, 2), dx=0.5)
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\)"):
        FirstOrder(4).propagate(torch.randn(1, 6, 2, 2), dx=1)
    assert "channels=4" in repr(FirstOrder(4))
