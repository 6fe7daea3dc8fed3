"""Gated units and chunk attention against their formulas written out, and against the FLASH-pytorch package."""

import flash_pytorch
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import heatssl  # noqa: F401 (registers the names)
from heatssl.backbones.attend import Whereabouts
from heatssl.backbones.flash import ChunkPlaces, chunk_size, rank_among_equals
from heatssl.backbones.gated_attention_unit import GatedAttentionUnit
from heatssl.backbones.mixed_chunk_attention import MixedChunkAttention
from heatssl.backbones.normalisers import Normaliser, NormaliserSettings, number_of_keys
from heatssl.backbones.positions import PositionSettings, RotaryPositions, Rotation, scaled, turn

WIDTH, INNER, KEY = 12, 24, 8


def places_of(rows: int, columns: int) -> torch.Tensor:
    index = torch.arange(rows * columns)
    return torch.stack([index // columns, index % columns], dim=-1)[None].float()


def shaken(module: nn.Module) -> nn.Module:
    """With every parameter away from where it starts."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def rotation_of(places: torch.Tensor) -> Rotation:
    return RotaryPositions(KEY, PositionSettings(), (8, 8))(places, (8, 8))


def whereabouts(
    kind: str, places: torch.Tensor, keys=None, valid=None, number=1, slots=None, tiles=None, length: int = 5
) -> Whereabouts:
    """What a layer is told of tokens at these places (..., n, 2)."""
    activation, factor = Normaliser(KEY, NormaliserSettings(kind, length))(number_of_keys(places, keys))
    rotation = rotation_of(places)
    far = scaled(rotation, torch.as_tensor(number).float().rsqrt())
    return Whereabouts(scaled(rotation, factor), rotation, activation, keys, valid, far, slots, tiles)


@pytest.mark.parametrize("mixed", [INNER, 6])
@pytest.mark.parametrize("value_activation", ["silu", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["relu2", "relu2_fixed", "softmax"])
def test_a_unit_is_its_formula(kind, bias, value_activation, mixed):
    settings = {"bias": bias, "value_activation": value_activation, "mixed_width": mixed}
    unit = shaken(GatedAttentionUnit(WIDTH, INNER, KEY, **settings))
    x, places = torch.randn(2, 6, WIDTH), places_of(2, 3)
    rotation = rotation_of(places)
    u, v, z = (
        torch.einsum("bnd,ed->bne", x, unit.enter.weight)
        .add(unit.enter.bias if bias else 0)
        .split([INNER, INNER, KEY], -1)
    )
    u, v, z = F.silu(u), F.silu(v) if value_activation == "silu" else v, F.silu(z)
    scale, offset = unit.query_key.scale, unit.query_key.offset if bias else torch.zeros(2, KEY)
    q, k = (turn(z * scale[i] + offset[i], rotation) for i in range(2))
    raw = torch.einsum("bis,bjs->bij", q, k)
    a = (
        raw.div(KEY**0.5).softmax(-1)
        if kind == "softmax"
        else raw.clamp_min(0) ** 2 / KEY / (6 if kind == "relu2" else 5)
    )
    # What attention leaves alone is each token's own: the identity in the place of A.
    own = torch.eye(6).expand(2, 6, 6)
    attended = [torch.einsum("bij,bj->bi", a if e < mixed else own, v[..., e]) for e in range(INNER)]
    expected = torch.einsum("bne,de->bnd", u * torch.stack(attended, dim=-1), unit.leave.weight)
    torch.testing.assert_close(
        unit(x, whereabouts(kind, places)), expected + (unit.leave.bias if bias else 0), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def copy_weights(ours, theirs, their_maps, their_output, order: list[int]) -> None:
    gate, value, z = ours.enter.weight.split([INNER, INNER, KEY])
    gate_bias, value_bias, z_bias = ours.enter.bias.split([INNER, INNER, KEY])
    theirs.to_hidden[0].weight.copy_(torch.cat([value, gate]))
    theirs.to_hidden[0].bias.copy_(torch.cat([value_bias, gate_bias]))
    theirs.to_qk[0].weight.copy_(z)
    theirs.to_qk[0].bias.copy_(z_bias)
    their_maps.gamma.copy_(ours.query_key.scale[order])
    their_maps.beta.copy_(ours.query_key.offset[order])
    their_output.load_state_dict(ours.leave.state_dict())


def test_a_unit_of_the_package_on_the_same_weights():
    """Theirs squares relu(q k / n), ours divides relu(q k)^2 by n s: the same for n = s."""
    ours = shaken(GatedAttentionUnit(WIDTH, INNER, KEY, bias=True))
    theirs = flash_pytorch.GAU(
        dim=WIDTH, query_key_dim=KEY, expansion_factor=2.0, add_residual=False, norm_klass=lambda _: nn.Identity()
    )
    theirs.rel_pos_bias = None
    copy_weights(ours, theirs, theirs.offsetscale, theirs.to_out[0], order=[0, 1])
    x = torch.randn(2, KEY, WIDTH)
    here = torch.zeros(1, KEY, 2)
    torch.testing.assert_close(ours(x, whereabouts("relu2", here)), theirs(x), atol=1e-5, rtol=1e-4)
    valid = torch.arange(KEY).expand(2, -1) < 5
    fixed = ours(x, whereabouts("relu2_fixed", here, valid[:, None], length=KEY))
    torch.testing.assert_close(fixed, theirs(x, mask=valid), atol=1e-5, rtol=1e-4)


def test_chunk_attention_of_the_package_on_the_same_weights():
    chunks, places = 3, KEY  # n = s again
    ours = shaken(MixedChunkAttention(WIDTH, INNER, KEY, bias=True))
    theirs = flash_pytorch.FLASH(dim=WIDTH, group_size=places, query_key_dim=KEY, norm_klass=lambda _: nn.Identity())
    theirs.rel_pos_bias.forward = lambda _: 0
    # theirs: near query, far query, near key, far key
    copy_weights(ours, theirs, theirs.qk_offset_scale, theirs.to_out, order=[0, 2, 1, 3])
    x = torch.randn(2, chunks * places, WIDTH)
    here = torch.zeros(1, chunks, places, 2)
    number, slots = torch.full((1, 1, 1), float(chunks * places)), torch.arange(chunks * places)[None]
    found = ours(x, whereabouts("relu2", here, number=number, slots=slots))
    torch.testing.assert_close(found, theirs(x) - x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["relu2", "softmax"])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "form"),
    [
        (6, 9, 54, "tiles"),  # a grid of full chunks of 3 x 3, row by row
        (5, 6, 30, "slots"),  # the lower chunks are a row short
        (5, 6, 24, "slots"),
        (5, 6, 17, "pairs"),  # 17^2 pairs are fewer than those of four chunks
    ],
)
def test_chunk_attention_is_one_masked_matrix_over_all_pairs(kind, rows, columns, tokens, form):
    """The O(n^2) form: near scores where two tokens share a chunk, far scores everywhere, padding nowhere."""
    layer = shaken(MixedChunkAttention(WIDTH, INNER, KEY, bias=True))
    x = torch.randn(2, tokens, WIDTH)
    shuffled = torch.stack([torch.randperm(rows * columns)[:tokens] for _ in range(2)])
    index = torch.arange(tokens)[None] if form == "tiles" else shuffled
    valid = torch.arange(tokens).expand(2, -1) < 14 if tokens < rows * columns else None
    places = torch.stack([index // columns, index % columns], dim=-1).float()
    there = torch.ones(2, tokens, dtype=torch.bool) if valid is None else valid
    in_chunks, keys, slots, tiles = ChunkPlaces(3)(places, valid, (rows, columns), form == "tiles")
    where = whereabouts(kind, in_chunks, keys, valid, there.sum(1)[(..., *[None] * (in_chunks.ndim - 1))], slots, tiles)
    assert form == ("tiles" if where.tiles else "pairs" if where.slots is None else "slots")
    found = layer(x, where)
    with torch.no_grad():
        u, v, z = F.silu(layer.enter(x)).split([INNER, INNER, KEY], -1)
        rotation = rotation_of(places)
        q, k, far_q, far_k = (
            turn(z * layer.query_key.scale[i] + layer.query_key.offset[i], rotation) for i in range(4)
        )
        chunk = (places // 3) @ torch.tensor([10.0, 1.0])
        near = (chunk[:, :, None] == chunk[:, None, :]) & there[:, None, :]
        raw = q @ k.mT / KEY**0.5
        if kind == "softmax":
            a = raw.masked_fill(~near, -torch.inf).softmax(-1).nan_to_num()
        else:
            a = raw.clamp_min(0) ** 2 * near / near.sum(-1, keepdim=True).clamp_min(1)
        a = a + far_q @ far_k.mT * there[:, None, :] / there.sum(1)[:, None, None]
        expected = layer.leave(u * (a @ v))
    torch.testing.assert_close(found[there], expected[there], atol=1e-5, rtol=1e-4)


def test_the_cost_of_chunk_attention_is_linear():
    """Operations a token, of 1,024 and of 4,096 tokens; those of a gated unit grow by far more."""
    growth = {}
    for name in ("flash_small_patch16_224", "gau_tiny_patch16_224"):
        each = []
        for side in (32, 64):
            sizes = {
                "depth": 1,
                "embed_dim": 16,
                "key_width": 8,
                "mixed_share": 1.0,
                "img_size": 2 * side,
                "patch_size": 2,
            }
            model = timm.create_model(name, num_classes=0, **sizes).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, 2 * side, 2 * side))
            each.append(counter.get_total_flops() / side**2)
        growth[name] = each[1] / each[0]
    assert growth["flash_small_patch16_224"] < 1.15
    assert growth["gau_tiny_patch16_224"] > 2


def test_chunks_are_even_and_no_longer_than_asked_for():
    assert chunk_size((14, 14), 16) == (14, 14)
    assert chunk_size((28, 64), 16) == (14, 16)
    assert chunk_size((12, 5), 4) == (4, 3)


def test_ranks_count_equals_before():
    values = torch.tensor([[2, 0, 2, 2, 1, 0], [5, 5, 5, 5, 5, 5]])
    assert rank_among_equals(values).tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("mixed", [INNER, 6])
@pytest.mark.parametrize("kind", [GatedAttentionUnit, MixedChunkAttention])
def test_a_last_layer_that_was_replaced_or_is_listened_to_is_called(kind, mixed):
    """A hook, or another layer in its place (as adapters do it), sees the gated product; nothing else changes."""
    unit = shaken(kind(WIDTH, INNER, KEY, bias=True, mixed_width=mixed))
    x, places = torch.randn(2, 6, WIDTH), places_of(2, 3)
    where = whereabouts("softmax", places, number=6)
    alone, seen = unit(x, where), []
    handle = unit.leave.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(unit(x, where), alone)
    handle.remove()
    torch.testing.assert_close(F.linear(seen[0], unit.leave.weight, unit.leave.bias), alone)
    ran: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: ran.append(layer))
    unit(x, where)
    handle.remove()
    assert {unit.enter, unit.leave} < set(ran), "by whoever listens to all modules as well"
    unit.leave.forward = lambda x: F.linear(x, unit.leave.weight, unit.leave.bias) + 1  # as accelerate moves weights
    torch.testing.assert_close(unit(x, where), alone + 1)
    del unit.leave.forward
    unit.leave = nn.Sequential(unit.leave, nn.Linear(WIDTH, WIDTH))
    torch.testing.assert_close(unit(x, where), unit.leave[1](alone))
    unit(x, where)
    assert len(seen) == 1
