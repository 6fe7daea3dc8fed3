// The residual loss on a CPU: the sum of squared responses of a 3x3 stencil, and its gradient, in one sweep.
//
// A field lies in memory as planes of (height, width, step) elements: contiguous (B, C, H, W) is B * C planes with a
// step of one element from a position to its right neighbour, channels_last is B planes with a step of C. A plane has a
// response at each of its positions, in the interior at each but the outermost. The gradient is the correlation of the
// responses with the mirrored stencil.
//
// z is read from memory once, the gradient written once, and responses stay in the cache. Short rows are swept as one
// line of whole planes, on which a neighbour is a fixed distance away, so that loops are long. In the interior the
// responses that they compute across the end of a row are put to zero. With a boundary every position has weights of
// its own: what the boundary puts outside stands inside as well, at most one step from where it is needed, and is
// weighed there; a neighbour across the end of a row has none. Long rows do not fit the first cache three at once: they
// are swept four at a time, so that each is loaded 1.5 times instead of three; a rim around the plane holds what the
// boundary puts there, and what the gradient has on the rim belongs to the positions that stood in.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

using Index = std::int64_t;
enum Boundary { interior, replicate, reflect };

// All but BANDS, FEWEST_ROWS and SHARES count elements or rows.
constexpr Index LINE = 1024;      // short rows: planes in one line have about so many, to fit the first cache thrice
constexpr Index WEIGHED = 256;    // with weights of their own, so that those fit as well
constexpr Index LONG_ROW = 512;   // from here on a row is long
constexpr Index ROWS = 4;         // long rows swept at a time
constexpr Index BANDS = 16;       // so few planes of long rows are cut into bands, to be shared among threads, if that
constexpr Index FEWEST_ROWS = 8;  // leaves so many rows in each: it computes two rows of responses more than it has
constexpr Index SHARES = 512;     // of the work, each with its own sum: the same loss for any number of threads
constexpr Index CHUNK = 1024;     // of a row whose squares are added in their own type, before that goes to a double
constexpr Index VECTOR = 16;      // elements of the longest vector: lines and their weights begin at multiples of it
constexpr Index PAGE = 1024;      // a load soon after a store whole pages away waits for it

// The position that stands in for one up to a step outside.
Index inside(Index index, Index size, Boundary boundary) {
    if (boundary == reflect) index = index < 0 ? -index : index < size ? index : 2 * size - 2 - index;
    return std::min(std::max(index, Index(0)), size - 1);
}

// The stencil on n consecutive rows, given with the one above and the one below, from element `start` on. Returns the
// sum of their squares. Inlined, g++ 12 does not vectorise it.
template <int n, bool corners, bool squared, class Wide>
__attribute__((noinline)) Wide correlate(const Wide* const* rows, Wide* const* results, Index start, Index count,
                                         Index step, const Wide* stencil) {
    const Wide nw = stencil[0], north = stencil[1], ne = stencil[2], west = stencil[3], centre = stencil[4],
               east = stencil[5], sw = stencil[6], south = stencil[7], se = stencil[8];
    const Wide* in[n + 2];
    Wide* out[n];
    for (int k = 0; k < n + 2; ++k) in[k] = rows[k] + start;
    for (int k = 0; k < n; ++k) out[k] = results[k] + start;
    Wide squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < count; ++i)
        for (int k = 0; k < n; ++k) {
            const Wide *const above = in[k] + i, *const here = in[k + 1] + i, *const below = in[k + 2] + i;
            Wide sum = centre * *here + north * *above + south * *below + west * here[-step] + east * here[step];
            if (corners) sum += nw * above[-step] + ne * above[step] + sw * below[-step] + se * below[step];
            out[k][i] = sum;
            if (squared) squares += *here * *here;
        }
    return squares;
}

// The same on a line, with weights of each position's own: nine times as many, `apart` each from the next.
template <bool corners, bool squared, class Wide>
__attribute__((noinline)) Wide correlate_each(const Wide* in, Wide* out, Index count, Index row, Index step,
                                              const Wide* weights, Index apart) {
    const Wide* w[9];
    for (int k = 0; k < 9; ++k) w[k] = weights + k * apart;
    const Wide *const above = in - row, *const below = in + row;
    Wide squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < count; ++i) {
        Wide sum = w[4][i] * in[i] + w[1][i] * above[i] + w[7][i] * below[i] + w[3][i] * in[i - step] +
                   w[5][i] * in[i + step];
        if (corners)
            sum += w[0][i] * above[i - step] + w[2][i] * above[i + step] + w[6][i] * below[i - step] +
                   w[8][i] * below[i + step];
        out[i] = sum;
        if (squared) squares += in[i] * in[i];
    }
    return squares;
}

template <class From, class To>
void copy(const From* __restrict from, To* __restrict to, Index count) {
    for (Index i = 0; i < count; ++i) to[i] = To(from[i]);
}

template <class Value>
void add(const Value* __restrict from, Value* __restrict to, Index count) {
    for (Index i = 0; i < count; ++i) to[i] += from[i];
}

template <class Value>
void zero(Value* to, Index count) {
    for (Index i = 0; i < count; ++i) to[i] = 0;
}

// Zeros at first, from a multiple of a vector on.
template <class Wide>
class Aligned {
    struct alignas(64) Vector {
        Wide values[VECTOR];
    };
    std::vector<Vector> vectors;

  public:
    Wide* of(Index count) {
        vectors.resize(count / VECTOR + 1);
        return vectors.data()->values;
    }
    const Wide* begin() const { return vectors.data()->values; }
};

template <class Narrow, class Wide>
class Sweep {
    static constexpr bool converted = !std::is_same_v<Narrow, Wide>;
    const Narrow* field;
    Narrow* gradient;  // null: the loss alone
    Index planes, height, width, step;
    Wide stencil[9], mirrored[9];
    bool corners;                     // whether any weight there is not zero
    Index image_row;                  // elements of a row
    // Long rows: a plane is extended on each side by a rim.
    Index rim, rows, row;             // positions on each side, rows, elements of a row
    Index above, below, left, right;  // rows of an extended plane, elements of its rows, that stand in on the rim
    // Short rows.
    Index group = 1;                  // planes in a line
    // Short rows with a boundary. Beyond two rows at the top and two at the bottom all have the same weights.
    Index block = 1, tall = 0;        // rows of a large plane at a time; rows of weights that are kept
    Index margin = 0, apart = 0;      // zeros before and behind each plane; elements from one weight to the next
    Aligned<Wide> responding, adjoining;  // weights of the responses, of the gradient

  public:
    Sweep(const void* field, void* gradient, Index planes, Index height, Index width, Index step,
          const double* weights, double scale, Boundary boundary)
        : field(static_cast<const Narrow*>(field)), gradient(static_cast<Narrow*>(gradient)), planes(planes),
          height(height), width(width), step(step), image_row(width * step), rim(boundary == interior ? 0 : 1),
          rows(height + 2 * rim), row((width + 2 * rim) * step), above(inside(-1, height, boundary) + 1),
          below(inside(height, height, boundary) + 1), left((inside(-1, width, boundary) + 1) * step),
          right((inside(width, width, boundary) + 1) * step) {
        for (int k = 0; k < 9; ++k) stencil[k] = Wide(weights[k]), mirrored[8 - k] = Wide(weights[k] * scale);
        corners = weights[0] || weights[2] || weights[6] || weights[8];
        if (!rim) group = std::max(LINE / (height * image_row), Index(1));
        if (rim && image_row < LONG_ROW) weigh_positions(weights, scale, boundary);
    }

    double run(int threads) const {
        const bool is_long = image_row >= LONG_ROW;
        const Index at_once = is_long ? 1 : group;
        const Index bands = is_long ? std::max(std::min(BANDS / planes, height / FEWEST_ROWS), Index(1)) : 1;
        const Index parts = (planes + at_once - 1) / at_once * bands, shares = std::min(parts, SHARES);
        double sums[SHARES] = {};
#pragma omp parallel num_threads(threads)
        {
            Aligned<Wide> scratch;
#pragma omp for schedule(static)
            for (Index share = 0; share < shares; ++share)
                for (Index part = parts * share / shares; part < parts * (share + 1) / shares; ++part) {
                    const Index plane = part / bands * at_once, band = part % bands;
                    const Index top = height * band / bands, bottom = height * (band + 1) / bands;
                    const Index count = std::min(at_once, planes - plane);
                    sums[share] += is_long ? sweep_rows(plane, top, bottom, scratch)
                                   : rim   ? sweep_weighed(plane, count, scratch)
                                           : sweep_interior(plane, count, scratch);
                }
        }
        double total = 0;
        for (double sum : sums) total += sum;
        return total;
    }

  private:
    // The interior of planes in a line, on which all positions have the same weights.
    double sweep_interior(Index first, Index count, Aligned<Wide>& scratch) const {
        const Index plane = height * row, line = count * plane, reach = row + step;
        const Index between = (line + 2 * reach) / PAGE * PAGE + 3 * PAGE / 2;
        Wide* const r = scratch.of(reach + between + line) + reach;
        Wide* g = r + between;
        const Wide* z = g;
        if constexpr (converted) copy(field + first * plane, g, line);
        if constexpr (!converted) z = field + first * plane, g = gradient + first * plane;

        const Wide* const around[] = {z + step, z + reach, z + reach + row};
        Wide* const inner = r + reach;
        respond(1, around, &inner, line - 2 * reach);
        zero(r - reach, step);
        zero(r + line + row, step);
        if (step == 1)
            for (Index y = 1; y < count * height; ++y) r[y * row - 1] = r[y * row] = 0;
        else
            for (Index y = 1; y < count * height; ++y) zero(r + y * row - step, 2 * step);
        for (Index k = 0; k <= count; ++k) zero(r + k * plane - row, 2 * row);
        if (!gradient) return sum_of_squares(r, line);
        const Wide* const responses[] = {r - row, r, r + row};
        const double loss = adjoin(1, responses, &g, line);
        if constexpr (converted) copy(g, gradient + first * plane, line);
        return loss;
    }

    // Weights of every position for the responses and, turned around, for the gradient.
    void weigh_positions(const double* weights, double scale, Boundary boundary) {
        const Index plane = height * image_row;
        margin = (image_row + step + VECTOR - 1) / VECTOR * VECTOR;
        group = std::max(WEIGHED / (plane + margin), Index(1));
        block = std::max(WEIGHED / image_row, Index(1));
        tall = group > 1 ? height : std::min(height, block + 4);
        apart = (group * (tall * image_row + margin) + VECTOR - 1) / VECTOR * VECTOR;
        const auto add_to = [&](Aligned<Wide>& all, Index k, Index y, Index x, double weight) {
            Wide* const there = all.of(9 * apart) + k * apart + y * image_row + x * step;
            for (Index i = 0; i < group; ++i)
                for (Index j = 0; j < step; ++j) there[i * (plane + margin) + j] += Wide(weight);
        };
        for (Index y = 0; y < tall; ++y)
            for (Index x = 0; x < width; ++x)
                for (int k = 0; k < 9; ++k) {
                    const Index from_y = inside(y + k / 3 - 1, tall, boundary);
                    const Index from_x = inside(x + k % 3 - 1, width, boundary);
                    const Index at = 4 + 3 * (from_y - y) + from_x - x;
                    add_to(responding, at, y, x, weights[k]);
                    add_to(adjoining, 8 - at, from_y, from_x, weights[k] * scale);
                }
    }

    double sweep_weighed(Index first, Index count, Aligned<Wide>& scratch) const {
        const Index plane = height * image_row, pitch = plane + margin, line = count * pitch - margin;
        const Index most = group * pitch + margin, between = most / PAGE * PAGE + 3 * PAGE / 2;  // whatever the count
        Wide* const z = scratch.of(between + most) + margin;
        Wide* const r = z + between;
        for (Index k = 0; k < count; ++k) copy(field + (first + k) * plane, z + k * pitch, plane);
        sweep_blocks<false>(z, r, line, responding.begin());
        // What is not a number stays in its plane: no weight of zero may meet it from another.
        for (Index k = 1; k < count; ++k) zero(r + k * pitch - margin, margin);
        if (!gradient) return sum_of_squares(r, line);
        if constexpr (!converted)
            if (group == 1) return sweep_blocks<true>(r, gradient + first * plane, line, adjoining.begin());
        const double loss = sweep_blocks<true>(r, z, line, adjoining.begin());
        for (Index k = 0; k < count; ++k) {
            copy(z + k * pitch, gradient + (first + k) * plane, plane);
            zero(z + k * pitch - margin, margin);
        }
        return loss;
    }

    // A line of small planes at once, a large plane some rows at a time.
    template <bool squared>
    double sweep_blocks(const Wide* in, Wide* out, Index line, const Wide* weights) const {
        if (group > 1) return correlate_line<squared>(in, out, line, weights);
        double squares = 0;
        for (Index y = 0; y < height; y += block) {
            const Index n = std::min(block, height - y), at = y * image_row;
            const Index like = tall == height || y < 2 ? y : y + n > height - 2 ? tall - (height - y) : 2;
            squares += correlate_line<squared>(in + at, out + at, n * image_row, weights + like * image_row);
        }
        return squares;
    }

    // Rows top <= y < bottom of a plane.
    double sweep_rows(Index plane, Index top, Index bottom, Aligned<Wide>& scratch) const {
        // Responses, with zeros on both sides, and copies of the field take turns in ROWS + 2 places each.
        const Index length = row + 2 * step, places = ROWS + 2;
        Wide* const begin = scratch.of((places + 1) * length + (places + ROWS + 1) * row);
        Wide *const nothing = begin + step, *const copies = begin + (places + 1) * length;
        Wide *const results = copies + places * row, *const extra = results + ROWS * row;
        zero(begin, (places + 1) * length);
        const auto response = [&](Index y) {
            return 0 < y && y < rows - 1 ? nothing + (1 + y % places) * length : nothing;
        };
        const auto extended = [&](Index y) -> const Wide* {
            if constexpr (!converted)
                if (!rim) return field + (plane * height + y) * row;
            if (rim) y = y == 0 ? above : y == rows - 1 ? below : y;
            return copies + y % places * row;
        };
        const auto result = [&](Index y) -> Wide* {
            if constexpr (!converted)
                if (!rim) return gradient + (plane * height + y) * row;
            return results + y % ROWS * row;
        };
        const auto add_from_rim = [&](const Wide* north, const Wide* here, const Wide* south, Wide* g) {
            const Wide* const in[] = {north, here, south};
            adjoin(1, in, &extra, row);
            add(extra, g, row);
        };

        const bool copied = rim || converted;
        const Wide* in[ROWS + 2];
        Wide* out[ROWS];
        top += rim, bottom += rim;
        Index unread = std::max(top - 2, rim), next = std::max(top - 1, Index(1));
        double loss = 0;
        for (Index y = top; y < bottom; y += ROWS) {
            const Index count = std::min(ROWS, bottom - y), last = std::min(y + count, rows - 2);
            while (next <= last) {
                const Index n = std::min(ROWS, last + 1 - next);
                for (; copied && unread <= std::min(next + n, height - 1 + rim); ++unread)
                    read(plane * height + unread - rim, copies + unread % places * row);
                for (Index k = 0; k < n + 2; ++k) in[k] = extended(next - 1 + k) + step;
                for (Index k = 0; k < n; ++k) out[k] = response(next + k) + step;
                respond(n, in, out, row - 2 * step);
                next += n;
            }
            if (!gradient) {
                for (Index k = 0; k < count; ++k) loss += sum_of_squares(response(y + k), row);
                continue;
            }
            for (Index k = 0; k < count + 2; ++k) in[k] = response(y - 1 + k);
            for (Index k = 0; k < count; ++k) out[k] = result(y + k);
            loss += adjoin(count, in, out, row);
            for (Index k = y; copied && k < y + count; ++k) {
                if (rim && k == above) add_from_rim(nothing, nothing, response(1), result(k));
                if (rim && k == below) add_from_rim(response(rows - 2), nothing, nothing, result(k));
                if (rim) fold(result(k));
                copy(result(k) + rim * step, gradient + (plane * height + k - rim) * image_row, image_row);
            }
        }
        return loss;
    }

    // Extends row y of the field.
    void read(Index y, Wide* out) const {
        copy(field + y * image_row, out + rim * step, image_row);
        if (rim) {
            copy(out + left, out, step);
            copy(out + right, out + row - step, step);
        }
    }

    // What a row of an extended gradient has on the rim, added to the positions that stood in.
    void fold(Wide* g) const {
        add(g, g + left, step);
        add(g + row - step, g + right, step);
    }

    void respond(Index n, const Wide* const* in, Wide* const* out, Index count) const {
        if (corners)
            correlate_rows<true, false>(n, in, out, count, stencil);
        else
            correlate_rows<false, false>(n, in, out, count, stencil);
    }

    double adjoin(Index n, const Wide* const* in, Wide* const* out, Index count) const {
        return corners ? correlate_rows<true, true>(n, in, out, count, mirrored)
                       : correlate_rows<false, true>(n, in, out, count, mirrored);
    }

    template <bool corners, bool squared>
    double correlate_rows(Index n, const Wide* const* in, Wide* const* out, Index count, const Wide* weights) const {
        double squares = 0;
        for (Index start = 0; start < count; start += CHUNK) {
            const Index size = std::min(CHUNK, count - start);
            if (n == ROWS)
                squares += correlate<ROWS, corners, squared>(in, out, start, size, step, weights);
            else
                for (Index k = 0; k < n; ++k)
                    squares += correlate<1, corners, squared>(in + k, out + k, start, size, step, weights);
        }
        return squares;
    }

    template <bool squared>
    double correlate_line(const Wide* in, Wide* out, Index count, const Wide* weights) const {
        return corners ? correlate_each<true, squared>(in, out, count, image_row, step, weights, apart)
                       : correlate_each<false, squared>(in, out, count, image_row, step, weights, apart);
    }

    static double sum_of_squares(const Wide* values, Index count) {
        double total = 0;
        for (Index start = 0; start < count; start += CHUNK) {
            const Index end = std::min(start + CHUNK, count);
            Wide part = 0;
#pragma omp simd reduction(+ : part)
            for (Index i = start; i < end; ++i) part += values[i] * values[i];
            total += part;
        }
        return total;
    }
};

}  // namespace

#define SWEEP(name, narrow, wide)                                                                                  \
    extern "C" double name(const void* field, void* gradient, Index planes, Index height, Index width, Index step, \
                           const double* weights, double scale, int boundary, int threads) {                       \
        return Sweep<narrow, wide>(field, gradient, planes, height, width, step, weights, scale,                   \
                                   Boundary(boundary))                                                             \
            .run(threads);                                                                                         \
    }
SWEEP(float32, float, float)
SWEEP(float64, double, double)
SWEEP(float16, c10::Half, float)
SWEEP(bfloat16, c10::BFloat16, float)
