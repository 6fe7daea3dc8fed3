"""Controls share the interface of a first-order law, and are what they say they are."""

import pytest
import torch

from heatssl.heat import Copy, FirstOrder, FreeLinear, Law, MultilayerPerceptron, NormLinear, Propagator

OFFSETS = [(1, 0), (0, 1), (-2, 0), (2, -1)]


@pytest.fixture
def field() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 4, 5, dtype=torch.float64)


def laws() -> list[Propagator]:
    torch.manual_seed(0)
    made = [Copy(4), FreeLinear(4, OFFSETS), MultilayerPerceptron(4, hidden=8, depth=2)]
    return [law.double() for law in (*made, NormLinear(4), FirstOrder(4), FirstOrder(4, commuting=False))]


@pytest.mark.parametrize("k", range(6))
def test_all_share_one_interface(k, field):
    law = laws()[k]
    basis = law.basis()
    zeta = law.enter(field, basis)
    assert torch.allclose(law.leave(zeta, basis), field)
    assert torch.allclose(law.leave(law.move(zeta, 2, -1), basis), law.propagate(field, 2, -1))
    assert torch.allclose(law.leave(law.enter(field)), field)
    assert torch.equal(law.propagate(field), law.leave(law.enter(field)))
    assert law(field).shape == (2, 4, 5)
    assert bool((law.residual(field) > 0).any())
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\)"):
        law.residual(field[:, :3])
    assert "channels=4" in repr(law)


@pytest.mark.parametrize("k", range(1, 6))
def test_moves_start_near_a_copy_and_gradients_reach_every_parameter(k, field):
    law = laws()[k]
    moved = law.propagate(field, 1, 0)
    assert 0 < (moved - field).norm() < 0.6 * field.norm()
    total = sum(law.propagate(field, *offset).square().sum() for offset in OFFSETS)
    total.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in law.parameters())


def test_copy_copies_and_only_constants_obey(field):
    law = Copy(4)
    assert law.propagate(field, 3.5, -2) is field
    assert list(law.parameters()) == []
    assert law.residual(torch.ones(1, 4, 3, 3)).max() == 0
    expected = (field[0, :, 1, 3] - field[0, :, 1, 2]).square().mean()
    expected += (field[0, :, 2, 2] - field[0, :, 1, 2]).square().mean()
    assert law.residual(field)[0, 1, 2].item() == pytest.approx(expected.item())


def test_free_linear_has_one_matrix_per_offset(field):
    law = FreeLinear(4, [*map(list, OFFSETS), (0, 0), (1, 0)]).double()  # lists, as YAML has them
    assert sum(p.numel() for p in law.parameters()) == len(OFFSETS) * 4 * 4
    seen = [law.propagate(field, *offset) for offset in law.offsets]
    for moved, offset in zip(seen, law.offsets, strict=True):
        assert torch.allclose(moved, torch.einsum("dc,bchw->bdhw", law.matrix(offset), field))
    assert len({round(moved.sum().item(), 9) for moved in seen}) == len(OFFSETS)


def test_the_residual_of_free_linear_is_the_mean_over_the_offsets_that_lead_there(field):
    law = FreeLinear(4, [(2, -1), (0, 1), (9, 9)]).double()
    y, x = 2, 3  # from (1, 3) and from (3, 1)
    by_hand = [
        (field[0, :, y, x] - law.propagate(field, *offset)[0, :, y - offset[1], x - offset[0]]).square().mean()
        for offset in [(2, -1), (0, 1)]
    ]
    residual = law.residual(field)
    assert residual[0, y, x].item() == pytest.approx((sum(by_hand) / 2).item())
    assert law.loss(field).item() == pytest.approx(residual.mean().item())
    assert residual[0, 0, 0] == 0  # no offset leads here from within the field
    pairs = FreeLinear(4, [(1, 0)]).double()
    z = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    assert pairs.residual(torch.cat([z, pairs.propagate(z, 1, 0)], dim=3)).max() < 1e-28


def test_the_perceptron_is_told_the_offset(field):
    law = MultilayerPerceptron(4, depth=1, reach=2.0).double()
    assert sum(p.numel() for p in law.parameters()) == 2 * 4 * 4 + 4 + 4 + 2 * 4
    moves = [law.propagate(field, dx, dy) for dx, dy in [(1, 0), (0, 1), (1, 1), (-1, 0), (0.5, 2.5)]]
    for i, one in enumerate(moves):
        for other in moves[i + 1 :]:
            assert not torch.allclose(one, other)


def test_the_perceptron_moves_each_vector_by_an_offset_of_its_own(field):
    law = MultilayerPerceptron(4, hidden=8, reach=2.0).double()
    vectors, offsets = field[..., 0].movedim(1, -1), torch.tensor([[1, 0], [0, 1], [-2, 3], [0.5, 2.5]])
    moved = law.move_each(vectors[:, :1], offsets)  # one vector to several places
    for place, offset in enumerate(offsets.tolist()):
        torch.testing.assert_close(moved[:, place], law.propagate(field, *offset)[:, :, 0, 0])


@pytest.mark.parametrize("law", [FreeLinear(2, [(1, 0), (2, -1)]), MultilayerPerceptron(2, hidden=3, depth=2)])
def test_gradients(law):
    law = law.double()
    z = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    both = (z, *law.parameters())
    assert torch.autograd.gradcheck(lambda z, *_: (law.propagate(z, 2, -1), law.residual(z)), both)


def test_a_law_must_say_what_it_asks(field):
    with pytest.raises(NotImplementedError):
        Law().residual(field)
    with pytest.raises(NotImplementedError):
        Propagator(4).propagate(field, 1, 0)


def test_what_cannot_work_is_refused(field):
    with pytest.raises(ValueError, match=r"offsets are .*\(1, 0\)"):
        FreeLinear(4, OFFSETS).double().propagate(field, 1, 1)
    with pytest.raises(ValueError, match="needs offsets"):
        FreeLinear(4, [(0, 0)])
    for settings in ({"hidden": 0}, {"depth": 0}, {"reach": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            MultilayerPerceptron(4, **settings)
    with pytest.raises(ValueError, match="positive number"):
        Copy(0)


def test_a_network_moves_fields_of_half_precision():
    law = MultilayerPerceptron(8, reach=2)
    field = torch.randn(2, 8, 4, 4)
    moved = law.propagate(field.bfloat16(), 1, 0)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), law.propagate(field, 1, 0), atol=5e-2, rtol=5e-2)


def test_free_matrices_move_by_whole_patches():
    with pytest.raises(ValueError, match="whole patches"):
        FreeLinear(3, [(0.5, 0)])
