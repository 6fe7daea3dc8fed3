"""Attention weights of a backbone's layers, and the gradient of a score with respect to them.

Fused kernels keep no weights. timm's layers are therefore run unfused for a while. For heatssl's own, the weights are
computed anew from what enters a layer, and their gradient from that of what leaves it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.layers import reads_class_token
from heatssl.attribution.targets import Target
from heatssl.backbones import as_field
from heatssl.backbones.attend import Whereabouts, for_heads, weights
from heatssl.backbones.gated_attention_unit import GatedAttentionUnit
from heatssl.backbones.roformer_v2 import Attention as RoFormerAttention
from heatssl.errors import UserError


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer did with a batch; n counts all tokens, prefix tokens too.

    Attributes:
        weights: A (B, heads, n, n), not negative; rows of a softmax sum to one.
        size: (B, 1, n, n), how large a value j is once the gate of query i has been applied; None without a gate.
        output: a tensor of the graph that the weights stand before.
        to_weights: gradient with respect to ``output`` -> with respect to the weights.
    """

    weights: Tensor
    size: Tensor | None
    output: Tensor
    to_weights: Callable[[Tensor], Tensor]


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[AttentionLayer]]:
    """Collects the attention of every layer that runs within the block, in order."""
    found: list[AttentionLayer] = []
    handles, fused = [], []
    for module in model.modules():
        record = next((record for kind, record in _RECORDS.items() if isinstance(module, kind)), None)
        if record is not None:
            handles.append(module.register_forward_hook(_keeping(found, record)))
        elif hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
            handles.append(module.attn_drop.register_forward_hook(_keeping(found, _of_timm)))  # type: ignore[union-attr]
            fused.append((module, module.fused_attn))
            module.fused_attn = False  # type: ignore[assignment]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for module, was_fused in fused:
            module.fused_attn = was_fused


def _keeping(found: list[AttentionLayer], record: Callable[..., AttentionLayer]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.append(record(module, inputs, output))

    return hook


def _of_timm(_dropout: nn.Module, _inputs: tuple[Tensor], weights: Tensor) -> AttentionLayer:
    return AttentionLayer(weights.detach(), None, weights, lambda gradient: gradient)


@torch.no_grad()
def _of_roformer(layer: RoFormerAttention, inputs: tuple[Tensor, Whereabouts], output: Tensor) -> AttentionLayer:
    x, where = inputs
    query, key, value = layer.query_key_value(x)

    def to_weights(gradient: Tensor) -> Tensor:
        attended = gradient.to(layer.leave.weight.dtype) @ layer.leave.weight  # under autocast they differ
        return attended.unflatten(2, (layer.heads, -1)).transpose(1, 2) @ value.to(attended.dtype).mT

    return AttentionLayer(weights(query, key, for_heads(where)), None, output, to_weights)


@torch.no_grad()
def _of_gated_unit(unit: GatedAttentionUnit, inputs: tuple[Tensor, Whereabouts], output: Tensor) -> AttentionLayer:
    """O = (U * A V) W_o: query i takes A_ij (u_i * v_j) from key j, a vector of size A_ij |u_i * v_j|.

    Values that attention does not mix are each token's own, as what a ViT's feed-forward layer adds, and no part of it.
    """
    x, where = inputs
    gate, value, z = unit.gate_value_z(x)
    gate, value = F.silu(gate[..., : unit.apart[0]]), value[..., : unit.apart[0]]
    query, key = unit.query_key(z).unbind(-2)
    size = (gate.float().square() @ value.float().square().mT).sqrt()

    def to_weights(gradient: Tensor) -> Tensor:
        to_mixed = gradient.to(unit.leave.weight.dtype) @ unit.leave.weight[:, : unit.apart[0]]
        return (gate * to_mixed @ value.to(to_mixed.dtype).mT)[:, None]

    return AttentionLayer(weights(query, key, where)[:, None], size[:, None], output, to_weights)


_RECORDS: dict[type[nn.Module], Callable[..., AttentionLayer]] = {
    GatedAttentionUnit: _of_gated_unit,
    RoFormerAttention: _of_roformer,
}


def read_out(model: nn.Module, images: Tensor, target: Target, layers: list[AttentionLayer]) -> Tensor:
    """How much the target reads of each token behind the last layer: (B, n), rows sum to one.

    All of it from the class token where a classifier reads that, else the same from every patch.

    Raises:
        UserError: when the model has no attention over the whole image.
    """
    shapes = {tuple(layer.weights.shape[i] for i in (0, 2, 3)) for layer in layers}
    tokens = layers[0].weights.shape[-1] if layers else 0
    if shapes != {(len(images), tokens, tokens)}:
        raise UserError(
            f"{type(model).__name__} has no attention over all of its positions: choose a vit_*, deit_*, eva02_*, "
            "gau_* or roformer_v2_* backbone for the rollouts; gradcam works for every kind"
        )
    row = torch.zeros(len(images), tokens, device=images.device)
    if target.uses_classifier and reads_class_token(model):
        row[:, 0] = 1
    else:
        patches = as_field(model, row[..., None], images)[0].numel()
        row[:, tokens - patches :] = 1 / patches
    return row


def to_map(model: nn.Module, images: Tensor, row: Tensor) -> Tensor:
    """Numbers of tokens (B, n) -> those of the patches, (B, h, w)."""
    return as_field(model, row[..., None], images)[:, 0]
