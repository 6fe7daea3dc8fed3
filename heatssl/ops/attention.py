"""Attention as gated units have it: one head, values wider than keys, a gate; one dispatch over three backends.

    O = U * (A V),   A = softmax(Q K^T)   or   relu(Q K^T)^2

Queries bring the factor of their scores along (:class:`heatssl.backbones.normalisers.Normaliser` has it).
"""

import os
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from heatssl.errors import check_choice
from heatssl.ops.recomputation import recompute
from heatssl.ops.surroundings import autocast_type

Activation = Literal["softmax", "relu2"]
AttentionBackend = Literal["auto", "eager", "sdpa", "triton"]
_HAS_TRITON = find_spec("triton") is not None
_WIDEST = 256  # queries that the Triton kernels hold whole
_MANY = 32  # tokens from which torch's own attention is as fast on a CPU; it keeps no weights
# Tokens for each channel of the values up to which weights are kept on CUDA, which is the faster way: 1,152 tokens at
# ``small``, two fifths of what else a unit that mixes all keeps. Triton keeps none (docs/backbones.md).
_KEPT = 1.5


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    activation: str,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Gated attention within any number of sequences; but for ``eager``, no weights A are kept for the backward pass.

    Args:
        query: (..., n, s), one leading axis at least, times what scores are to be multiplied by.
        key: (..., n, s).
        value: (..., n, e).
        gate: U, (..., n, e); None: ones.
        activation: ``softmax`` or ``relu2``.
        valid: broadcasting with (..., 1, n), bool, False for keys that are padding; None: all are there.
        backend: ``auto`` takes torch's fused attention where that is faster and expresses the same (softmax, values as
            wide as keys, no padding), Triton on CUDA where tokens are more than 1.5 times the values' channels, and
            else the eager reference.

    Returns:
        (..., n, e), zero where there is no valid key.

    Raises:
        ValueError: on an unknown activation or backend, or one that cannot do what is asked.
    """
    if not torch.jit.is_scripting():
        chosen = _choose(query, value, activation, valid, backend)
        if chosen == "triton":
            return _by_triton(query, key, value, gate, activation, valid)
        if chosen == "sdpa":
            heads = _with_heads(query), _with_heads(key), _with_heads(value)
            attended = F.scaled_dot_product_attention(*heads, scale=1.0)
            if value.ndim != 4:  # of 4 it is as it should be: an exporter makes constants of a view's sizes
                attended = attended.squeeze(0) if value.ndim == 3 else attended.view(value.shape)
            return attended if gate is None else gate * attended
    scores = query @ key.transpose(-2, -1)  # not mT, which not every ONNX exporter knows
    if activation == "relu2" and not torch.jit.is_scripting():
        attended = _mix_by_squares(scores.relu_(), value, valid)  # in place: nobody else has seen them
    else:
        attended = attention_weights(scores, activation, valid) @ value
    return attended if gate is None else gate * attended


def attention_weights(scores: Tensor, activation: str, valid: Tensor | None = None) -> Tensor:
    """A of :func:`attention` from Q K^T: (..., n, m) -> same, zero at padding."""
    if activation == "relu2":
        return _squares(torch.relu(scores), valid)
    if valid is not None:
        # Finite, also in half precision: with -inf a row without any key would be nan, and its gradient.
        scores = scores.masked_fill(~valid, -6e4)
    # Its type said, or autocast on CUDA would make it float32: of all pairs twice the memory, to be cast again.
    weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)
    return weights if valid is None else weights * valid


def _squares(positive: Tensor, valid: Tensor | None) -> Tensor:
    weights = positive.square()
    return weights if valid is None else weights * valid


@torch.jit.unused
def _mix_by_squares(positive: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """Values by squares, which are made again in the backward pass: of all pairs one number is kept, and not two."""
    return recompute(lambda positive: [_squares(positive, valid)], torch.matmul, (positive,), (value,))


def _with_heads(x: Tensor) -> Tensor:
    """Sequences (..., n, s) with one axis of images and one of heads, without which torch's attention is not fused."""
    return x.unsqueeze(0) if x.ndim == 3 else x.flatten(0, -4) if x.ndim > 4 else x


def _choose(query: Tensor, value: Tensor, activation: str, valid: Tensor | None, backend: str) -> str:
    """The backend that will run."""
    check_choice("activation", activation, get_args(Activation))
    check_choice("backend", backend, get_args(AttentionBackend))
    expressible = activation == "softmax" and valid is None
    if backend == "sdpa" and not expressible:
        raise ValueError("backend=sdpa is for softmax without padding: choose auto")
    if backend == "triton" and not _HAS_TRITON:
        raise ValueError("backend=triton needs the package triton: choose auto")
    if backend == "triton" and not (query.is_cuda or "TRITON_INTERPRET" in os.environ):
        raise ValueError("backend=triton needs a field on a GPU: choose auto")
    if backend != "auto":
        return backend
    is_square = query.shape[-1] == value.shape[-1]
    if expressible and is_square and (query.is_cuda or query.shape[-2] >= _MANY):
        return "sdpa"
    fits = query.shape[-1] <= _WIDEST and query.dtype != torch.float64
    is_long = query.shape[-2] > _KEPT * value.shape[-1]
    return "triton" if query.is_cuda and _HAS_TRITON and fits and is_long else "eager"


def _by_triton(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, activation: str, valid: Tensor | None
) -> Tensor:
    """Sequences of whatever leading axes as one batch."""
    leading = query.shape[:-2]
    narrow = autocast_type(query)
    if narrow is not None:
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
        gate = None if gate is None else gate.to(narrow)
    flat = [None if x is None else x.flatten(0, -3) if x.ndim > 3 else x for x in (query, key, value, gate)]
    if valid is not None:
        valid = valid.expand(*leading, 1, query.shape[-2]).reshape(-1, query.shape[-2]).contiguous()
    out, _, _ = _attention(*flat, activation == "softmax", valid)
    return out.unflatten(0, leading)


# Custom operations: torch.compile takes each as one step, and imports Triton only where one runs.
@torch.library.custom_op("heatssl::attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, is_softmax: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from heatssl.ops import attention_triton

    return attention_triton.forward(query, key, value, gate, is_softmax, valid)


@torch.library.custom_op("heatssl::attention_backward", mutates_args=())
def _attention_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    is_softmax: bool,
    valid: Tensor | None,
    attended: Tensor,
    logs: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from heatssl.ops import attention_triton

    return attention_triton.backward(upstream, query, key, value, gate, is_softmax, valid, attended, logs)


@_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, gate: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = value.new_empty(value.shape)
    attended = value.new_empty(0 if gate is None else value.shape)
    return out, attended, query.new_empty(query.shape[:2], dtype=torch.float32)


@_attention_backward.register_fake
def _(
    _upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_gate = value.new_empty(0 if gate is None else value.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), by_gate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, gate, ctx.is_softmax, valid = inputs
    out, attended, logs = output
    ctx.save_for_backward(query, key, value, gate, valid, out if gate is None else attended, logs)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, key, value, gate, valid, attended, logs = ctx.saved_tensors
    by_query, by_key, by_value, by_gate = _attention_backward(
        upstream, query, key, value, gate, ctx.is_softmax, valid, attended, logs
    )
    return by_query, by_key, by_value, None if gate is None else by_gate, None, None


_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.heatssl.attention)
def _operations(query: torch.Size, _key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Those of both products, two a multiply-add: what torch's counter adds up."""
    return 2 * query[0] * query[1] ** 2 * (query[2] + value[2])
