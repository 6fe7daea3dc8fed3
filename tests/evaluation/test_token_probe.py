"""These probes are what says that features hold more than their mean does: they must see it, and nothing else."""

import pytest
import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Block
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation import linear_probe, token_probe
from heatssl.evaluation.few_shot import few_shot_probe
from heatssl.evaluation.token_probe import HEADS, AttentivePooling, BlockPooling

Split = tuple[Tensor, Tensor, Tensor, Tensor]
CHANNELS = 16


def _maps(train: int = 600, test: int = 300, signal: float = 2.0, seed: int = 0) -> Split:
    """Each class has a channel of its own whose sign differs between positions, so that every mean is noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (train + test,), generator=generator)
    maps = torch.randn(train + test, CHANNELS, 16, generator=generator)
    half = torch.rand(train + test, 16, generator=generator).argsort(dim=1) < 8
    maps[torch.arange(train + test), labels] += signal * torch.where(half, 1.0, -1.0)
    maps = maps.unflatten(2, (4, 4))
    return maps[:train], labels[:train], maps[train:], labels[train:]


SHORT = {"learning_rates": (1e-2,), "epochs": 8, "batch_size": 32}
DATA = _maps()


def test_the_linear_probe_of_means_is_at_chance_where_the_others_read_the_class() -> None:
    train_maps, train_y, test_maps, test_y = DATA
    means = (train_maps.mean((2, 3)), train_y, test_maps.mean((2, 3)), test_y)
    assert linear_probe(*means).accuracy < 0.45
    for head in HEADS:
        assert token_probe(*DATA, head=head, **SHORT).accuracy > 0.9, head


@pytest.mark.parametrize("head", HEADS)
def test_nothing_is_found_where_nothing_is(head: str) -> None:
    train_maps, train_y, test_maps, test_y = DATA
    shuffled = train_y[torch.randperm(len(train_y), generator=torch.Generator().manual_seed(3))]
    assert token_probe(train_maps, shuffled, test_maps, test_y, head=head, **SHORT).accuracy < 0.45


@pytest.mark.parametrize("head", HEADS)
def test_deterministic_by_seed(head: str) -> None:
    short = {"epochs": 2, "batch_size": 64}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = token_probe(*DATA, head=head, seed=1, **short)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    second = token_probe(*DATA, head=head, seed=1, **short)
    third = token_probe(*DATA, head=head, seed=2, **short)
    assert _weights(first.probe).equal(_weights(second.probe))
    assert (first.accuracy, first.selected) == (second.accuracy, second.selected)
    assert not _weights(first.probe).equal(_weights(third.probe))


def _weights(probe: torch.nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in probe.parameters()])


@pytest.mark.parametrize("head", HEADS)
def test_the_order_of_positions_is_not_looked_at(head: str) -> None:
    """Where a token lies is for the features to say: otherwise the number would measure the probe's own positions."""
    train_maps, train_y, test_maps, test_y = DATA
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = [maps.flatten(2)[:, :, order].reshape(maps.shape) for maps in (train_maps, test_maps)]
    plain = token_probe(*DATA, head=head, **SHORT)
    other = token_probe(moved[0], train_y, moved[1], test_y, head=head, **SHORT)
    assert other.accuracy == pytest.approx(plain.accuracy, abs=0.01)
    with torch.no_grad():  # training amplifies the rounding of sums in another order
        torch.testing.assert_close(other.probe(moved[1]), plain.probe(test_maps), rtol=0.05, atol=0.05)


def test_attention_is_that_of_timm() -> None:
    torch.manual_seed(0)
    reference = AttentionPoolLatent(CHANNELS, out_features=0, num_heads=4)
    torch.nn.init.zeros_(reference.kv.bias)  # moves neither the softmax nor more than the classifier's bias
    pooling = AttentivePooling(CHANNELS, heads=4)
    keys, values = reference.kv.weight.view(2, 4, 4, CHANNELS)
    query = reference.q(reference.latent).view(4, 4)
    pooling.queries.data = reference.scale * torch.einsum("hd,hdc->hc", query, keys)
    pooling.values.data = values
    tokens = torch.randn(5, 9, CHANNELS)
    torch.testing.assert_close(pooling(tokens), reference(tokens))


@pytest.mark.parametrize("depth", [1, 4])
def test_the_blocks_are_those_of_timm(depth: int) -> None:
    torch.manual_seed(0)
    pooling, tokens = BlockPooling(CHANNELS, heads=4, depth=depth), torch.randn(5, 9, CHANNELS)
    torch.testing.assert_close(pooling(tokens), pooling.blocks(tokens).mean(dim=1))
    assert [type(block) for block in pooling.blocks] == [Block] * depth


def test_four_blocks_read_the_class_and_each_of_them_learns() -> None:
    found = token_probe(*DATA, head="block", depth=4, **SHORT)
    assert found.accuracy > 0.9
    start = token_probe(*DATA, head="block", depth=4, **SHORT | {"epochs": 1, "learning_rates": (1e-9,)})
    for one, other in zip(found.probe.pooling.blocks, start.probe.pooling.blocks, strict=True):
        assert not torch.allclose(_weights(one), _weights(other), atol=1e-3)


@pytest.mark.parametrize("head", HEADS)
def test_scale_constant_channels_and_half_precision_do_no_harm(head: str) -> None:
    train_maps, train_y, test_maps, test_y = DATA
    plain = token_probe(*DATA, head=head, **SHORT).accuracy

    def disguise(maps: Tensor) -> Tensor:
        maps = 3 + maps * torch.logspace(-1, 2, CHANNELS)[:, None, None]
        maps[:, -1] = 7
        return maps.half()

    found = token_probe(disguise(train_maps), train_y, disguise(test_maps), test_y, head=head, **SHORT)
    assert found.accuracy == pytest.approx(plain, abs=0.05)
    torch.testing.assert_close(found.probe.mean, disguise(train_maps).double().mean((0, 2, 3)).float())


def test_a_learning_rate_that_diverges_is_not_selected_and_test_selects_nothing() -> None:
    train_maps, train_y, test_maps, test_y = DATA
    rates = {"learning_rates": (1e3, 1e-2), "epochs": 8, "batch_size": 32}
    found = token_probe(*DATA, head="attentive", **rates)
    assert found.selected == 1e-2
    assert found.held_out_accuracy > 0.6
    other = token_probe(train_maps, train_y, test_maps.flip(1), test_y, head="attentive", **rates)
    assert (other.selected, other.held_out_accuracy) == (found.selected, found.held_out_accuracy)
    assert other.accuracy < found.accuracy


def test_bad_input_is_named() -> None:
    train_maps, train_y, test_maps, test_y = DATA
    broken = train_maps.clone()
    broken[0, 0, 1, 1] = float("nan")
    for message, arguments in {
        "train maps contain NaN": (broken, train_y, test_maps, test_y),
        "not pooled": (train_maps.mean((2, 3)), train_y, test_maps.mean((2, 3)), test_y),
        "same image size": (train_maps, train_y, test_maps[:, :, :2], test_y),
        "test maps must be floating": (train_maps, train_y, test_maps.long(), test_y),
        "train is empty": (train_maps[:0], train_y[:0], test_maps, test_y),
        "at least two classes": (train_maps, train_y * 0, test_maps, test_y * 0),
        "train lacks": (train_maps, train_y, test_maps, test_y + 1),
        "negative": (train_maps, train_y - 1, test_maps, test_y),
        "at least two per class": (train_maps[:2], torch.tensor([0, 1]), test_maps[:2], torch.tensor([0, 1])),
    }.items():
        with pytest.raises(UserError, match=message):
            token_probe(*arguments)
    for message, settings in {
        "choose one of attentive, block": {"head": "linear"},
        "grid must hold positive numbers": {"learning_rates": [0.0]},
        "at least 1": {"epochs": 0},
        "no other head has any": {"depth": 4},
        "one block or more": {"head": "block", "depth": 0},
        "between 0 and 1": {"held_out": 1.0},
    }.items():
        with pytest.raises(UserError, match=message):
            token_probe(*DATA, **settings)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_trains_wherever_it_is_asked_for(guard: type) -> None:
    wanted = token_probe(*DATA, **SHORT).accuracy
    with guard():
        assert token_probe(*DATA, **SHORT).accuracy == wanted


def test_maps_with_a_graph_keep_it_to_themselves() -> None:
    train_maps, train_y, test_maps, test_y = DATA
    weight = torch.ones(CHANNELS, 1, 1, requires_grad=True)
    token_probe(train_maps * weight, train_y, test_maps * weight, test_y, **SHORT)
    assert weight.grad is None


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type(kind: torch.dtype) -> None:
    train_maps, train_y, test_maps, test_y = DATA
    labels = train_y.to(kind), test_y.to(kind)
    assert token_probe(train_maps, labels[0], test_maps, labels[1], **SHORT).accuracy > 0.9
    means = train_maps.mean((2, 3)), test_maps.mean((2, 3))
    for solver in ("logistic_regression", "sgd"):
        found = linear_probe(means[0], labels[0], means[1], labels[1], solver=solver, epochs=2)
        assert found.accuracy == linear_probe(means[0], train_y, means[1], test_y, solver=solver, epochs=2).accuracy
    few = few_shot_probe(means[0], labels[0], means[1], labels[1], shots=3, draws=2)
    assert few.accuracy == few_shot_probe(means[0], train_y, means[1], test_y, shots=3, draws=2).accuracy
