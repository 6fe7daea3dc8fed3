"""The residual loss on a CPU: loss and gradient in one sweep over the field, as C++ made by torch.compile.

The loss is a scalar, so its gradient for an upstream gradient of 1 is known as soon as the field is: one sweep
reads z once and writes the gradient once, the memory traffic of one copy of z. No residual is stored: each
position recomputes the few responses that its gradient needs, from loads that the compiler shares.

Two things make the loop fast. The field is walked as one long line on which a neighbour is a fixed distance away,
so that every load is a plain vector load; coefficients that repeat with each image cut off what lies beyond its
edges. And a row of the loop holds as many images as make its length a multiple of a SIMD vector.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heatssl.ops.coefficients import (
    Offset,
    Weights,
    combine,
    normal_coefficients,
    response_coefficients,
    shifted,
    weighted_offsets,
)
from heatssl.ops.stencil import Boundary, accumulator, responses

LANES = 16  # floats in the widest SIMD vector in use
LONGEST_SUM = 4096  # TorchInductor adds longer sums in a slower, cascaded way
Coefficients = dict[Offset, Tensor]


class Walk(NamedTuple):
    """How a field lies on its line: everything that a compiled sweep is specialised on."""

    weights: Weights
    boundary: Boundary
    height: int
    width: int
    images: int  # per row of the loop
    unit: int  # elements from one position to its right neighbour
    parts: int  # a row of the loop is parts x length elements
    length: int
    dtype: torch.dtype

    @property
    def row(self) -> int:
        return self.parts * self.length


def loss_and_gradient(z: Tensor, weights: Weights, boundary: Boundary, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared response and ``upstream`` times its gradient, from one sweep.

    Args:
        z: field (B, C, H, W) that :func:`fits`.
        weights: of the 3x3 stencil.
        boundary: see :func:`heatssl.ops.depthwise_stencil`.
        upstream: scalar.

    Returns:
        Scalar in float32 (float64 for float64), and a tensor like z.
    """
    walk = _walk(z, weights, boundary)
    kernel, tables = _compiled(walk, True), _tables(walk)
    scale = upstream.to(accumulator(z.dtype)) * (2 / responses(z, boundary))
    rows = _rows(z, walk)
    padded = _ends(rows)
    sums, gradient = kernel(_any_length(padded), tables, scale, rows.new_zeros(2, walk.row))
    total, gradient = sums.sum(), gradient[1:-1].flatten(1).clone()
    if len(rows) > 2:
        sums, gradient = kernel(_any_length(rows), tables, scale, gradient)
        total = total + sums.sum()
    return total / responses(z, boundary), _like(gradient, z)


def loss(z: Tensor, weights: Weights, boundary: Boundary) -> Tensor:
    """:func:`loss_and_gradient` without the gradient."""
    walk = _walk(z, weights, boundary)
    kernel, tables = _compiled(walk, False), _tables(walk)
    rows = _rows(z, walk)
    total = kernel(_any_length(_ends(rows)), tables).sum()
    if len(rows) > 2:
        total = total + kernel(_any_length(rows), tables).sum()
    return total / responses(z, boundary)


def fits(z: Tensor) -> bool:
    """Whether a sweep can walk this field: dense, and with rows that reach over two lines of an image."""
    if not (z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)):
        return False
    walk = _walk(z, ((0.0,) * 3,) * 3, "interior")
    return walk.row >= (2 * walk.width + 2) * walk.unit


def _walk(z: Tensor, weights: Weights, boundary: Boundary) -> Walk:
    batch, channels, height, width = z.shape
    size = height * width
    if not z.is_contiguous():  # channels_last: vectors run along the channels, a row is one image
        return Walk(weights, boundary, height, width, 1, channels, size, channels, z.dtype)
    images = LANES // math.gcd(size, LANES)
    if batch * channels % images:
        images = 1
    row = images * size
    lengths = [n for n in range(LANES, LONGEST_SUM + 1, LANES) if row % n == 0]
    length = row if row <= LONGEST_SUM or not lengths else lengths[-1]
    return Walk(weights, boundary, height, width, images, 1, row // length, length, z.dtype)


def _rows(z: Tensor, walk: Walk) -> Tensor:
    """The memory of a field as (rows, elements of a row)."""
    z = z.detach()
    return (z if z.is_contiguous() else z.permute(0, 2, 3, 1)).view(-1, walk.row)


def _like(rows: Tensor, z: Tensor) -> Tensor:
    """The inverse of :func:`_rows`."""
    if z.is_contiguous():
        return rows.view(z.shape)
    batch, channels, height, width = z.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _ends(rows: Tensor) -> Tensor:
    """The first and the last row between zeros: a sweep leaves them out, since it would read beyond the line."""
    nothing = torch.zeros_like(rows[:1])
    return torch.cat([nothing, rows if len(rows) <= 2 else rows[:: len(rows) - 1], nothing])


def _any_length(rows: Tensor) -> Tensor:
    """One compilation serves every batch size."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows


@lru_cache(maxsize=64)
def _coefficients(walk: Walk) -> tuple[Coefficients, Coefficients]:
    """For ``interior``: where the response at position - offset exists (1 or 0). Else: L and L^T L."""
    response = response_coefficients(walk.weights, walk.boundary, walk.height, walk.width)
    if walk.boundary != "interior":
        return response, normal_coefficients(response)
    exists = torch.zeros(walk.height, walk.width, dtype=torch.float64)
    exists[1:-1, 1:-1] = 1
    offsets = {(0, 0), *weighted_offsets(walk.weights)}
    return {(dy, dx): shifted(exists, (-dy, -dx)) for dy, dx in sorted(offsets)}, {}


@lru_cache(maxsize=64)
def _tables(walk: Walk) -> Tensor:
    """The coefficients one after the other, (tables, parts, length); (tables, parts, 1) in channels_last."""
    grids = [grid for group in _coefficients(walk) for grid in group.values()]
    tables = torch.stack(grids).flatten(1).to(accumulator(walk.dtype))
    if walk.unit > 1:
        return tables[:, :, None]
    # Tables a power of two apart would all fall into one set of the cache: keep a vector between them.
    spaced = tables.new_zeros(len(grids), walk.row + LANES)
    spaced[:, : walk.row] = tables.repeat(1, walk.images)
    return spaced[:, : walk.row].unflatten(1, (walk.parts, walk.length))


@lru_cache(maxsize=64)
def _compiled(walk: Walk, with_gradient: bool) -> Callable[..., Any]:
    """(rows, tables) -> sums of squared responses, of all rows but the first and the last.

    With gradient: (rows, tables, scale, gradient of the first and last row) -> the sums, the gradient of all rows.
    """
    body = _gradient_body(walk) if with_gradient else _loss_body(walk)
    # torch allows few compilations of one piece of code: each walk gets its own.
    own = FunctionType(body.__code__.replace(), body.__globals__, body.__name__, closure=body.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=_options())


def _gradient_body(walk: Walk) -> Callable[..., tuple[Tensor, Tensor]]:
    centre, normal = _coefficients(walk)
    place = {offset: index for index, offset in enumerate(centre)}

    def body(rows: Tensor, tables: Tensor, scale: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        at = _reader(walk, rows)

        def masked(offset: Offset) -> Tensor:  # the response at position - offset, 0 where there is none
            dy, dx = offset
            return combine(walk.weights, lambda side: at((side[0] - dy, side[1] - dx))) * tables[place[offset]]

        if normal:
            gradient = _weighted(normal, tables[len(centre) :], at)
            response = _weighted(centre, tables, at)
        else:
            gradient = combine(walk.weights, masked)
            response = masked((0, 0))
        gradient = (gradient * scale).to(walk.dtype)
        whole = torch.cat([part.view(-1, walk.parts, walk.length) for part in (ends[:1], gradient, ends[1:])])
        # The second term is zero: it makes the sum wait for the gradient, so that both share one loop.
        return (response.square() + 0 * gradient).sum(dim=-1), whole

    return body


def _loss_body(walk: Walk) -> Callable[..., Tensor]:
    centre, normal = _coefficients(walk)
    middle = list(centre).index((0, 0)) if (0, 0) in centre else 0

    def body(rows: Tensor, tables: Tensor) -> Tensor:
        at = _reader(walk, rows)
        response = _weighted(centre, tables, at) if normal else combine(walk.weights, at) * tables[middle]
        return response.square().sum(dim=-1)

    return body


def _weighted(grids: Coefficients, tables: Tensor, at: Callable[[Offset], Tensor]) -> Tensor:
    total = tables[0] * at(next(iter(grids)))
    for index, offset in enumerate(grids):
        if index:
            total = total + tables[index] * at(offset)
    return total


def _reader(walk: Walk, rows: Tensor) -> Callable[[Offset], Tensor]:
    """Offset -> the field there, as (rows - 2, parts, length) in the accumulator's type."""
    inner, line, wide = rows.shape[0] - 2, rows.view(-1), accumulator(walk.dtype)

    def at(offset: Offset) -> Tensor:
        start = walk.row + (offset[0] * walk.width + offset[1]) * walk.unit
        return line[start : start + inner * walk.row].view(inner, walk.parts, walk.length).to(wide)

    return at


def _options() -> dict[str, Any]:
    """Of TorchInductor: recompute responses in registers (only the gradient is reused often enough to be stored)."""
    wanted = {
        "realize_reads_threshold": 12,
        "realize_acc_reads_threshold": 1000,
        "realize_opcount_threshold": 10_000,
        "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    }
    known = set(torch._inductor.list_options())
    return {name: value for name, value in wanted.items() if name in known}
