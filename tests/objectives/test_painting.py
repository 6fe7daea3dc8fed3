"""What a mean alone can say of a picture, with a law to carry it to the positions and without one."""

import pytest
import torch

from heatssl.objectives.painting import RestPainter, centred_positions

GRID = (3, 4)
EVERYWHERE = torch.arange(12).expand(5, -1)


def painter(law: str, **settings: int) -> RestPainter:
    torch.manual_seed(0)
    given = {"features": 6, "channels": 8, "grid": GRID, "painter_width": 16, "outputs": 2} | settings
    return RestPainter(**given, law=law)


@pytest.mark.parametrize("law", ["commuting", "table", "mlp", "free", "copy"])
def test_patches_are_those_asked_for_in_that_order(law):
    paint, means = painter(law), torch.randn(5, 6)
    whole = paint(means, EVERYWHERE)
    assert whole.shape == (5, 12, 2)
    some = torch.tensor([[7, 2, 7], [0, 11, 3], [1, 2, 3], [4, 4, 5], [9, 8, 6]])
    torch.testing.assert_close(paint(means, some), torch.take_along_dim(whole, some[..., None], dim=1))
    whole.sum().backward()
    assert all(parameter.grad is not None for parameter in paint.parameters())
    moved = (whole[:, 0] - whole[:, 5]).abs().max()
    assert moved == 0 if law == "copy" else moved > 1e-3, "a copy says the same everywhere"


def test_the_field_of_a_mean_obeys_the_law():
    """A step to the right is the same turn everywhere, one down another, and they commute."""
    paint = painter("commuting")
    torch.nn.init.normal_(paint.transport.raw_decay)
    rest = torch.randn(5, 8)
    field = torch.complex(*paint.everywhere(rest, EVERYWHERE).chunk(2, dim=2)).unflatten(1, GRID)
    for axis, step in ((2, 0), (1, 1)):
        first, second = (field.narrow(axis, start, field.shape[axis] - 1) for start in (0, 1))
        decay = paint.transport.max_decay * torch.tanh(paint.transport.raw_decay[step])
        torch.testing.assert_close(second, first * torch.exp(torch.complex(decay, paint.transport.rotation[step])))


def test_the_middle_of_the_grid_is_at_rest():
    assert centred_positions(torch.arange(12), GRID).mean(dim=0).tolist() == [0.0, 0.0]
    assert centred_positions(torch.tensor([0, 3, 8]), GRID).tolist() == [[-1.5, -1.0], [1.5, -1.0], [-1.5, 1.0]]


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match="commuting, table, mlp, free, copy"):
        painter("laplace")
