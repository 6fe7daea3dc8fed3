"""The residual loss in Triton: forward reads z once; backward reads z once and writes the gradient once.

A program works on a tile of positions x channels of one field, so that neighbouring threads read neighbouring
memory in both layouts. Neighbours come from the cache; responses live in registers only. Runs without a GPU under
``TRITON_INTERPRET=1``, set before Triton is imported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heatssl.ops.stencil import Boundary, Weights, accumulator, responses

_BOUNDARIES = {"interior": 0, "replicate": 1, "reflect": 2}


def loss(z: Tensor, weights: Weights, boundary: Boundary) -> Tensor:
    """Mean squared response of z (B, C, H, W): scalar in float32 (float64 for float64)."""
    return _forward(z, weights, boundary, None)


def loss_and_map(z: Tensor, weights: Weights, boundary: Boundary) -> tuple[Tensor, Tensor]:
    """:func:`loss`, and its mean over channels alone: (B, H-2, W-2) for ``interior``, else (B, H, W)."""
    batch, _, height, width = z.shape
    residual = torch.zeros(batch, height, width, dtype=accumulator(z.dtype), device=z.device)
    value = _forward(z, weights, boundary, residual)
    return value, residual[:, 1:-1, 1:-1] if boundary == "interior" else residual


def gradient(z: Tensor, weights: Weights, boundary: Boundary, upstream: Tensor) -> Tensor:
    """``upstream`` (scalar) times the gradient of :func:`loss`: like z in shape, type and layout."""
    result = torch.empty_like(z)
    scale = (upstream.to(accumulator(z.dtype)) * (2 / responses(z, boundary))).reshape(1)
    grid, tile = _tiles(z)
    constants = _constants(z, weights, boundary)
    _gradient_kernel[grid](z, result, scale, *_arguments(z, weights), *result.stride(), **constants, **tile)
    return result


def _forward(z: Tensor, weights: Weights, boundary: Boundary, residual: Tensor | None) -> Tensor:
    grid, tile = _tiles(z)
    sums = torch.empty(grid, dtype=accumulator(z.dtype), device=z.device)  # one each: the same sum in every run
    _loss_kernel[grid](
        z,
        sums,
        sums if residual is None else residual,
        *_arguments(z, weights),
        WITH_MAP=residual is not None,
        **_constants(z, weights, boundary),
        **tile,
    )
    return sums.sum() / responses(z, boundary)


def _tiles(z: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile: long along what is contiguous in memory."""
    batch, channels, height, width = z.shape
    block_positions, block_channels = (256, 1) if z.stride(3) == 1 else (8, 64)
    grid = (batch * triton.cdiv(channels, block_channels), triton.cdiv(height * width, block_positions))
    return grid, {"POSITIONS": block_positions, "CHANNELS": block_channels}


def _arguments(z: Tensor, weights: Weights) -> tuple[object, ...]:
    table = torch.tensor(weights, dtype=accumulator(z.dtype)).flatten().to(z.device, non_blocking=True)
    return table, *z.shape[1:], *z.stride()


def _constants(z: Tensor, weights: Weights, boundary: Boundary) -> dict[str, object]:
    nonzero = sum(1 << (3 * i + j) for i in range(3) for j in range(3) if weights[i][j])
    wide = tl.float64 if z.dtype == torch.float64 else tl.float32
    return {"NONZERO": nonzero, "BOUNDARY": _BOUNDARIES[boundary], "WIDE": wide}


@triton.jit
def _inside(index, size, BOUNDARY: tl.constexpr):
    """The position that stands in for one up to a step outside."""
    if BOUNDARY == 2:
        index = tl.abs(index)
        index = tl.where(index < size, index, 2 * size - 2 - index)
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def _response(
    field, y, x, valid, weights, height, width, step_y, step_x,
    NONZERO: tl.constexpr, BOUNDARY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The stencil at (y, x), zero where there is no response; ``field`` points at position (0, 0) of each channel."""
    rim: tl.constexpr = 1 if BOUNDARY == 0 else 0
    valid = valid & (y >= rim) & (y < height - rim) & (x >= rim) & (x < width - rim)
    total = tl.zeros(valid.shape, WIDE)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            if (NONZERO >> (3 * i + j)) & 1:
                at_y, at_x = _inside(y + i - 1, height, BOUNDARY), _inside(x + j - 1, width, BOUNDARY)
                value = tl.load(field + at_y * step_y + at_x * step_x, mask=valid, other=0.0)
                total += tl.load(weights + 3 * i + j) * value.to(WIDE)
    return total


@triton.jit
def _tile(channels, height, width, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: field, positions as (row, column), channels, and which of them exist."""
    blocks = tl.cdiv(channels, CHANNELS)
    batch = tl.program_id(0).to(tl.int64) // blocks
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    valid = (position < height * width) & (channel < channels)
    return batch, position // width, position % width, channel.to(tl.int64), valid


@triton.jit
def _loss_kernel(
    z, sums, residual, weights, channels, height, width, step_b, step_c, step_y, step_x,
    WITH_MAP: tl.constexpr, NONZERO: tl.constexpr, BOUNDARY: tl.constexpr, WIDE: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch, y, x, channel, valid = _tile(channels, height, width, POSITIONS, CHANNELS)
    field = z + batch * step_b + channel * step_c
    response = _response(field, y, x, valid, weights, height, width, step_y, step_x, NONZERO, BOUNDARY, WIDE)
    squared = response * response
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(squared))
    if WITH_MAP:
        place = (batch * height + y) * width + x
        mean = tl.sum(squared, axis=1, keep_dims=True) / channels
        tl.atomic_add(residual + place, mean, mask=y < height)


@triton.jit
def _gradient_kernel(
    z, gradient, scale, weights, channels, height, width, step_b, step_c, step_y, step_x,
    out_b, out_c, out_y, out_x,
    NONZERO: tl.constexpr, BOUNDARY: tl.constexpr, WIDE: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch, y, x, channel, valid = _tile(channels, height, width, POSITIONS, CHANNELS)
    field = z + batch * step_b + channel * step_c
    total = tl.zeros(valid.shape, WIDE)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            # The position above and left (i = j = 0) reads this one through its weight below and right, and so on.
            # In the interior that is one weight; at other boundaries it may read this one in place of others too.
            if BOUNDARY != 0 or (NONZERO >> (8 - 3 * i - j)) & 1:
                at_y, at_x = y + i - 1, x + j - 1
                coefficient = tl.zeros(at_y.shape, WIDE)
                if BOUNDARY == 0:
                    coefficient += tl.load(weights + 8 - 3 * i - j)
                else:
                    for k in tl.static_range(3):
                        for n in tl.static_range(3):
                            if (NONZERO >> (3 * k + n)) & 1:
                                hit = (_inside(at_y + k - 1, height, BOUNDARY) == y) & (
                                    _inside(at_x + n - 1, width, BOUNDARY) == x
                                )
                                coefficient += tl.where(hit, tl.load(weights + 3 * k + n), 0.0)
                total += coefficient * _response(
                    field, at_y, at_x, valid, weights, height, width, step_y, step_x, NONZERO, BOUNDARY, WIDE
                )
    total *= tl.load(scale)
    out = gradient + batch * out_b + channel * out_c + y * out_y + x * out_x
    tl.store(out, total.to(gradient.dtype.element_ty), mask=valid)
