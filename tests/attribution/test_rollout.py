"""Rollouts need weights that fused kernels do not keep: are they the right ones, and is the gradient theirs?"""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from heatssl.attribution import attribute, explain
from heatssl.attribution.attention import recorded_attention
from heatssl.attribution.methods.attention_rollout import attention_rows

Create = Callable[..., nn.Module]
WITH_ATTENTION = ["vit, class token", "vit, registers, mean", "gau", "roformer_v2"]


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_rows_sum_to_one_and_so_does_the_map(kinds: dict[str, nn.Module], kind: str, images: Tensor) -> None:
    model = kinds[kind]
    with torch.no_grad(), recorded_attention(model) as layers:
        model(images)
    assert len(layers) == 2
    for layer in layers:
        rows = attention_rows(layer)
        torch.testing.assert_close(rows.sum(dim=2), torch.ones(3, rows.shape[1]))
    if getattr(model, "num_prefix_tokens", 0) == 0:
        total = attribute(model, images, "attention_rollout", size="map", normalize=False).sum(dim=(1, 2))
        torch.testing.assert_close(total, torch.ones(3))


@pytest.mark.parametrize("kind", ["gau", "roformer_v2"])
def test_weights_computed_anew_give_the_output_of_the_layer(
    kinds: dict[str, nn.Module], kind: str, images: Tensor
) -> None:
    """Parity with what the model itself did: A V, gated, through the last linear layer."""
    model = kinds[kind]
    layer = model.blocks[1].layer if kind == "gau" else model.blocks[1].attention.layer
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, call: inputs.append(call[0]))
    with torch.no_grad(), recorded_attention(model) as layers:
        model(images)
    handle.remove()
    if kind == "gau":
        gate, value, _ = layer.gate_value_z(inputs[-1])
        gate = torch.nn.functional.silu(gate)
        mixed = layer.apart[0]
        assert 0 < mixed < gate.shape[-1], "the others are each token's own"
        attended = gate * torch.cat([layers[1].weights[:, 0] @ value[..., :mixed], value[..., mixed:]], dim=-1)
        # |u_i * v_j| of one pair, by hand
        by_hand = (gate[0, 3] * value[0, 7])[:mixed].norm()
        torch.testing.assert_close(layers[1].size[0, 0, 3, 7], by_hand, rtol=1e-4, atol=1e-6)
    else:
        value = layer.query_key_value(inputs[-1])[2]
        attended = (layers[1].weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.leave(attended), layers[1].output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_the_gradient_is_that_of_the_weights(kinds: dict[str, nn.Module], kind: str, images: Tensor) -> None:
    """The sum of A dy / dA is what scaling all weights of the last layer by 1 + t does to the score, by t."""
    model = kinds[kind]
    with recorded_attention(model) as layers:
        score = model(images.requires_grad_())[:, 1].sum()
    last = layers[-1]
    (gradient,) = torch.autograd.grad(score, last.output)
    change = (last.to_weights(gradient) * last.weights).sum()

    step = 1e-3
    block = model.blocks[-1]
    if kind.startswith("vit"):
        block.attn.fused_attn = False
        handle = block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: output * (1 + step))
    else:
        layer = block.layer if kind == "gau" else block.attention.layer
        more = torch.ones(layer.leave.in_features)
        more[: layer.apart[0] if kind == "gau" else None] += step
        handle = layer.leave.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * more,))
    with torch.no_grad():
        moved = model(images)[:, 1].sum()
    handle.remove()
    if kind.startswith("vit"):
        block.attn.fused_attn = True
    torch.testing.assert_close((moved - score) / step, change, rtol=2e-2, atol=2e-3)


def test_rollout_of_one_layer_is_half_of_its_attention(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=5, depth=1)
    with torch.no_grad(), recorded_attention(model) as layers:
        model(images)
    expected = layers[0].weights.mean(dim=1)[:, 0, 1:].unflatten(1, (4, 4)) / 2
    found = attribute(model, images, "attention_rollout", 1, size="map", normalize=False)
    torch.testing.assert_close(found, expected)
    assert all(block.attn.fused_attn for block in model.blocks)


def test_an_eva_with_rotary_positions_rolls_out(images: Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=32, patch_size=8, depth=2, num_classes=5).eval()
    for method in ("attention_rollout", "gradient_rollout"):
        maps = attribute(model, images, method, 1, size="map", normalize=False)
        assert maps.shape == (3, 4, 4)
        assert maps.amin() >= 0 < maps.amax()


def test_gradient_rollout_leaves_out_what_lowers_the_score(small_vit: Create, images: Tensor) -> None:
    """One layer: the map is ReLU(A dy/dA) of the class token's row, by autograd through unfused attention."""
    model = small_vit(num_classes=5, depth=1)
    attention = model.blocks[0].attn
    attention.fused_attn = False
    kept: list[Tensor] = []
    handle = attention.attn_drop.register_forward_hook(lambda _m, _i, output: kept.append(output))
    score = model(images)[:, 1].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    expected = (gradient * kept[0]).relu().mean(dim=1)[:, 0, 1:].unflatten(1, (4, 4)).detach()
    found = attribute(model, images, "gradient_rollout", 1, size="map", normalize=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["vit, registers, mean", "gau"])
def test_small_gains_are_not_lost_beside_what_was_there_from_the_start(
    kinds: dict[str, nn.Module], kind: str, images: Tensor
) -> None:
    """Gains of 1e-9 added to a row of 1 vanish: the map was exactly zero. To first order it grows with the score."""

    class Scaled:
        uses_classifier = True

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
            return self.factor * kinds[kind](points)[:, 1]

    faint, fainter = (explain(kinds[kind], images, "gradient_rollout", Scaled(scale)).maps for scale in (1e-7, 1e-9))
    assert fainter.amax() > 0
    torch.testing.assert_close(100 * fainter, faint, rtol=1e-3, atol=1e-6 * faint.amax().item())


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_under_autocast(kinds: dict[str, nn.Module], kind: str, images: Tensor) -> None:
    alone = attribute(kinds[kind], images, "gradient_rollout")
    with torch.autocast("cpu", torch.bfloat16):
        found = attribute(kinds[kind], images, "gradient_rollout")
    assert torch.corrcoef(torch.stack([alone.flatten(), found.flatten()]))[0, 1] > 0.9
