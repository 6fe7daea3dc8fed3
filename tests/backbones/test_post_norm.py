"""RoFormerV2 and GAU-alpha against their formulas written out, and the weights that both start from."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heatssl  # noqa: F401 (registers the names)
from heatssl.backbones import fade_in
from heatssl.backbones.patch_encoder import places_of

ROWS, COLUMNS, HEADS, WIDTH = 2, 3, 3, 24
GRID = {"img_size": (8 * ROWS, 8 * COLUMNS), "patch_size": 8, "num_classes": 0}
GAU, ROFORMER = "gau_tiny_patch16_224", "roformer_v2_small_patch16_224"


def shaken(model: nn.Module) -> nn.Module:
    """With weights that let every part count."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def normalised(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turns(width: int) -> Tensor:
    """For each patch the matrix that turns its channels, pairs of the first half by row, of the second by column."""
    number = width // 4
    matrices = []
    for index in range(ROWS * COLUMNS):
        angles = [place * 100.0 ** (-j / number) for place in divmod(index, COLUMNS) for j in range(number)]
        pairs = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles]
        matrices.append(torch.block_diag(*pairs))
    return torch.stack(matrices)


@pytest.mark.parametrize("ramp", [1.0, 0.3])
def test_a_block_of_roformer_v2_is_its_formula(ramp):
    model = timm.create_model(ROFORMER, depth=1, embed_dim=WIDTH, num_heads=HEADS, normaliser="softmax", **GRID)
    fade_in(shaken(model), ramp)
    block, x = model.blocks[0], torch.randn(2, ROWS * COLUMNS, WIDTH)
    weights = dict(block.named_parameters())
    layers = [f"{layer}.layer.{side}.weight" for layer in ("attention", "feed_forward") for side in ("enter", "leave")]
    assert sorted(weights) == sorted(layers), "no biases, and norms have no weights"
    enter, leave, widen, narrow = (weights[name] for name in layers)

    side = WIDTH // HEADS
    q, k, v = torch.einsum("bnd,thsd->tbhns", x, enter.reshape(3, HEADS, side, WIDTH))
    q, k = (torch.einsum("nst,bhnt->bhns", turns(side), part) for part in (q, k))
    mixed = torch.einsum("bhij,bhjs->bihs", (torch.einsum("bhis,bhjs->bhij", q, k) / side**0.5).softmax(-1), v)
    y = normalised(x + ramp * torch.einsum("bnhs,dhs->bnd", mixed, leave.reshape(WIDTH, HEADS, side)))
    hidden = F.gelu(torch.einsum("bnd,ed->bne", y, widen))
    expected = normalised(y + ramp * torch.einsum("bne,de->bnd", hidden, narrow))

    where = model.locate(places_of(torch.arange(ROWS * COLUMNS), COLUMNS)[None], None, (ROWS, COLUMNS))
    torch.testing.assert_close(block(x, where), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ramp", [1.0, 0.4])
def test_gau_alpha_normalises_what_goes_in_and_each_sum(ramp):
    settings = {"norm_place": "post", "value_activation": "silu", "mixed_share": 1.0, "normaliser": "softmax"}
    model = timm.create_model(GAU, depth=2, embed_dim=WIDTH, key_width=8, **settings, **GRID)
    fade_in(shaken(model), ramp)
    images = torch.randn(2, 3, 8 * ROWS, 8 * COLUMNS)
    x = normalised(model.patch_embed(images))
    for block in model.blocks:
        unit = block.layer
        assert sorted(name for name, _ in block.named_parameters()) == [
            "layer.enter.weight",
            "layer.leave.weight",
            "layer.query_key.scale",
        ]
        u, v, z = F.silu(torch.einsum("bnd,ed->bne", x, unit.enter.weight)).split([2 * WIDTH, 2 * WIDTH, 8], -1)
        q, k = (torch.einsum("nst,bnt->bns", turns(8), z * scale) for scale in unit.query_key.scale)
        weights = (torch.einsum("bis,bjs->bij", q, k) / 8**0.5).softmax(-1)
        change = torch.einsum("bne,de->bnd", u * torch.einsum("bij,bje->bie", weights, v), unit.leave.weight)
        x = normalised(x + ramp * change)
    torch.testing.assert_close(model.forward_features(images), x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "order", "width"), [(GAU, 3, {"key_width": 32}), (ROFORMER, 2, {"num_heads": 3})])
def test_linear_layers_start_from_the_deviations_of_their_papers(name, order, width):
    torch.manual_seed(0)
    depth = 8
    model = timm.create_model(name, depth=depth, embed_dim=96, **width, **GRID)
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == depth * (2 if name == GAU else 4)
    for layer in layers:
        # The cut at two deviations of 1.13684723 / sqrt(inputs) L^(-1 / order) leaves 1 / sqrt(inputs) L^(-1 / order).
        expected = layer.in_features**-0.5 * depth ** (-1 / order)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.04)
        assert 2.1 * expected < layer.weight.abs().max() <= 2 * 1.13684724 * expected
