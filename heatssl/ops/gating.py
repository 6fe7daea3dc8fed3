"""Products with a gate that keep for the backward pass what they are made of, and nothing else.

    silu_product(G, V) = silu(G) * V,    gated_linear(G, V) = (silu(G) * V) W^T + b

Plain operations keep silu(G) and the product beside G and V, half of what a gated unit keeps. Here both are computed
again, which takes no matrix product. Compiled graphs find that by themselves, and are given plain operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.ops.surroundings import autocast_type, must_be_plain


def silu_product(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value: (..., n), of shapes that broadcast."""
    if not torch.jit.is_scripting() and not must_be_plain():
        return _silu_product(gate, value)
    return F.silu(gate) * value


def gated_linear(gate: Tensor, attended: Tensor, own: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of a gated product, (silu(gate) * [attended, own]) W^T + b; under autocast in autocast's type.

    Args:
        gate: (..., m + k).
        attended: (..., m), values of the first channels.
        own: (..., k), of the others; there may be none.
        weight: W, (d, m + k).
        bias: b, (d,), or None.

    Returns:
        (..., d).
    """
    if not torch.jit.is_scripting() and not must_be_plain():
        return _gated_linear(gate, attended, own, weight, bias)
    return F.linear(F.silu(gate) * torch.cat([attended, own], dim=-1), weight, bias)


@torch.jit.unused
def _silu_product(gate: Tensor, value: Tensor) -> Tensor:
    product: Tensor = _SiluProduct.apply(gate, value)
    return product


@torch.jit.unused
def _gated_linear(gate: Tensor, attended: Tensor, own: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    narrow = autocast_type(gate)
    if narrow is not None:
        gate, attended, own, weight = gate.to(narrow), attended.to(narrow), own.to(narrow), weight.to(narrow)
        bias = None if bias is None else bias.to(narrow)
    output: Tensor = _GatedLinear.apply(gate, attended, own, weight, bias)
    return output


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, value: Tensor) -> Tensor:
        return F.silu(gate) * value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        by_activated = (upstream * value).sum_to_size(gate.shape)
        return _before_silu(by_activated, gate), (upstream * F.silu(gate)).sum_to_size(value.shape)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, attended: Tensor, own: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(_times(F.silu(gate), attended, own), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, attended, own, weight, bias = ctx.saved_tensors
        by_product, activated = upstream @ weight, F.silu(gate)
        by_attended, by_own = (by_product * activated).split([attended.shape[-1], own.shape[-1]], dim=-1)
        by_gate = _before_silu(_times(by_product, attended, own), gate)
        rows = _rows(upstream)
        by_weight = rows.mT @ _rows(_times(activated, attended, own))
        return by_gate, by_attended, by_own, by_weight, None if bias is None else rows.sum(dim=0)


def _rows(x: Tensor) -> Tensor:
    """(..., d) -> (n, d); flatten(0, -2) takes neither a single vector nor batched gradients."""
    return x.reshape(-1, x.shape[-1])


def _times(x: Tensor, attended: Tensor, own: Tensor) -> Tensor:
    """Multiply by [attended, own], in the place of x but where somebody differentiates the gradient."""
    if torch.is_grad_enabled():
        return x * torch.cat([attended, own], dim=-1)
    mixed = attended.shape[-1]
    x[..., :mixed] *= attended
    x[..., mixed:] *= own
    return x


def _before_silu(upstream: Tensor, gate: Tensor) -> Tensor:
    """The gradient of silu(gate) -> of the gate; torch's own in one step has no derivative."""
    if torch.is_grad_enabled():
        sigmoid = gate.sigmoid()
        return upstream * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.ops.aten.silu_backward(upstream, gate)
