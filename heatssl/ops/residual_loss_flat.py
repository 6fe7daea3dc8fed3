"""Triton kernels of the residual loss for contiguous fields without a boundary, which do not look at rows at all.

A row of 14 fills no line of memory, so that lanes that walk down rows touch eight lines with one load. Here a field is
one long line: lanes are quads of neighbouring numbers, wherever rows end, and the neighbours above and below are quads
some way before and behind, in the first cache. Whether a position has a response of its own is a bit in a table; of one
that has, the neighbours along the line are those on the grid, so that nothing else needs to know of rows and fields.
"""

import triton
import triton.language as tl

from heatssl.ops.residual_loss_rows import table

QUAD = 4  # numbers of a lane, which kernels split and join by name


@triton.jit
def _quads(field, quad):
    """Pointers to the numbers of each quad, (LANES, 4)."""
    return field + (4 * quad[:, None] + tl.arange(0, 4)[None, :])


@triton.jit
def _neighbours(z, quad, start, quads, ROW: tl.constexpr, WIDE: tl.constexpr):
    """Numbers ROW - 2 to ROW + 5 behind the first of each quad, zero outside the tensor; ROW is rows times width."""
    left: tl.constexpr = (ROW - 2) // 4
    values = ()
    for i in tl.static_range(left, (ROW + 5) // 4 + 1):
        inside = (start + quad + i).to(tl.uint32) < quads.to(tl.uint32)  # one comparison: what is below zero is large
        four = tl.load(_quads(z, quad + i), mask=tl.broadcast_to(inside[:, None], quad.shape[0], 4), other=0.0)
        even, odd = tl.split(tl.reshape(four.to(WIDE), quad.shape[0], 2, 2))
        one, three = tl.split(even)
        two, last = tl.split(odd)
        values = values + (one, two, three, last)
    row = ()
    for i in tl.static_range(8):
        row = row + (values[ROW - 2 - 4 * left + i],)
    return row


@triton.jit
def _responses(
    weights, above, here, below, bits,
    ROW: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, NONZERO: tl.constexpr,
):  # fmt: skip
    """Responses in columns FIRST to FIRST + COUNT - 1 of a row, from the quad's first on; zero where there is none."""
    responses = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        total = tl.zeros(bits.shape, here[0].dtype)
        for j in tl.static_range(3):
            if (NONZERO >> j) & 1:
                total += weights[j] * above[i + j + 1]
            if (NONZERO >> (3 + j)) & 1:
                total += weights[3 + j] * here[i + j + 1]
            if (NONZERO >> (6 + j)) & 1:
                total += weights[6 + j] * below[i + j + 1]
        responses = responses + (tl.where((bits & (1 << (6 * ROW + i + 1))) != 0, total, 0.0),)
    return responses


@triton.jit
def _bits(valid, quad, start, quads, PERIOD: tl.constexpr):
    """Of each quad; the table is one of quads, so that neighbours find theirs side by side."""
    return tl.load(valid + (start % PERIOD + quad) % PERIOD, mask=start + quad < quads, other=0)


@triton.jit
def loss_kernel(
    z, sums, weights, valid, quads,
    WIDTH: tl.constexpr, PERIOD: tl.constexpr, NONZERO: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * (LANES * STEPS)  # quads before the program's own
    z += 4 * start.to(tl.int64)
    weights = table(weights)
    total = tl.zeros((LANES,), WIDE)
    for step in range(STEPS):
        quad = step * LANES + tl.arange(0, LANES)
        bits = _bits(valid, quad, start, quads, PERIOD)
        above = _neighbours(z, quad, start, quads, -WIDTH, WIDE)
        here = _neighbours(z, quad, start, quads, 0, WIDE)
        below = _neighbours(z, quad, start, quads, WIDTH, WIDE)
        responses = _responses(weights, above, here, below, bits, 1, 0, 4, NONZERO)
        for i in tl.static_range(4):
            total += responses[i] * responses[i]
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def gradient_kernel(
    z, gradient, scale, weights, valid, quads,
    WIDTH: tl.constexpr, PERIOD: tl.constexpr, NONZERO: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * (LANES * STEPS)
    z += 4 * start.to(tl.int64)
    gradient += 4 * start.to(tl.int64)
    weights, factor = table(weights), tl.load(scale)
    scaled = ()
    for i in tl.static_range(9):
        scaled = scaled + (factor * weights[i],)
    for step in range(STEPS):
        quad = step * LANES + tl.arange(0, LANES)
        bits = _bits(valid, quad, start, quads, PERIOD)
        far_above = _neighbours(z, quad, start, quads, -2 * WIDTH, WIDE)
        above = _neighbours(z, quad, start, quads, -WIDTH, WIDE)
        here = _neighbours(z, quad, start, quads, 0, WIDE)
        below = _neighbours(z, quad, start, quads, WIDTH, WIDE)
        far_below = _neighbours(z, quad, start, quads, 2 * WIDTH, WIDE)
        responses = (
            _responses(weights, far_above, above, here, bits, 0, -1, 6, NONZERO)
            + _responses(weights, above, here, below, bits, 1, -1, 6, NONZERO)
            + _responses(weights, here, below, far_below, bits, 2, -1, 6, NONZERO)
        )
        sums = ()
        for i in tl.static_range(4):  # each of the nine responses beside it has read it with the weight opposite
            total = tl.zeros((LANES,), WIDE)
            for j in tl.static_range(9):
                if (NONZERO >> (8 - j)) & 1:
                    total += scaled[8 - j] * responses[6 * (j // 3) + i + j % 3]
            sums = sums + (total.to(gradient.dtype.element_ty),)
        four = tl.reshape(tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3])), LANES, 4)
        own = tl.broadcast_to((start + quad < quads)[:, None], LANES, 4)
        tl.store(_quads(gradient, quad), four, mask=own)
