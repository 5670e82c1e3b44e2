// The wide sides of a tile, for a block: contraction and expansion of its rows, with factors that need not fit whole.
#pragma once

#include "middle.h"
#include "tiles.h"

namespace compacter::cuda {

// Sums of a row in a contraction that a warp has in registers, beside the parts of x.
constexpr int sums_at_once = 32;

// All threads of the block start to copy a multiple of 16 bytes.
COMPACTER_DEVICE void copy_bytes(int to, const unsigned char* from, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) copy_async(shared_memory() + to + at, from + at, true);
}

// Calls body(first segment, segments, factor) for each slab of a wide factor, whose slabs begin at `from` in memory. A whole one is
// there already. Once: it takes the same loop instead of a copy of the body, as the registers allow: with the copy a backward would
// spill on sm_100, and without it a forward on sm_80 and sm_90.
template <bool Once, class Body>
COMPACTER_DEVICE void for_each_slab(const Slab& slab, int width, const unsigned char* from, int bytes, const Body& body) {
    const int all = segments(width);
    const auto factor = [&](int buffer) {
        return factor_parts(shared_memory() + slab.at + buffer * bytes, slab.segments * segment, slab.rows);
    };
    if (!Once && slab.whole) return body(0, all, factor(0));
    const bool whole = Once && slab.whole;
    const int count = whole ? 1 : (all + slab.segments - 1) / slab.segments;
    if (!whole) {
        __syncthreads();
        copy_bytes(slab.at, from, bytes);
        commit_copies();
    }
#pragma unroll 1
    for (int at = 0; at < count; ++at) {
        if (!whole) {
            if (at + 1 < count) copy_bytes(slab.at + (at + 1) % 2 * bytes, from + int64_t{at + 1} * bytes, bytes);
            commit_copies();
            wait_copies<1>();
            __syncthreads();
        }
        const int first = at * slab.segments;
        body(first, all - first < slab.segments ? all - first : slab.segments, factor(at % 2));
        if (!whole) __syncthreads();
    }
    if (!whole) wait_copies<0>();
}

// The share of a warp in a tile of 16 rows for each group, at most one group for each of `warps` warps from number `begin` on: 16
// rows, and of the jobs with these rows every `step`-th from `first` on. None if first is step.
struct WarpShare {
    int row, first, step;

    COMPACTER_DEVICE WarpShare(const Divisor& by_groups, int begin, int warps) {
        const int warp = threadIdx.x / 32 - begin, before = by_groups.quotient(max(warp, 0));
        step = by_groups.quotient(warps);
        first = warp < 0 ? step : min(before, step);
        row = (warp - before * static_cast<int>(by_groups.divisor)) * 16;
    }
    COMPACTER_DEVICE explicit WarpShare(const Divisor& by_groups) : WarpShare(by_groups, 0, blockDim.x / 32) {}
};

// sum[c / 8] += sum_u x[row, u] s_c[u] over `segments` of a slab for 8 * columns numbers c, as `contract` (columns.h): each right
// operand is one ldmatrix, and each left one is formed once. Whole: as LaneRows. Ahead: segments whose loads are in flight.
template <bool Whole, int Ahead, class T, int Most>
COMPACTER_DEVICE void contract_wide(const LaneRows<const T>& rows, const Parts& factor, int columns, int segments,
                                    float (&sum)[Most][4]) {
    constexpr int both = T::parts == 1 ? 2 : 1;  // columns whose products alternate, so that none waits for the one before it
    const Lane lane;
    const uint32_t zero = threadIdx.y;  // which the compiler does not know: else it copies a left operand for each product
    const uint16_t* at = factor.first + lane.index % 8 * factor.stride + lane.index / 8 * 8;
    Eight<T> next[Ahead][2];
    const auto load = [&](Eight<T>(&to)[2], int of) {
        if (of >= segments) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) to[half] = rows.template load<Whole>(lane.g + half * 8, of * segment + lane.t * 8);
    };
#pragma unroll
    for (int j = 0; j < Ahead; ++j) load(next[j], j);
#pragma unroll 1
    for (int first = 0; first < segments; first += Ahead)
#pragma unroll
        for (int j = 0; j < Ahead; ++j, at += segment) {
            if (first + j >= segments) break;
            uint32_t above[4][T::parts], below[4][T::parts], left[T::parts][2][4];
            to_parts(next[j][0], above);
            to_parts(next[j][1], below);
#pragma unroll
            for (int part = 0; part < T::parts; ++part)
#pragma unroll
                for (int e = 0; e < 8; ++e) left[part][e / 4][e % 4] = (e % 2 ? below[e / 2][part] : above[e / 2][part]) ^ zero;
            load(next[j], first + j + Ahead);
            const uint16_t* from = at;
#pragma unroll
            for (int column = 0; column < Most; column += both, from += both * 8 * factor.stride) {
                if (column >= columns) break;
                float apart[both][4] = {};
                uint32_t f[T::factor_parts][both][4];
                const int step = column + 1 < columns ? 8 * factor.stride : 0;
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part)
#pragma unroll
                    for (int k = 0; k < both; ++k)
                        load_matrices(f[part][k], from + k * step + part * factor.part);
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part)
#pragma unroll
                    for (int of_x = 0; of_x < T::parts; ++of_x) {
                        if (!counts<T::parts, T::factor_parts>(of_x, part)) continue;
#pragma unroll
                        for (int half = 0; half < 2; ++half)
#pragma unroll
                            for (int k = 0; k < both; ++k)
                                mma_16x8x16(T::parts == 3 ? apart[k] : sum[column + k], left[of_x][half],
                                            {f[part][k][half * 2], f[part][k][half * 2 + 1]});
                    }
                if constexpr (T::parts == 3)
#pragma unroll
                    for (int k = 0; k < both; ++k)
#pragma unroll
                        for (int e = 0; e < 4; ++e) sum[column + k][e] += apart[k][e];
            }
        }
}

// The sums Z[row, c] of a slab, for the rows of a tile. It calls store(c, token, chunk, Z[row, c], Z[row, c + 1]) for even c.
template <class T, int Ahead = 1, class Store>
COMPACTER_DEVICE void contract_slab(const TileRows<const T>& x, const WarpShare& share, const Parts& factor, int all, int first,
                                    int segments, const Store& store) {
    const Lane lane;
    if (share.first == share.step) return;
    const LaneRows<const T> rows = x.of_lane(share.row).from(first * segment);
    int token[2], chunk[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = share.row + lane.g + half * 8;
        token[half] = x.by_n.quotient(row);
        chunk[half] = row < x.rows ? row - token[half] * x.n : -1;
    }
    const bool upper = rows.upper_width > 0, lower = rows.lower_width > 0;
    // The warps of the same rows share the factors, in eights, of which each has at most `sums_at_once` in registers.
    const int each = min(sums_at_once, round_up((all + share.step - 1) / share.step, 8));
    for (int begin = share.first * each; begin < all; begin += share.step * each) {
        const int columns = min(each, all - begin) / 8;
        float sum[sums_at_once / 8][4] = {};
        const Parts its{factor.first + begin * factor.stride, factor.stride, factor.part};
        // Rows that are not whole take more registers.
        if (x.whole()) contract_wide<true, Ahead, T>(rows, its, columns, segments, sum);
        else contract_wide<false, 1, T>(rows, its, columns, segments, sum);
#pragma unroll
        for (int column = 0; column < sums_at_once / 8; ++column) {
            if (column >= columns) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool real = half ? lower : upper;
                const float low = real ? sum[column][half * 2] : 0.f, high = real ? sum[column][half * 2 + 1] : 0.f;
                if (chunk[half] >= 0) store(begin + column * 8 + lane.t * 2, token[half], chunk[half], low, high);
            }
        }
    }
}

// The rows of the output and of the residual, if there is one, that a warp has in an expansion. Both are the same rows.
template <class T>
struct ExpandedRows {
    WarpShare share;
    LaneRows<T> out;
    LaneRows<const T> residual{};

    COMPACTER_DEVICE ExpandedRows(const TileRows<T>& output, const T* all_of_residual)
        : share(output.by_groups), out(output.of_lane(share.row)) {
        if (!all_of_residual) return;
        residual = {all_of_residual + (out.upper - output.all), all_of_residual + (out.lower - output.all), out.upper_width,
                    out.lower_width, out.vectors};
    }
    COMPACTER_DEVICE bool none() const { return share.first == share.step; }
};

// out[row, u] = residual[row, u] + sum_c V[row, c] t_c[u] for the rows of a tile and a slab of u. V is [part][c][row], with
// zeros up to the next multiple of 16 c; `all` is that of the rows of t, a multiple of eight. FactorParts: those of t_c.
template <bool Whole, class T, int FactorParts = T::factor_parts>
COMPACTER_DEVICE void expand_slab(const Parts& v, int all, const Parts& factor, int first, int segments,
                                  const TileRows<const T>& residual, const TileRows<T>& output) {
    constexpr int parts = T::factor_parts;
    const Lane lane;
    const ExpandedRows<T> rows(output, residual.all);
    const WarpShare& share = rows.share;
    if (rows.none()) return;
    const int matrix = lane.index / 8, row = lane.index % 8;
    const uint16_t* const operand = v.first + (row + matrix / 2 * 8) * v.stride + share.row + matrix % 2 * 8;
    // Sixteen c of two products at once, or eight of four.
    const uint16_t* const from = factor.first + (row + matrix % 2 * 8) * factor.stride + matrix / 2 * 8;
    const uint16_t* const last = factor.first + row * factor.stride + matrix * 8;
    for (int at = share.first; at < segments; at += share.step) {
        const int column = (first + at) * segment + lane.t * 8;
        Eight<T> before[2] = {zeros<T>(), zeros<T>()};  // the residual
        if (residual.all)
#pragma unroll
            for (int half = 0; half < 2; ++half) before[half] = rows.residual.template load<Whole>(lane.g + half * 8, column);
        float sum[4][4] = {};
        const auto add_residual = [&] {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float value[8];
                to_floats(before[half], value);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[j / 2][half * 2 + j % 2] += value[j];
            }
        };
        if constexpr (T::parts == 3) add_residual();  // else it comes while the products are computed
        const auto add = [&](int c, auto both) {  // 16 numbers c, or the last eight
            float apart[4][4] = {};
            float(&total)[4][4] = parts == 3 ? apart : sum;
            uint32_t a[parts][4];
#pragma unroll
            for (int part = 0; part < parts; ++part) load_matrices_transposed(a[part], operand + part * v.part + c * v.stride);
#pragma unroll
            for (int part = 0; part < FactorParts; ++part) {
                const int there = part * factor.part + c * factor.stride + at * segment;
                uint32_t f[2][4];
                if constexpr (decltype(both)::value) {
                    load_matrices_transposed(f[0], from + there);
                    load_matrices_transposed(f[1], from + there + 16);
                } else {
                    load_matrices_transposed(f[0], last + there);
                }
#pragma unroll
                for (int of_v = 0; of_v < parts; ++of_v) {
                    if (!counts<parts, parts>(of_v, part)) continue;
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if constexpr (decltype(both)::value)
                            mma_16x8x16(total[j], a[of_v], {f[j / 2][j % 2 * 2], f[j / 2][j % 2 * 2 + 1]});
                        else
                            mma_16x8x8(total[j], {a[of_v][0], a[of_v][1]}, f[0][j]);
                }
            }
            if constexpr (parts == 3)
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[j][e] += apart[j][e];
        };
        int c = 0;
#pragma unroll 1  // else the compiler makes four copies from sm_100 on, and spills
        for (; c + 8 < all; c += 16) add(c, std::true_type{});
        if (c < all) add(c, std::false_type{});
        if constexpr (T::parts != 3) add_residual();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float value[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) value[j] = sum[j / 2][half * 2 + j % 2];
            rows.out.store(lane.g + half * 8, column, from_floats(T{}, value));
        }
    }
}

// The rows of a tile without an adapter become those of the residual, or NaN.
template <class T>
COMPACTER_DEVICE void copy_tile(int width, const TileRows<const T>& residual, const TileRows<T>& output, bool poison) {
    const Lane lane;
    const ExpandedRows<T> rows(output, residual.all);
    const WarpShare& share = rows.share;
    if (rows.none()) return;
    float nan[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) nan[j] = __uint_as_float(0x7fffffff);
    for (int at = share.first; at < segments(width); at += share.step) {
        const int column = at * segment + lane.t * 8;
#pragma unroll
        for (int row = lane.g; row < 16; row += 8) {
            const Eight<T> eight = poison ? from_floats(T{}, nan) : rows.residual.template load<false>(row, column);
            rows.out.store(row, column, eight);
        }
    }
}

// Stores a number of V or dZ as parts, [part][c][row].
template <class T>
COMPACTER_DEVICE void store_parts(const Parts& to, int c, int row, float value) {
    uint32_t pair[T::factor_parts];
    split(value, 0.f, pair);
#pragma unroll
    for (int part = 0; part < T::factor_parts; ++part)
        to.first[part * to.part + c * to.stride + row] = static_cast<uint16_t>(pair[part]);
}
// The same of four neighbouring rows.
template <class T>
COMPACTER_DEVICE void store_parts(const Parts& to, int c, int row, const Quad<4>& four) {
    uint32_t low[T::factor_parts], high[T::factor_parts];
    split(four.at[0], four.at[1], low);
    split(four.at[2], four.at[3], high);
#pragma unroll
    for (int part = 0; part < T::factor_parts; ++part)
        *reinterpret_cast<uint2*>(to.first + part * to.part + c * to.stride + row) = make_uint2(low[part], high[part]);
}
COMPACTER_DEVICE Parts parts_at(int offset, int stride, int terms) {
    return {reinterpret_cast<uint16_t*>(shared_memory() + offset), stride, round_up(terms, 16) * stride};
}

}  // namespace compacter::cuda
