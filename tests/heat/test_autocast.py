"""Laws under autocast: what a field of float32 is said to be must not change by where it is asked."""

import pytest
import torch

from heatssl.heat import (
    CorrelatedLaplace,
    FirstOrder,
    FreeLinear,
    HiddenWaves,
    Laplace,
    MultilayerPerceptron,
    NormLinear,
    Transport,
    commutator,
    relative_residual,
)
from heatssl.ops import depthwise_stencil, fill_quarters_full, residual_loss, residual_loss_and_map

LAWS = {
    "laplace": Laplace,
    "correlated_laplace": lambda: CorrelatedLaplace(8),
    "first_order": lambda: FirstOrder(8),
    "first_order, full": lambda: FirstOrder(8, commuting=False),
    "norm_linear": lambda: NormLinear(8),
    "hidden_waves": lambda: HiddenWaves(8),
    "free_linear": lambda: FreeLinear(8, [(1, 0), (0, 1)]),
    "multilayer_perceptron": lambda: MultilayerPerceptron(8),
}


@pytest.fixture
def field() -> torch.Tensor:
    """Smooth, with a large constant: differences of neighbours cancel."""
    x, y = torch.meshgrid(torch.linspace(0, 1, 7), torch.linspace(0, 1, 6), indexing="xy")
    waves = torch.stack([torch.sin(k * x + y) for k in range(8)])
    return 3 + 0.05 * waves.expand(2, -1, -1, -1)


def both(function):
    """Without autocast, and within it."""
    torch.manual_seed(0)
    without = function()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        return without, function()


@pytest.mark.parametrize("name", LAWS)
def test_a_residual_is_the_same(name, field):
    torch.manual_seed(0)
    law = LAWS[name]()
    for of in (law.residual, law.loss):
        without, within = both(lambda of=of: of(field))
        assert within.dtype == torch.float32
        torch.testing.assert_close(within, without, rtol=1e-5, atol=1e-9)


def test_a_stencil_and_its_loss_are_the_same(field):
    stencil = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    for function in (
        lambda: depthwise_stencil(field, stencil, "replicate"),
        lambda: residual_loss(field, stencil, backend="eager"),
        lambda: residual_loss_and_map(field, stencil)[1],
    ):
        without, within = both(function)
        torch.testing.assert_close(within, without, rtol=1e-5, atol=1e-9)


def test_powers_of_steps_near_one_do_not_round_to_one():
    """bfloat16 has no number between 1 and 1.0078: ten steps of 1.001 would be none."""
    law = FirstOrder(4, commuting=False)
    torch.nn.init.eye_(law.matrix_a).data.mul_(0.001)
    torch.nn.init.zeros_(law.matrix_b)
    quarter = torch.ones(1, 4, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        whole = fill_quarters_full(quarter, torch.tensor([0]), torch.eye(4) + law.matrix_a, torch.eye(4))
        moved = law.propagate(quarter, dx=10)
    for right in (whole[0, :, :, 10:], moved):
        assert right.float().mean().item() == pytest.approx(1.001**10, abs=0.004), "within bfloat16's own rounding"


def test_matrices_that_commute_do_so():
    law = FirstOrder(16)
    without, within = both(lambda: commutator(law.A, law.B))
    assert without < 1e-5
    assert within < 1e-5


def test_turns_are_not_rounded():
    """An angle in bfloat16 is a step function of the position."""
    law, values = Transport(8), torch.randn(1, 2, 8)
    positions = torch.tensor([[[0.0, 0.0], [31.0, 29.0]]])
    without, within = both(lambda: law.to_rest(values, positions))
    torch.testing.assert_close(within, without)


@pytest.mark.parametrize("law", [Laplace(), CorrelatedLaplace(8), FirstOrder(8, commuting=False)])
def test_the_relative_residual_of_a_large_field_in_float16(law) -> None:
    """Squares of 300 are more than float16 has: it said 0, a field that obeys the law."""
    torch.manual_seed(0)
    field = torch.randn(2, 8, 6, 6)
    expected = relative_residual(law, field)
    torch.testing.assert_close(relative_residual(law, (300 * field).half()), expected, rtol=0.01, atol=0)
