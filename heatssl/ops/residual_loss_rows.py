"""Triton kernels of the residual loss whose lanes walk down the rows, for any layout, boundary and size.

A lane has a few columns of a field, so that a value is loaded for its own row and never again for those above and
below: each row is added to the responses of three rows, and each response, when it is complete, to the gradients of
three. Neighbouring lanes read neighbouring memory in both layouts: columns where a field is contiguous, channels in
channels_last. Responses live in registers only.
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(4)  # of a lane, even: of 1, 2 and 4 the fastest on an H200 (docs/ops.md)


@triton.jit
def _inside(index, size, BOUNDARY: tl.constexpr):
    """The position that stands in for one up to a step outside."""
    if BOUNDARY == 2:
        index = tl.abs(index)
        index = tl.where(index < size, index, 2 * size - 2 - index)
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def _lanes(images, channels, width, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, channel and first column of each lane, (LANES, CHANNELS), and which exist; the others repeat the last."""
    across = tl.cdiv(width, COLUMNS)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)[:, None]
    field = lane // across
    if CHANNELS == 1:
        there = field < images * channels
        field = tl.minimum(field, images * channels - 1)
        image, channel = field // channels, field % channels
    else:
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        there = (field < images) & (channel < channels)
        image, channel = tl.minimum(field, images - 1), tl.minimum(channel, channels - 1)
    return image.to(tl.int64), channel.to(tl.int64), lane % across * COLUMNS, there


@triton.jit
def _pair(row, x, PAIR: tl.constexpr):
    """Pointers to columns x and x + 1, in one word of PAIR bytes."""
    places = row[:, :, None] + (x[:, :, None] + tl.arange(0, 2)[None, None, :])
    return tl.max_contiguous(tl.multiple_of(places, (1, 1, PAIR)), (1, 1, 2))


@triton.jit
def _load_pair(row, x, width, step_x, PAIR: tl.constexpr, WIDE: tl.constexpr):
    """Columns x and x + 1 of a row, zero outside."""
    if PAIR:
        inside = (x >= 0) & (x < width)
        mask = tl.broadcast_to(inside[:, :, None], inside.shape[0], inside.shape[1], 2)
        one, two = tl.split(tl.load(_pair(row, x, PAIR), mask=mask, other=0.0))
    else:
        one = tl.load(row + x * step_x, mask=(x >= 0) & (x < width), other=0.0)
        two = tl.load(row + (x + 1) * step_x, mask=(x >= -1) & (x + 1 < width), other=0.0)
    return one.to(WIDE), two.to(WIDE)


@triton.jit
def _store_pair(row, x, width, step_x, there, one, two, PAIR: tl.constexpr):
    one, two = one.to(row.dtype.element_ty), two.to(row.dtype.element_ty)
    if PAIR:
        inside = there & (x < width)
        mask = tl.broadcast_to(inside[:, :, None], inside.shape[0], inside.shape[1], 2)
        tl.store(_pair(row, x, PAIR), tl.join(one, two), mask=mask)
    else:
        tl.store(row + x * step_x, one, mask=there & (x < width))
        tl.store(row + (x + 1) * step_x, two, mask=there & (x + 1 < width))


@triton.jit
def _columns(row, x, width, step_x, BOUNDARY: tl.constexpr, PAIR: tl.constexpr, WIDE: tl.constexpr):
    """Columns from x - 2 to two behind the lane's own; a step outside what stands in, farther out no matter what."""
    columns = ()
    for i in tl.static_range(0, COLUMNS + 4, 2):
        columns = columns + _load_pair(row, x + i - 2, width, step_x, PAIR, WIDE)
    if BOUNDARY != 0:
        mended = (columns[0], tl.where(x == 0, columns[1 + BOUNDARY], columns[1]), columns[2])
        for i in tl.static_range(3, COLUMNS + 4):
            mended = mended + (tl.where(x + i - 2 == width, mended[i - BOUNDARY], columns[i]),)
        columns = mended
    return columns


@triton.jit
def _weigh(weights, ROW: tl.constexpr, columns, sums, FIRST: tl.constexpr, COUNT: tl.constexpr, NONZERO: tl.constexpr):
    """Responses of one row of the stencil, the leftmost neighbour of the first in column FIRST, added to ``sums``."""
    added = ()
    for i in tl.static_range(COUNT):
        total = sums[i]
        for j in tl.static_range(3):
            if (NONZERO >> (3 * ROW + j)) & 1:
                total += weights[3 * ROW + j] * columns[FIRST + i + j]
        added = added + (total,)
    return added


@triton.jit
def _spread(
    weights, ROW: tl.constexpr, responses, sums, x, width, BOUNDARY: tl.constexpr, NONZERO: tl.constexpr
):  # fmt: skip
    """The adjoint of :func:`_weigh`: what each column gets of the responses in it and beside it, added to ``sums``."""
    added = ()
    for i in tl.static_range(COLUMNS):
        total = sums[i]
        for j in tl.static_range(3):
            if (NONZERO >> (3 * ROW + 2 - j)) & 1:
                total += weights[3 * ROW + 2 - j] * responses[i + j]
        if BOUNDARY != 0:  # and of those that read it in place of a neighbour outside
            if i + 1 == BOUNDARY:
                total += tl.where(x == 0, weights[3 * ROW] * responses[1], 0.0)
            total += tl.where(x + i == width - BOUNDARY, weights[3 * ROW + 2] * responses[i + BOUNDARY], 0.0)
        added = added + (total,)
    return added


@triton.jit
def _plus(a, b, condition):
    """a, and b where the condition holds."""
    added = ()
    for i in tl.static_range(COLUMNS):
        added = added + (a[i] + tl.where(condition, b[i], 0.0),)
    return added


@triton.jit
def table(weights):
    """The nine weights, row by row."""
    row_0 = (tl.load(weights), tl.load(weights + 1), tl.load(weights + 2))
    row_1 = (tl.load(weights + 3), tl.load(weights + 4), tl.load(weights + 5))
    return row_0 + row_1 + (tl.load(weights + 6), tl.load(weights + 7), tl.load(weights + 8))


@triton.jit
def loss_kernel(
    z, sums, residual, weights, images, channels, height, width, rows, step_b, step_c, step_y, step_x,
    WITH_MAP: tl.constexpr, NONZERO: tl.constexpr, BOUNDARY: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    rim: tl.constexpr = 1 if BOUNDARY == 0 else 0
    image, channel, x, there = _lanes(images, channels, width, LANES, CHANNELS)
    field = z + image * step_b + channel * step_c
    weights = table(weights)
    zero = tl.zeros(there.shape, WIDE)
    here, below, total = (zero,) * COLUMNS, (zero,) * COLUMNS, (zero,) * COLUMNS
    start = tl.program_id(2) * rows + rim
    end = tl.minimum(start + rows, height - rim)
    for n in range(start - 1, end + 1):
        row = field + _inside(n, height, BOUNDARY) * step_y
        columns = _columns(row, x, width, step_x, BOUNDARY, PAIR, WIDE)
        above = _weigh(weights, 2, columns, here, 1, COLUMNS, NONZERO)  # row n - 1 is complete with row n
        here = _weigh(weights, 1, columns, below, 1, COLUMNS, NONZERO)
        below = _weigh(weights, 0, columns, (zero,) * COLUMNS, 1, COLUMNS, NONZERO)
        if n > start:
            squared = ()
            for i in tl.static_range(COLUMNS):
                squared = squared + (total[i] + above[i] * above[i],)
                if WITH_MAP:
                    valid = there & (x + i >= rim) & (x + i < width - rim)
                    mean = tl.sum(tl.where(valid, above[i] * above[i], 0.0), axis=1, keep_dims=True) / channels
                    place = (image * height + n - 1) * width + x + i
                    tl.atomic_add(residual + place, mean, mask=x + i < width)
            total = squared
    everything = zero
    for i in tl.static_range(COLUMNS):
        everything += tl.where(there & (x + i >= rim) & (x + i < width - rim), total[i], 0.0)
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(sums + program, tl.sum(everything))


@triton.jit
def gradient_kernel(
    z, gradient, scale, weights, images, channels, height, width, rows, step_b, step_c, step_y, step_x,
    out_b, out_c, out_y, out_x,
    NONZERO: tl.constexpr, BOUNDARY: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    rim: tl.constexpr = 1 if BOUNDARY == 0 else 0
    image, channel, x, there = _lanes(images, channels, width, LANES, CHANNELS)
    field = z + image * step_b + channel * step_c
    out = gradient + image * out_b + channel * out_c
    weights, factor = table(weights), tl.load(scale)
    keep = ()  # of a response: the factor, or nothing outside
    for i in tl.static_range(COLUMNS + 2):
        keep = keep + (tl.where((x + i - 1 >= rim) & (x + i - 1 < width - rim), factor, 0.0),)
    zero = tl.zeros(there.shape, WIDE)
    nothing = (zero,) * COLUMNS
    here, below = (zero,) * (COLUMNS + 2), (zero,) * (COLUMNS + 2)
    before, at = nothing, nothing  # gradients of rows n - 2 and n - 1, so far
    start = tl.program_id(2) * rows
    end = tl.minimum(start + rows, height)
    for n in range(tl.maximum(start - 2, rim - 1), end + 2):
        row = field + _inside(n, height, BOUNDARY) * step_y
        columns = _columns(row, x, width, step_x, BOUNDARY, PAIR, WIDE)
        above = _weigh(weights, 2, columns, here, 0, COLUMNS + 2, NONZERO)  # row n - 1 is complete with row n
        here = _weigh(weights, 1, columns, below, 0, COLUMNS + 2, NONZERO)
        below = _weigh(weights, 0, columns, (zero,) * (COLUMNS + 2), 0, COLUMNS + 2, NONZERO)
        responses = ()
        for i in tl.static_range(COLUMNS + 2):
            responses = responses + (tl.where((n > rim) & (n <= height - rim), above[i] * keep[i], 0.0),)
        at = _spread(weights, 1, responses, at, x, width, BOUNDARY, NONZERO)
        after = _spread(weights, 2, responses, nothing, x, width, BOUNDARY, NONZERO)
        if BOUNDARY == 0:
            before = _spread(weights, 0, responses, before, x, width, BOUNDARY, NONZERO)
        else:  # the first and the last row read rows inside in place of those outside
            up = _spread(weights, 0, responses, nothing, x, width, BOUNDARY, NONZERO)
            before = _plus(before, up, True)
            if BOUNDARY == 1:
                at = _plus(_plus(at, up, n == 1), after, n == height)
            else:
                before = _plus(before, after, n == height)
                after = _plus(after, up, n == 1)
        for i in tl.static_range(0, COLUMNS, 2):
            place = out + (n - 2) * out_y
            _store_pair(place, x + i, width, out_x, there & (n - 2 >= start), before[i], before[i + 1], PAIR)
        before, at = at, after
