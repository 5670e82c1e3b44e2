// The wide sides of a tile, for a block: contraction and expansion of its rows, with factors that need not fit whole.
#pragma once

#include "middle.h"
#include "tiles.h"

namespace compacter::cuda {

// Factors of a contraction that a warp has in registers, beside the parts of x.
template <class T>
constexpr int factors_at_once = T::parts == 3 ? 32 : 64;

// All threads of the block start to copy a multiple of 16 bytes.
COMPACTER_DEVICE void copy_bytes(int to, const unsigned char* from, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) copy_async(shared_memory() + to + at, from + at, true);
}

// Calls body(first segment, segments, factor) for each slab of a wide factor, whose slabs begin at `from` in memory. staged:
// whether a whole one is there already.
template <class Body>
COMPACTER_DEVICE void for_each_slab(const Slab& slab, int width, const unsigned char* from, int bytes, bool staged, const Body& body) {
    const int all = segments(width);
    const auto factor = [&](int buffer) {
        return factor_parts(shared_memory() + slab.at + buffer * bytes, slab.segments * segment, slab.rows);
    };
    if (slab.whole) {
        if (!staged) {
            __syncthreads();
            copy_bytes(slab.at, from, bytes);
            commit_copies();
            wait_copies<0>();
            __syncthreads();
        }
        return body(0, all, factor(0));
    }
    const int count = (all + slab.segments - 1) / slab.segments;
    __syncthreads();
    copy_bytes(slab.at, from, bytes);
    commit_copies();
    for (int at = 0; at < count; ++at) {
        if (at + 1 < count) copy_bytes(slab.at + (at + 1) % 2 * bytes, from + int64_t{at + 1} * bytes, bytes);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const int first = at * slab.segments;
        body(first, all - first < slab.segments ? all - first : slab.segments, factor(at % 2));
        __syncthreads();
    }
    wait_copies<0>();
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
// operand is one ldmatrix, and each left one is formed once. Whole: as LaneRows.
template <bool Whole, class T, int Most>
COMPACTER_DEVICE void contract_wide(const LaneRows<const T>& rows, const Parts& factor, int columns, int segments,
                                    float (&sum)[Most][4]) {
    constexpr int ahead = T::parts == 3 ? 1 : 2;  // segments that are loaded before the first is used
    const Lane lane;
    const uint32_t zero = threadIdx.y;  // which the compiler does not know: else it copies a left operand for each product
    const uint16_t* const from = factor.first + lane.index % 8 * factor.stride + lane.index / 8 * 8;
#pragma unroll 1
    for (int first = 0; first < segments; first += ahead) {
        Eight<T> upper[ahead], lower[ahead];
#pragma unroll
        for (int j = 0; j < ahead; ++j)
            if (first + j < segments) {
                upper[j] = rows.template load<Whole>(lane.g, (first + j) * segment + lane.t * 8);
                lower[j] = rows.template load<Whole>(lane.g + 8, (first + j) * segment + lane.t * 8);
            }
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            if (first + j >= segments) break;
            uint32_t above[4][T::parts], below[4][T::parts], left[T::parts][2][4];
            to_parts(upper[j], above);
            to_parts(lower[j], below);
#pragma unroll
            for (int part = 0; part < T::parts; ++part)
#pragma unroll
                for (int e = 0; e < 8; ++e) left[part][e / 4][e % 4] = (e % 2 ? below[e / 2][part] : above[e / 2][part]) ^ zero;
            const uint16_t* at = from + (first + j) * segment;
#pragma unroll
            for (int column = 0; column < Most; ++column, at += 8 * factor.stride) {
                if (column >= columns) break;
                float apart[4] = {};
                float(&total)[4] = T::parts == 3 ? apart : sum[column];
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part) {
                    uint32_t f[4];
                    load_matrices(f, at + part * factor.part);
#pragma unroll
                    for (int of_x = 0; of_x < T::parts; ++of_x) {
                        if (!counts<T::parts, T::factor_parts>(of_x, part)) continue;
                        mma_16x8x16(total, left[of_x][0], {f[0], f[1]});
                        mma_16x8x16(total, left[of_x][1], {f[2], f[3]});
                    }
                }
                if constexpr (T::parts == 3)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[column][e] += apart[e];
            }
        }
    }
}

// The numbers Z[row, c] of the rows of a tile: adds them to X[c][token][p] of shared memory, n for each token, or sets these
// if the slab is the first. to(c, chunk of the row): where X[c] begins, in floats, or -1 for none.
template <class T, class To>
COMPACTER_DEVICE void contract_slab(const TileRows<const T>& x, const WarpShare& share, const Parts& factor, int all, int first,
                                    int segments, int n, const To& to) {
    constexpr int at_once = factors_at_once<T>;
    const Lane lane;
    if (share.first == share.step) return;
    const LaneRows<const T> rows = x.of_lane(share.row).from(first * segment);
    int place[2], chunk[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = share.row + lane.g + half * 8, token = x.by_n.quotient(row);
        chunk[half] = row - token * x.n;
        place[half] = row < x.rows ? token * n + chunk[half] : -1;
    }
    const bool upper = rows.upper_width > 0, lower = rows.lower_width > 0;
    // The warps of the same rows share the factors, in eights, of which each has at most `at_once` in registers.
    const int each = min(at_once, round_up((all + share.step - 1) / share.step, 8));
    for (int begin = share.first * each; begin < all; begin += share.step * each) {
        const int columns = min(each, all - begin) / 8;
        float sum[at_once / 8][4] = {};
        const Parts its{factor.first + begin * factor.stride, factor.stride, factor.part};
        if (x.whole()) contract_wide<true, T>(rows, its, columns, segments, sum);
        else contract_wide<false, T>(rows, its, columns, segments, sum);
#pragma unroll
        for (int column = 0; column < at_once / 8; ++column) {
            if (column >= columns) break;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = begin + column * 8 + lane.t * 2 + e % 2, at = to(c, chunk[e / 2]);
                if (at < 0 || place[e / 2] < 0) continue;
                float& number = floats_at(0)[at + place[e / 2]];
                const float added = (e < 2 ? upper : lower) ? sum[column][e] : 0.f;
                number = first ? number + added : added;
            }
        }
    }
}

// out[row, u] = residual[row, u] + sum_c V[row, c] t_c[u] for the rows of a tile and a slab of u. V is [part][c][row], with
// zeros up to the next multiple of 16 c; `all` is that of the rows of t, a multiple of eight. FactorParts: those of t_c.
template <bool Whole, class T, int FactorParts = T::factor_parts>
COMPACTER_DEVICE void expand_slab(const Parts& v, int all, const Parts& factor, int first, int segments,
                                  const TileRows<const T>& residual, const TileRows<T>& output) {
    constexpr int parts = T::factor_parts;
    const Lane lane;
    const WarpShare share(output.by_groups);
    if (share.first == share.step) return;
    const LaneRows<T> out = output.of_lane(share.row);
    LaneRows<const T> added{};
    if (residual.all) added = residual.of_lane(share.row);
    const int matrix = lane.index / 8, row = lane.index % 8;
    const uint16_t* const operand = v.first + (row + matrix / 2 * 8) * v.stride + share.row + matrix % 2 * 8;
    // Sixteen c of two products at once, or eight of four.
    const uint16_t* const from = factor.first + (row + matrix % 2 * 8) * factor.stride + matrix / 2 * 8;
    const uint16_t* const last = factor.first + row * factor.stride + matrix * 8;
    for (int at = share.first; at < segments; at += share.step) {
        const int column = (first + at) * segment + lane.t * 8;
        float value[2][8] = {}, sum[4][4];
        if (residual.all) {
            to_floats(added.template load<Whole>(lane.g, column), value[0]);
            to_floats(added.template load<Whole>(lane.g + 8, column), value[1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = value[e / 2][2 * j + e % 2];
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
        for (; c + 8 < all; c += 16) add(c, std::true_type{});
        if (c < all) add(c, std::false_type{});
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 8; ++j) value[half][j] = sum[j / 2][half * 2 + j % 2];
            out.store(lane.g + half * 8, column, from_floats(T{}, value[half]));
        }
    }
}

// The rows of a tile without an adapter become those of the residual, or NaN.
template <class T>
COMPACTER_DEVICE void copy_tile(int width, const TileRows<const T>& residual, const TileRows<T>& output, bool poison) {
    const Lane lane;
    const WarpShare share(output.by_groups);
    if (share.first == share.step) return;
    const LaneRows<T> out = output.of_lane(share.row);
    LaneRows<const T> added{};
    if (residual.all) added = residual.of_lane(share.row);
    float nan[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) nan[j] = __uint_as_float(0x7fffffff);
    for (int at = share.first; at < segments(width); at += share.step) {
        const int column = at * segment + lane.t * 8;
#pragma unroll
        for (int row = lane.g; row < 16; row += 8) {
            const Eight<T> eight = poison ? from_floats(T{}, nan) : added.template load<false>(row, column);
            out.store(row, column, eight);
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
