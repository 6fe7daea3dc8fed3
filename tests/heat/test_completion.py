"""If these fail, hidden features are not what heat flowing from the visible ones would make of them."""

import math

import pytest
import torch
from torch import Tensor

from heatssl.heat import (
    CorrelatedLaplace,
    Transport,
    complete,
    coordinates,
    harmonic_weights,
    heat_kernel_weights,
    laplacian,
)

GRID = (5, 7)
EVERY = torch.arange(35)[None]


@pytest.fixture
def visible() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(35, generator=generator)[:9] for _ in range(3)])


def every_position(batch: int) -> Tensor:
    return EVERY.expand(batch, -1)


def test_coordinates_are_x_then_y() -> None:
    assert coordinates(torch.tensor([0, 6, 7, 34]), 7).tolist() == [[0, 0], [6, 0], [0, 1], [6, 4]]


@pytest.mark.parametrize("reading", ["kernel", "harmonic"])
def test_a_completed_value_is_a_mean_of_the_visible_ones(visible: Tensor, reading: str) -> None:
    parameters = torch.tensor([0.3, 1.0, 4.0])
    if reading == "kernel":
        weights = heat_kernel_weights(coordinates(visible, 7), coordinates(every_position(3), 7), parameters)
    else:
        weights = harmonic_weights(visible, every_position(3), GRID, parameters)
    assert weights.shape == (3, 3, 35, 9)
    assert weights.min() > -1e-6
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(3, 3, 35))


def test_the_steady_state_obeys_laplace_where_hidden_and_keeps_what_is_visible(visible: Tensor) -> None:
    weights = harmonic_weights(visible, every_position(3), GRID, torch.ones(1, dtype=torch.float64))
    values = torch.randn(3, 9, 4, dtype=torch.float64)
    filled = complete(values, weights)
    torch.testing.assert_close(filled.gather(1, visible[..., None].expand(-1, -1, 4)), values)
    field = filled.transpose(1, 2).unflatten(2, GRID)
    curvature = laplacian(field, boundary="replicate").flatten(2).transpose(1, 2)
    hidden = torch.ones(3, 35, dtype=torch.bool).scatter(1, visible, False)
    assert curvature[hidden].abs().max() < 1e-12
    assert curvature[~hidden].abs().max() > 0.1  # heat enters where it is held


@pytest.mark.parametrize("number", [1, 9, 34, 35])
@pytest.mark.parametrize("strength", [1.0, 0.2, 5.0 - 3.0j])
def test_sources_where_it_is_held_are_the_dirichlet_problem_written_out(number: int, strength: complex) -> None:
    """All 35 equations at once: a held position keeps its value, of every other the five points sum to nothing."""
    held = torch.randperm(35, generator=torch.Generator().manual_seed(number))[:number]
    steps_y, steps_x = (torch.diff(torch.eye(side, dtype=torch.complex128), dim=0) for side in GRID)
    along_y = torch.kron(steps_y.T @ steps_y, torch.eye(7))
    along_x = torch.kron(torch.eye(5), steps_x.T @ steps_x)
    system = along_x + strength * along_y
    system[held] = torch.eye(35, dtype=system.dtype)[held]
    wanted = torch.linalg.solve(system, torch.eye(35, dtype=system.dtype)[:, held])
    weights = harmonic_weights(held[None], EVERY, GRID, torch.tensor([strength], dtype=system.dtype))
    torch.testing.assert_close(weights[0, 0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 6), (6, 1)])
def test_a_line_is_filled_in_by_straight_lines(grid: tuple[int, int]) -> None:
    weights = harmonic_weights(torch.tensor([[1, 4]]), torch.arange(6)[None], grid, torch.ones(1))
    torch.testing.assert_close(weights[0, 0, :, 1], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))


def test_anisotropy_is_the_coupling_of_z_yy(visible: Tensor) -> None:
    strength = torch.tensor([3.0], dtype=torch.float64)
    filled = complete(
        torch.eye(9, dtype=torch.float64).repeat(3, 1, 1)[..., :8],
        harmonic_weights(visible, every_position(3), GRID, strength),
    )
    field = torch.nn.functional.pad(filled.transpose(1, 2).unflatten(2, GRID), (1, 1, 1, 1), mode="replicate")
    z_xx = field[..., 1:-1, 2:] + field[..., 1:-1, :-2] - 2 * field[..., 1:-1, 1:-1]
    z_yy = field[..., 2:, 1:-1] + field[..., :-2, 1:-1] - 2 * field[..., 1:-1, 1:-1]
    hidden = torch.ones(3, 35, dtype=torch.bool).scatter(1, visible, False).unflatten(1, GRID)
    assert (z_xx + 3 * z_yy).movedim(1, -1)[hidden].abs().max() < 1e-12


def test_a_linear_ramp_between_two_held_columns_is_the_steady_state() -> None:
    held = torch.tensor([[row * 7 + column for row in range(5) for column in (0, 6)]])
    ramp = coordinates(held, 7)[..., :1].double().expand(-1, -1, 2) / 6
    filled = complete(ramp, harmonic_weights(held, EVERY, GRID, torch.ones(1, dtype=torch.float64)))
    torch.testing.assert_close(filled[0, :, 0], coordinates(EVERY[0], 7)[:, 0].double() / 6)


def test_a_short_time_leaves_the_nearest_and_a_long_one_the_mean(visible: Tensor) -> None:
    places = coordinates(visible, 7)
    short, long = heat_kernel_weights(places, places, torch.tensor([1e-3, 1e6]))[0]
    torch.testing.assert_close(short, torch.eye(9))
    torch.testing.assert_close(long, torch.full((9, 9), 1 / 9), atol=1e-4, rtol=0)


def test_kernel_ratios_are_those_of_the_heat_kernel() -> None:
    time = 1.7
    weights = heat_kernel_weights(
        torch.tensor([[[0.0, 0.0], [3.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([time])
    )

    def kernel(square_distance: float) -> float:
        return math.exp(-square_distance / (4 * time)) / (4 * math.pi * time)

    assert (weights[0, 0, 0, 0] / weights[0, 0, 0, 1]).item() == pytest.approx(kernel(1) / kernel(5), rel=1e-5)


def test_groups_take_their_own_weights() -> None:
    weights = torch.stack([torch.eye(2), torch.eye(2).flip(0)])[None]  # the second group swaps the two positions
    values = torch.arange(16.0).view(1, 2, 8)
    filled = complete(values, weights)
    first = torch.tensor([0, 1, 4, 5])
    assert torch.equal(filled[..., first], values[..., first])
    assert torch.equal(filled[..., first + 2], values.flip(1)[..., first + 2])
    with pytest.raises(ValueError, match="8 channels"):
        complete(values, torch.ones(1, 3, 2, 2))


def test_a_field_at_rest_is_completed_exactly_by_transport(visible: Tensor) -> None:
    """A solution of z_x = A z, z_y = B z is recovered at every hidden position, whatever the weights."""
    torch.manual_seed(0)
    transport = Transport(8).double()
    with torch.no_grad():
        transport.raw_decay.normal_()
    rest = torch.randn(3, 1, 8, dtype=torch.float64).expand(-1, 35, -1)
    everywhere = coordinates(every_position(3), 7).double()
    solution = transport.from_rest(rest, everywhere)
    seen = solution.gather(1, visible[..., None].expand(-1, -1, 8))
    weights = heat_kernel_weights(coordinates(visible, 7), everywhere.float(), torch.tensor([0.5, 2.0])).double()
    at_rest = transport.to_rest(seen, coordinates(visible, 7).double())
    torch.testing.assert_close(
        transport.from_rest(complete(at_rest, weights), everywhere), solution, rtol=1e-4, atol=1e-5
    )
    assert (complete(seen, weights) - solution).abs().max() > 0.1  # without transport it is not


def test_transport_is_the_commuting_law() -> None:
    """A move by (dx, dy) multiplies by one factor, whatever the path: the law's own property."""
    transport = Transport(6)
    values = torch.randn(2, 1, 6)
    one, two = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, -2.0]]])
    torch.testing.assert_close(
        transport.from_rest(transport.from_rest(values, one), two), transport.from_rest(values, one + two)
    )
    torch.testing.assert_close(transport.to_rest(transport.from_rest(values, one), one), values)


def test_gradients(visible: Tensor) -> None:
    parameters = torch.tensor([0.7, 1.9], dtype=torch.float64, requires_grad=True)
    queried = every_position(3)[:, ::4]
    places, asked = coordinates(visible, 7).double(), coordinates(queried, 7).double()
    assert torch.autograd.gradcheck(lambda t: heat_kernel_weights(places, asked, t), parameters)
    assert torch.autograd.gradcheck(lambda s: harmonic_weights(visible, queried, GRID, s), parameters)


def test_transport_needs_pairs_of_channels() -> None:
    with pytest.raises(ValueError, match="even"):
        Transport(5)
    assert "channels=6" in repr(Transport(6))


@pytest.mark.parametrize("anisotropy", [1e-6, 1e-4, 1e4, 1e6])
def test_strong_anisotropy_keeps_harmonic_weights_a_mean_in_float32(anisotropy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    held = torch.stack([torch.randperm(64, generator=generator)[:16] for _ in range(8)])
    everywhere = torch.arange(64).expand(8, -1)
    weights = harmonic_weights(held, everywhere, (8, 8), torch.tensor([anisotropy]))
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(8, 1, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_flip_of_what_is_visible_flips_what_is_filled_in(visible: Tensor, axis: int) -> None:
    mirror = torch.arange(35).view(GRID).flip(axis).flatten()  # where each position comes to lie
    strength = torch.tensor([0.3, 4.0], dtype=torch.float64)
    there = harmonic_weights(mirror[visible], mirror[every_position(3)], GRID, strength)
    torch.testing.assert_close(there, harmonic_weights(visible, every_position(3), GRID, strength))
    assert (there - harmonic_weights(mirror[visible], every_position(3), GRID, strength)).abs().max() > 0.1


def test_transposition_takes_the_inverse_anisotropy(visible: Tensor) -> None:
    turned = torch.arange(35).view(7, 5).T.flatten()  # row-major indices of a (7, 5) grid
    strength = torch.tensor([0.25, 4.0], dtype=torch.float64)
    here = harmonic_weights(visible, every_position(3), GRID, strength)
    there = harmonic_weights(turned[visible], turned[every_position(3)], GRID[::-1], 1 / strength)
    torch.testing.assert_close(there, here)


def test_transport_turns_with_a_flip_and_a_transposition() -> None:
    """Mirrored places and mirrored turns are the same; x and y change places with their turns."""
    transport, flipped, turned = (Transport(6).double() for _ in range(3))
    values, places = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        transport.raw_decay.normal_()
        for name, parameter in transport.named_parameters():
            getattr(flipped, name).copy_(parameter * torch.tensor([[-1.0], [1.0]]))
            getattr(turned, name).copy_(parameter.flip(0))
    moved = transport.from_rest(values, places)
    torch.testing.assert_close(flipped.from_rest(values, places * torch.tensor([-1.0, 1.0])), moved)
    torch.testing.assert_close(turned.from_rest(values, places.flip(2)), moved)


def test_eigenvalues_of_s_solve_the_correlated_law_where_hidden(visible: Tensor) -> None:
    """S a full matrix with complex eigenvalues: in its eigenbasis each channel is a problem of its own."""
    generator = torch.Generator().manual_seed(1)
    law = CorrelatedLaplace(4, boundary="replicate").double()
    with torch.no_grad():
        law.deviation.copy_(torch.randn(4, 4, generator=generator, dtype=torch.float64) / 2)
    eigenvalues, basis = torch.linalg.eig(law.S)
    assert (eigenvalues.imag.abs() > 0.1).any(), "channels turn into each other"
    values = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    own = values.to(basis.dtype) @ torch.linalg.inv(basis).T
    filled = complete(
        torch.cat([own.real, own.imag], dim=2), harmonic_weights(visible, every_position(3), GRID, eigenvalues)
    )
    field = torch.complex(*filled.chunk(2, dim=2)) @ basis.T
    assert field.imag.abs().max() < 1e-12
    torch.testing.assert_close(field.real.gather(1, visible[..., None].expand(-1, -1, 4)), values)
    hidden = torch.ones(3, 35, dtype=torch.bool).scatter(1, visible, False).unflatten(1, GRID)
    residual = law.residual(field.real.transpose(1, 2).unflatten(2, GRID))
    assert residual[hidden].max() < 1e-20
    assert residual[~hidden].max() > 0.01


def test_complex_weights_of_real_anisotropies_are_the_real_ones(visible: Tensor) -> None:
    strength = torch.tensor([0.3, 4.0])
    values = torch.randn(3, 9, 8)
    real = harmonic_weights(visible, every_position(3), GRID, strength)
    same = harmonic_weights(visible, every_position(3), GRID, strength.to(torch.complex64))
    assert same.dtype == torch.complex64
    torch.testing.assert_close(complete(values, same), complete(values, real))


def test_gradients_of_complex_anisotropies(visible: Tensor) -> None:
    given = torch.tensor([0.7 + 0.9j, 1.9 - 2.0j], requires_grad=True, dtype=torch.complex128)
    queried = every_position(3)[:, ::4]
    assert torch.autograd.gradcheck(lambda s: harmonic_weights(visible, queried, GRID, s), given)
    weights = harmonic_weights(visible, queried, GRID, given.detach())
    torch.testing.assert_close(weights.sum(dim=3), torch.ones_like(weights[..., 0]))
