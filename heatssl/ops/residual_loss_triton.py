"""The residual loss on a GPU: forward reads z once; backward reads z once and writes the gradient once.

Two pairs of kernels: one takes a contiguous field without a boundary as one long line (`residual_loss_flat.py`), the
other walks down the rows of any field (`residual_loss_rows.py`). Both run without a GPU under ``TRITON_INTERPRET=1``,
set before Triton is imported.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from heatssl.ops import residual_loss_flat as flat
from heatssl.ops import residual_loss_rows as rows
from heatssl.ops.stencil import Boundary, Weights, accumulator, responses

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(f"Triton {triton.__version__} has no tuples: 3.3, which comes with torch 2.7, has")

_BOUNDARIES = {"interior": 0, "replicate": 1, "reflect": 2}  # also how far inside stands what replaces a neighbour
_LANES = 128  # of a program of four warps, one for each thread
_PROGRAMS = 1024  # fewer leave a GPU idle: then the rows are divided as well
_QUADS, _STEPS = 256, 8  # of a program that takes a field as a line: two quads for each thread and step
_WIDEST = 64  # beyond, the rows above and below a program's own are no longer in the first cache


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
    if _is_line(z, boundary) and _is_line(result, boundary):
        arguments, settings = _line(z, weights)
        flat.gradient_kernel[_programs(z)](z, result, scale, *arguments, **settings)
        return result
    grid, settings = _settings(z, weights, boundary, paired=_has_pairs(z) and _has_pairs(result))
    rows.gradient_kernel[grid](z, result, scale, *_arguments(z, weights, grid), *result.stride(), **settings)
    return result


def _forward(z: Tensor, weights: Weights, boundary: Boundary, residual: Tensor | None) -> Tensor:
    if residual is None and _is_line(z, boundary):
        arguments, settings = _line(z, weights)
        sums = torch.empty(_programs(z), dtype=accumulator(z.dtype), device=z.device)
        flat.loss_kernel[_programs(z)](z, sums, *arguments, **settings)
        return sums.sum() / responses(z, boundary)
    grid, settings = _settings(z, weights, boundary, paired=_has_pairs(z))
    sums = torch.empty(grid, dtype=accumulator(z.dtype), device=z.device)  # one each: the same sum in every run
    rows.loss_kernel[grid](
        z,
        sums,
        sums if residual is None else residual,
        *_arguments(z, weights, grid),
        WITH_MAP=residual is not None,
        **settings,
    )
    return sums.sum() / responses(z, boundary)


def _settings(
    z: Tensor, weights: Weights, boundary: Boundary, paired: bool
) -> tuple[tuple[int, int, int], dict[str, object]]:
    """Grid, by lanes, channels and parts of the rows, and what a kernel is compiled for."""
    images, channels, height, width = z.shape
    lanes = images * triton.cdiv(width, rows.COLUMNS.value)
    together = 1
    if z.stride(3) == 1:
        lanes *= channels
    else:
        together = min(_LANES, triton.next_power_of_2(channels))
    programs = triton.cdiv(lanes, _LANES // together), triton.cdiv(channels, together) if together > 1 else 1
    parts = max(1, min(_PROGRAMS // (programs[0] * programs[1]), height // 8))
    return (*programs, parts), {
        **_common(z, weights),
        "BOUNDARY": _BOUNDARIES[boundary],
        "LANES": _LANES // together,
        "CHANNELS": together,
        "PAIR": 2 * z.element_size() if paired else 0,
    }


def _common(z: Tensor, weights: Weights) -> dict[str, object]:
    return {
        "NONZERO": sum(1 << (3 * i + j) for i in range(3) for j in range(3) if weights[i][j]),
        "WIDE": tl.float64 if z.dtype == torch.float64 else tl.float32,
    }


def _is_line(z: Tensor, boundary: Boundary) -> bool:
    """Whether z can be taken as one line of quads."""
    quads = z.is_contiguous() and z.numel() % flat.QUAD == 0 and z.data_ptr() % (flat.QUAD * z.element_size()) == 0
    return boundary == "interior" and quads and z.shape[3] <= _WIDEST and z.numel() < 2**33


def _programs(z: Tensor) -> tuple[int]:
    return (triton.cdiv(z.numel(), flat.QUAD * _QUADS * _STEPS),)


def _line(z: Tensor, weights: Weights) -> tuple[tuple[object, ...], dict[str, object]]:
    """What the kernels of a line take, and are compiled for."""
    height, width = z.shape[2:]
    table, valid = _on_device(weights, accumulator(z.dtype), z.device), _valid(height, width, z.device)
    return (table, valid, z.numel() // flat.QUAD), {
        **_common(z, weights),
        "WIDTH": width,
        "PERIOD": len(valid),
        "LANES": _QUADS,
        "STEPS": _STEPS,
    }


@lru_cache(maxsize=32)
def _valid(height: int, width: int, device: torch.device) -> Tensor:
    """Which positions about a quad have a response, int32; after as many quads as there are entries, fields begin anew.

    Bit 6 i + j is that of the position i - 1 rows below the quad's first number and j - 1 columns to its right.
    """
    inside = torch.zeros(height, width, dtype=torch.int32)
    inside[1:-1, 1:-1] = 1
    line = inside.flatten()
    shifted = [line.roll(-(row * width + column)) for row in (-1, 0, 1) for column in range(-1, flat.QUAD + 1)]
    bits = torch.stack([bit << i for i, bit in enumerate(shifted)]).sum(dim=0, dtype=torch.int32)
    quads = len(line) // math.gcd(len(line), flat.QUAD)
    return bits[torch.arange(quads) * flat.QUAD % len(line)].to(device)


def _has_pairs(field: Tensor) -> bool:
    """Whether columns lie in twos that one instruction may load: even rows, at even places of memory."""
    return (
        field.stride(3) == 1
        and not any(size % 2 for size in (field.shape[3], *field.stride()[:3]))
        and field.data_ptr() % (2 * field.element_size()) == 0
    )


def _arguments(z: Tensor, weights: Weights, grid: tuple[int, int, int]) -> tuple[object, ...]:
    table = _on_device(weights, accumulator(z.dtype), z.device)
    return table, *z.shape, triton.cdiv(z.shape[2], grid[2]), *z.stride()


@lru_cache(maxsize=32)
def _on_device(weights: Weights, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, for to send nine numbers takes longer than to sweep a small field."""
    return torch.tensor(weights, dtype=dtype).flatten().to(device)
