"""Gated attention in Triton: scores and weights live in registers only, forward and backward.

Forward, a program has a tile of queries and a tile of the values' channels, and goes over all keys; where values are
wider than a tile, scores are computed once for each. Backward, the gradients of queries, keys and values each have
a kernel of their own, so that nothing is added up in an order that changes from run to run. Scores are computed again
from queries and keys: softmax keeps one number for each query, relu2 none.

Runs without a GPU under ``TRITON_INTERPRET=1``, set before Triton is imported.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Queries, keys and values' channels of a tile, at most, and warps: the fastest of those tried on an H200 (docs/ops.md).
# Narrow tiles are for float32 and for smaller devices.
_WIDE = {
    "forward": (128, 64, 256, 8),
    "query": (128, 128, 64, 8),
    "key": (128, 128, 64, 8),
    "value": (64, 64, 256, 4),
}
_NARROW = (32, 32, 64, 4)
_ROOM = 160 * 1024, 200 * 1024  # bytes of shared memory that wide tiles need, loaded two and three steps ahead
_LOG2_E = tl.constexpr(1.4426950408889634)


def forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, is_softmax: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U * (A V), A V (empty without a gate), and log2 of the sum that softmax divides by (B, n).

    Queries and keys are (B, n, s), values and the gate (B, n, e), valid (B, n) bool.
    """
    fields = [_rows(x) for x in (query, key, value, value if gate is None else gate)]
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    attended = torch.empty_like(out) if gate is not None else out.new_empty(0)
    logs = torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device)
    tile = _constants("forward", query, value, is_softmax, valid)
    grid = (len(query) * _blocks(query, 1, tile["ROWS"]), _blocks(value, 2, tile["CHANNELS"]))
    sizes = _sizes(query, value) + _steps(fields)
    mask = logs if valid is None else valid
    _forward_kernel[grid](*fields, mask, out, attended, logs, *sizes, GATED=gate is not None, **tile)
    return out, attended, logs


def backward(
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
    """Gradients of queries, keys, values and gate (empty without one), from that of the result (B, n, e) and A V."""
    upstream, by_gate, inner = _through_gate(upstream, gate, attended)
    fields = [_rows(x) for x in (query, key, value, upstream)]
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    given = (logs if valid is None else valid, logs, inner)
    sizes = _sizes(query, value) + _steps(fields)
    images = len(query)

    tile = _constants("query", query, value, is_softmax, valid)
    grid = (images * _blocks(query, 1, tile["ROWS"]), 1)
    _query_kernel[grid](*fields, *given, gradients[0], *sizes, **tile)

    tile = _constants("key", query, value, is_softmax, valid)
    grid = (images * _blocks(key, 1, tile["COLUMNS"]), 1)
    _key_kernel[grid](*fields, *given, gradients[1], *sizes, **tile)

    tile = _constants("value", query, value, is_softmax, valid)
    grid = (images * _blocks(value, 1, tile["COLUMNS"]), _blocks(value, 2, tile["CHANNELS"]))
    fields.pop(2)  # the gradient of values does not need them
    _value_kernel[grid](*fields, *given[:-1], gradients[2], *_sizes(query, value), *_steps(fields), **tile)
    return gradients[0], gradients[1], gradients[2], by_gate


def _through_gate(upstream: Tensor, gate: Tensor | None, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A V and of the gate, and what softmax takes off: product of A V and its gradient, by row (B, n)."""
    if gate is None:
        return upstream, upstream.new_empty(0), (upstream * attended).sum(dim=-1, dtype=torch.float32)
    fields = [_rows(x) for x in (upstream, gate, attended)]
    by_attended, by_gate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (upstream, gate))
    tokens, channels = upstream.shape[1:]
    inner = torch.empty(upstream.shape[:2], dtype=torch.float32, device=upstream.device)
    _gate_kernel[(len(upstream) * tokens,)](
        *fields, by_attended, by_gate, inner, tokens, channels, *_steps(fields),
        CHANNELS=triton.next_power_of_2(channels),
    )  # fmt: skip
    return by_attended, by_gate, inner


def _rows(x: Tensor) -> Tensor:
    """The same, its rows contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _steps(fields: list[Tensor]) -> tuple[int, ...]:
    """From image to image and from row to row, of each field."""
    return tuple(step for field in fields for step in field.stride()[:2])


def _sizes(query: Tensor, value: Tensor) -> tuple[int, int, int]:
    """n, s, e."""
    return query.shape[1], query.shape[2], value.shape[2]


def _blocks(x: Tensor, axis: int, size: int) -> int:
    return -(-x.shape[axis] // size)


def _constants(kernel: str, query: Tensor, value: Tensor, is_softmax: bool, valid: Tensor | None) -> dict[str, Any]:
    """Tiles no larger than they must be, and what else a kernel is compiled for."""
    room = _shared_memory(query.device)
    is_wide = query.element_size() == 2 and room >= _ROOM[0]
    rows, columns, channels, warps = _WIDE[kernel] if is_wide else _NARROW
    tokens, width, values = (triton.next_power_of_2(max(size, 16)) for size in _sizes(query, value))
    return {
        "SOFTMAX": is_softmax,
        "MASKED": valid is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "ROWS": min(rows, tokens),
        "COLUMNS": min(columns, tokens),
        "WIDTH": width,
        "CHANNELS": min(channels, values),
        "num_warps": warps if tokens > 32 else 4,
        "num_stages": 3 if is_wide and room >= _ROOM[1] else 2,
    }


def _shared_memory(device: torch.device) -> int:
    """Bytes for one program; none in the interpreter."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@triton.jit
def _part(tokens, SIZE: tl.constexpr):
    """Image and tokens of this program."""
    blocks = tl.cdiv(tokens, SIZE)
    return tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks * SIZE + tl.arange(0, SIZE)


@triton.jit
def _load(field, rows, columns, step, height, width):
    """A tile of a matrix with contiguous rows, zero outside of it."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(field + rows[:, None] * step + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(field, tile, rows, columns, height, width):
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    place = field + rows[:, None] * width + columns[None, :]
    tl.store(place, tile.to(field.dtype.element_ty), mask=inside)


@triton.jit
def _scores(query, key, rows, columns, valid, image, tokens, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Q K^T of a tile, and which of it exists."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    there = (rows[:, None] < tokens) & (columns[None, :] < tokens)
    if MASKED:
        there &= tl.load(valid + image * tokens + columns, mask=columns < tokens, other=0)[None, :] != 0
    return scores, there


@triton.jit
def _forward_kernel(
    query, key, value, gate, valid, out, attended, logs, tokens, width, channels,
    query_b, query_n, key_b, key_n, value_b, value_n, gate_b, gate_n,
    GATED: tl.constexpr, SOFTMAX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, rows = _part(tokens, ROWS)
    across = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    along = tl.arange(0, WIDTH)
    q = _load(query + image * query_b, rows, along, query_n, tokens, width)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = _load(key + image * key_b, columns, along, key_n, tokens, width)
        v = _load(value + image * value_b, columns, across, value_n, tokens, channels)
        scores, there = _scores(q, k, rows, columns, valid, image, tokens, MASKED, PRECISION)
        if SOFTMAX:
            scores = tl.where(there, scores * _LOG2_E, -1e30)
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.where(there, tl.exp2(scores - higher[:, None]), 0.0)
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            sums = sums * shrink[:, None]
            highest = higher
        else:
            positive = tl.where(there, tl.maximum(scores, 0.0), 0.0)
            weights = positive * positive
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
    if SOFTMAX:
        exists = tl.maximum(total, 1e-30)
        sums = sums / exists[:, None]
        tl.store(logs + image * tokens + rows, highest + tl.log2(exists), mask=rows < tokens)
    if GATED:
        _store(attended + image * tokens * channels, sums, rows, across, tokens, channels)
        sums *= _load(gate + image * gate_b, rows, across, gate_n, tokens, channels).to(tl.float32)
    _store(out + image * tokens * channels, sums, rows, across, tokens, channels)


@triton.jit
def _weights(scores, there, logs, rows, image, tokens, SOFTMAX: tl.constexpr):
    """A of a tile, from its scores."""
    if SOFTMAX:
        log = tl.load(logs + image * tokens + rows, mask=rows < tokens, other=0.0)
        return tl.exp2(tl.where(there, scores * _LOG2_E - log[:, None], -1e30))
    positive = tl.where(there, tl.maximum(scores, 0.0), 0.0)
    return positive * positive


@triton.jit
def _score_gradient(
    q, k, value, upstream, valid, logs, inner, rows, columns, image, tokens, channels,
    value_n, upstream_n, SOFTMAX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of Q K^T of a tile, in the type of queries."""
    by_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, channels, CHANNELS):
        across = start + tl.arange(0, CHANNELS)
        u = _load(upstream, rows, across, upstream_n, tokens, channels)
        v = _load(value, columns, across, value_n, tokens, channels)
        by_weight = tl.dot(u, tl.trans(v), by_weight, input_precision=PRECISION)
    scores, there = _scores(q, k, rows, columns, valid, image, tokens, MASKED, PRECISION)
    if SOFTMAX:
        mean = tl.load(inner + image * tokens + rows, mask=rows < tokens, other=0.0)
        weights = _weights(scores, there, logs, rows, image, tokens, SOFTMAX)
        gradient = weights * (by_weight - mean[:, None])
    else:
        positive = tl.where(there, tl.maximum(scores, 0.0), 0.0)
        gradient = 2 * positive * by_weight
    return gradient.to(q.dtype)


@triton.jit
def _gate_kernel(
    upstream, gate, attended, by_attended, by_gate, inner, tokens, channels,
    upstream_b, upstream_n, gate_b, gate_n, attended_b, attended_n,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    image, row = tl.program_id(0).to(tl.int64) // tokens, tl.program_id(0) % tokens
    across = tl.arange(0, CHANNELS)
    there = across < channels
    u = tl.load(upstream + image * upstream_b + row * upstream_n + across, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gate + image * gate_b + row * gate_n + across, mask=there, other=0.0).to(tl.float32)
    a = tl.load(attended + image * attended_b + row * attended_n + across, mask=there, other=0.0).to(tl.float32)
    place = (image * tokens + row) * channels + across
    tl.store(by_attended + place, (u * g).to(by_attended.dtype.element_ty), mask=there)
    tl.store(by_gate + place, (u * a).to(by_gate.dtype.element_ty), mask=there)
    tl.store(inner + image * tokens + row, tl.sum(u * g * a))


@triton.jit
def _query_kernel(
    query, key, value, upstream, valid, logs, inner, gradient, tokens, width, channels,
    query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
    SOFTMAX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, rows = _part(tokens, ROWS)
    along = tl.arange(0, WIDTH)
    q = _load(query + image * query_b, rows, along, query_n, tokens, width)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = _load(key + image * key_b, columns, along, key_n, tokens, width)
        by_score = _score_gradient(
            q, k, value + image * value_b, upstream + image * upstream_b, valid, logs, inner,
            rows, columns, image, tokens, channels, value_n, upstream_n,
            SOFTMAX, MASKED, PRECISION, ROWS, COLUMNS, CHANNELS,
        )  # fmt: skip
        sums = tl.dot(by_score, k, sums, input_precision=PRECISION)
    _store(gradient + image * tokens * width, sums, rows, along, tokens, width)


@triton.jit
def _key_kernel(
    query, key, value, upstream, valid, logs, inner, gradient, tokens, width, channels,
    query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
    SOFTMAX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, columns = _part(tokens, COLUMNS)
    along = tl.arange(0, WIDTH)
    k = _load(key + image * key_b, columns, along, key_n, tokens, width)
    sums = tl.zeros([COLUMNS, WIDTH], tl.float32)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = _load(query + image * query_b, rows, along, query_n, tokens, width)
        by_score = _score_gradient(
            q, k, value + image * value_b, upstream + image * upstream_b, valid, logs, inner,
            rows, columns, image, tokens, channels, value_n, upstream_n,
            SOFTMAX, MASKED, PRECISION, ROWS, COLUMNS, CHANNELS,
        )  # fmt: skip
        sums = tl.dot(tl.trans(by_score), q, sums, input_precision=PRECISION)
    _store(gradient + image * tokens * width, sums, columns, along, tokens, width)


@triton.jit
def _value_kernel(
    query, key, upstream, valid, logs, gradient, tokens, width, channels,
    query_b, query_n, key_b, key_n, upstream_b, upstream_n,
    SOFTMAX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, columns = _part(tokens, COLUMNS)
    across = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    along = tl.arange(0, WIDTH)
    k = _load(key + image * key_b, columns, along, key_n, tokens, width)
    sums = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = _load(query + image * query_b, rows, along, query_n, tokens, width)
        u = _load(upstream + image * upstream_b, rows, across, upstream_n, tokens, channels)
        scores, there = _scores(q, k, rows, columns, valid, image, tokens, MASKED, PRECISION)
        weights = _weights(scores, there, logs, rows, image, tokens, SOFTMAX)
        sums = tl.dot(tl.trans(weights.to(u.dtype)), u, sums, input_precision=PRECISION)
    _store(gradient + image * tokens * channels, sums, columns, across, tokens, channels)
