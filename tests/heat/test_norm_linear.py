"""FINOLA's law: the steps it states, fields that grow from a vector or a quarter, and what a flip does."""

import pytest
import torch
import torch.nn.functional as F

from heatssl.heat import NormLinear, normalise_channels


@pytest.fixture
def law() -> NormLinear:
    torch.manual_seed(0)
    return NormLinear(6, scale=0.5).double()


@pytest.fixture
def field() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, 3, 4, dtype=torch.float64)


def step(z: torch.Tensor, matrix: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """One step, from the source's equations, with torch's own layer norm."""
    rows = F.layer_norm(z.permute(0, 2, 3, 1), z.shape[1:2], eps=1e-6)
    return z + sign * (rows @ matrix.T).permute(0, 3, 1, 2)


def test_normalisation_is_layer_norm_over_channels(field):
    expected = F.layer_norm(field.permute(0, 2, 3, 1), (6,), eps=1e-6).permute(0, 3, 1, 2)
    assert torch.allclose(normalise_channels(field), expected)
    assert torch.isfinite(normalise_channels(torch.ones(1, 6, 2, 2))).all()


def test_moves_are_the_steps_of_the_source(law, field):
    assert torch.allclose(law.propagate(field, dx=2), step(step(field, law.A), law.A))
    assert torch.allclose(law.propagate(field, dy=-1), step(field, law.B, -1))
    assert torch.equal(law.propagate(field), field)
    x_first, y_first = step(step(field, law.A), law.B), step(step(field, law.B), law.A)
    assert not torch.allclose(x_first, y_first, atol=1e-3)
    assert torch.allclose(law.propagate(field, dx=1, dy=1), (x_first + y_first) / 2)


def test_steps_of_first_order(law, field):
    """Halving A twice over twice the steps divides the error against a fine solution by two."""

    def error(steps: int) -> float:
        coarse, fine = NormLinear(6).double(), NormLinear(6).double()
        coarse.A.data.copy_(law.A / steps)
        fine.A.data.copy_(law.A / 256)
        return (coarse.propagate(field, dx=steps) - fine.propagate(field, dx=256)).norm().item()

    assert error(8) / error(16) == pytest.approx(2, rel=0.15)


def test_fields_grow_at_most_linearly(law, field):
    far = law.propagate(field, dx=100)
    longest_step = torch.linalg.matrix_norm(law.A, 2) * 6**0.5
    assert bool(((far - field).norm(dim=1) <= 100 * longest_step).all())


@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 4), (1, 3)])
def test_expand_grows_from_the_centre(law, height, width):
    vector = torch.randn(2, 6, dtype=torch.float64)
    grown = law.expand(vector, height, width)
    row, column = height // 2, width // 2
    assert grown.shape == (2, 6, height, width)
    seed = vector[:, :, None, None]
    for y, x in [(row, column), (0, 0), (height - 1, width - 1), (row, width - 1), (0, column)]:
        expected = law.propagate(seed, dx=x - column, dy=y - row)
        assert torch.allclose(grown[..., y : y + 1, x : x + 1], expected)


def test_paths_are_grown_alike_and_added(law):
    paths = torch.randn(2, 3, 6, dtype=torch.float64)
    each = sum(law.expand(paths[:, m], 4, 5) for m in range(3))
    assert torch.allclose(law.expand(paths, 4, 5), each)


def test_a_quarter_grows_element_by_element_from_its_edges(law, field):
    grown = law.extend(field, right=4, down=3)
    assert grown.shape == (2, 6, 6, 8)
    assert torch.equal(grown[..., :3, :4], field)
    assert torch.allclose(grown[..., :3, 4:5], step(field[..., -1:], law.A))
    assert torch.allclose(grown[..., 5:, :4], step(step(step(field[..., -1:, :], law.B), law.B), law.B))
    corner = field[..., -1:, -1:]
    assert torch.allclose(grown[..., 3:4, 4:5], law.propagate(corner, dx=1, dy=1))
    other = law.extend(field, left=2, up=1)
    assert torch.equal(other[..., 1:, 2:], field)
    assert torch.allclose(other[..., 1:, 0:1], step(step(field[..., :1], law.A, -1), law.A, -1))


def test_residual_vanishes_on_what_grew_to_the_right_and_tells_what_did_not(law, field):
    row = law.extend(torch.randn(2, 6, 1, 1, dtype=torch.float64), right=5)
    column = law.extend(torch.randn(2, 6, 1, 1, dtype=torch.float64), down=4)
    assert law.residual(row).shape == (2, 1, 6)
    assert law.residual(row).max() < 1e-25
    assert law.residual(column).max() < 1e-25
    error_x = field[..., 1:] - step(field[..., :-1], law.A)
    error_y = field[..., 1:, :] - step(field[..., :-1, :], law.B)
    expected = error_x[1, :, 1, 2].square().mean() + error_y[1, :, 1, 2].square().mean()
    assert law.residual(field)[1, 1, 2].item() == pytest.approx(expected.item())


def test_transposing_swaps_a_and_b_and_a_flip_changes_a_sign(law):
    seed = torch.randn(1, 6, dtype=torch.float64)
    swapped, flipped = NormLinear(6).double(), NormLinear(6).double()
    with torch.no_grad():
        swapped.A.copy_(law.B), swapped.B.copy_(law.A)
        flipped.A.copy_(-law.A), flipped.B.copy_(law.B)
    grown = law.expand(seed, 5, 5)
    assert torch.allclose(swapped.expand(seed, 5, 5), grown.transpose(2, 3))
    assert torch.allclose(flipped.expand(seed, 5, 5), grown.flip(3))
    assert torch.allclose(swapped.residual(grown.transpose(2, 3)), law.residual(grown).transpose(1, 2))


def test_gradients_reach_field_and_law():
    torch.manual_seed(0)
    law = NormLinear(3, scale=0.5).double()
    field = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, *_: (law.propagate(z, dx=2, dy=-1), law.residual(z), law.extend(z, left=1, down=1)),
        (field, law.A, law.B),
    )


def test_bf16_stays_close_to_float64(law, field):
    exact = law.propagate(field, dx=3, dy=2)
    low = law.float().propagate(field.bfloat16(), dx=3, dy=2).double()
    assert (low - exact).norm() / exact.norm() < 0.02


def test_what_cannot_work_is_refused(law, field):
    with pytest.raises(ValueError, match="at least 2"):
        NormLinear(1)
    with pytest.raises(ValueError, match="positive number"):
        NormLinear(0)
    with pytest.raises(ValueError, match="whole patches"):
        law.propagate(field, dx=0.5)
    with pytest.raises(ValueError, match=r"\(B, 6, H, W\)"):
        law.expand(torch.randn(2, 5, dtype=torch.float64), 3, 3)
    assert "channels=6" in repr(law)
