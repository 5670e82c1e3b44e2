// The wide sides of a tile, for a block: contraction and expansion of its rows, with factors that need not fit whole.
#pragma once

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
        return factor_parts(shared_memory() + slab.at + buffer * bytes, slab.segments * segment, slab.terms);
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

// The share of a warp in a tile of 16 * groups rows, at most 16 for each warp: 16 rows, and of the jobs with these rows every
// `step`-th from `first` on. None if first is step.
struct WarpShare {
    int row, first, step;

    COMPACTER_DEVICE explicit WarpShare(int rows) {
        const int groups = rows / 16, warp = threadIdx.x / 32;
        step = blockDim.x / 32 / groups;
        first = min(warp / groups, step);
        row = (warp - warp / groups * groups) * 16;
    }
};

// sum[c / 8] += sum_u x[row, u] s_c[u] over `segments` of a slab, as `contract` (columns.h), for many factors: each right operand
// is one ldmatrix, and each left one is formed once.
template <class T, int Most>
COMPACTER_DEVICE void contract_wide(const LaneRows<const T>& rows, const Parts& factor, int terms, int segments,
                                    float (&sum)[Most][4]) {
    constexpr int ahead = T::parts == 3 ? 1 : 2;  // segments that are loaded before the first is used
    const Lane lane;
    const int columns = eights(terms), c = lane.index % 8;
    const uint32_t zero = threadIdx.y;  // which the compiler does not know: else it copies a left operand for each product
    const uint16_t* const from = factor.first + lane.index / 8 * 8;
#pragma unroll 1
    for (int first = 0; first < segments; first += ahead) {
        Eight<T> upper[ahead], lower[ahead];
#pragma unroll
        for (int j = 0; j < ahead; ++j)
            if (first + j < segments) {
                upper[j] = rows.load(lane.g, (first + j) * segment + lane.t * 8);
                lower[j] = rows.load(lane.g + 8, (first + j) * segment + lane.t * 8);
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
#pragma unroll
            for (int column = 0; column < Most; ++column) {
                if (column >= columns) break;
                const int there = column * 8 + c < terms ? column * 8 + c : c < terms ? c : 0;  // a missing one: of its banks
                const uint16_t* at = from + there * factor.stride + (first + j) * segment;
                float apart[4] = {};
                float(&total)[4] = T::parts == 3 ? apart : sum[column];
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part, at += factor.part) {
                    uint32_t f[4];
                    load_matrices(f, at);
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

// The numbers Z[row, c] of a tile of `count` rows: adds them to the floats of shared memory at to(row, c), or sets these if
// the slab is the first. None is at -1.
template <class T, class To>
COMPACTER_DEVICE void contract_slab(const TileRows<const T>& x, int count, const Parts& factor, int terms, int first, int segments,
                                    const To& to) {
    constexpr int at_once = factors_at_once<T>;
    const Lane lane;
    const WarpShare share(count);
    const LaneRows<const T> rows = x.of_lane(share.row).from(first * segment);
    // The warps of the same rows share the factors, in eights, of which each has at most `at_once` in registers.
    const int each = min(at_once, round_up((terms + share.step - 1) / share.step, 8));
    for (int begin = share.first * each; share.first < share.step && begin < terms; begin += share.step * each) {
        const int end = min(begin + each, terms);
        float sum[at_once / 8][4] = {};
        contract_wide<T>(rows, {factor.first + begin * factor.stride, factor.stride, factor.part}, end - begin, segments, sum);
#pragma unroll
        for (int column = 0; column < at_once / 8; ++column) {
            if (begin + column * 8 >= end) break;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = begin + column * 8 + lane.t * 2 + e % 2, at = share.row + lane.g + e / 2 * 8;
                const int place = c < end && at < x.rows ? to(at, c) : -1;
                if (place < 0) continue;
                float& number = floats_at(0)[place];
                number = first ? number + sum[column][e] : sum[column][e];
            }
        }
    }
}

// The right operand of c = 8 step to 8 step + 7 as load_expansion, where all of them may be missing.
COMPACTER_DEVICE void load_terms(uint32_t (&b)[4], const Parts& from, int terms, int part, int step, int at, int lane) {
    const int c = step * 8 + lane % 8, there = c < terms ? c : lane % 8 < terms ? lane % 8 : 0;
    load_matrices_transposed(b, from.first + part * from.part + there * from.stride + at * segment + lane / 8 * 8);
}

// out[row, u] = residual[row, u] + sum_c V[row, c] t_c[u] for the rows of a tile and a slab of u. V is [part][c][row], with
// zeros up to the next multiple of 16 c. poison: all is NaN. residual: null or as out.
// FactorParts: those of t_c.
template <class T, int FactorParts = T::factor_parts>
COMPACTER_DEVICE void expand_slab(const Parts& v, int count, int terms, const Parts& factor, int first, int segments,
                                  const TileRows<const T>& residual, const TileRows<T>& output, bool poison) {
    constexpr int parts = T::factor_parts;
    const Lane lane;
    const WarpShare share(count);
    const LaneRows<T> out = output.of_lane(share.row);
    LaneRows<const T> added{};
    if (residual.all) added = residual.of_lane(share.row);
    const uint16_t* operand = v.first + (lane.index % 8 + lane.index / 16 * 8) * v.stride + share.row + lane.index / 8 % 2 * 8;
    for (int at = share.first; share.first < share.step && at < segments; at += share.step) {
        const int column = (first + at) * segment + lane.t * 8;
        float value[2][8];
        to_floats(added.load(lane.g, column), value[0]);
        to_floats(added.load(lane.g + 8, column), value[1]);
        float sum[4][4];
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
                uint32_t low[4], high[4];
                load_terms(low, factor, terms, part, c / 8, at, lane.index);
                if constexpr (decltype(both)::value) load_terms(high, factor, terms, part, c / 8 + 1, at, lane.index);
#pragma unroll
                for (int of_v = 0; of_v < parts; ++of_v) {
                    if (!counts<parts, parts>(of_v, part)) continue;
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if constexpr (decltype(both)::value) mma_16x8x16(total[j], a[of_v], {low[j], high[j]});
                        else mma_16x8x8(total[j], {a[of_v][0], a[of_v][1]}, low[j]);
                }
            }
            if constexpr (parts == 3)
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[j][e] += apart[j][e];
        };
        int c = 0;
        for (; c + 8 < terms; c += 16) add(c, std::true_type{});
        if (c < terms) add(c, std::false_type{});
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 8; ++j) value[half][j] = poison ? __uint_as_float(0x7fffffff) : sum[j / 2][half * 2 + j % 2];
            out.store(lane.g + half * 8, column, from_floats(T{}, value[half]));
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
COMPACTER_DEVICE Parts parts_at(int offset, int stride, int terms) {
    return {reinterpret_cast<uint16_t*>(shared_memory() + offset), stride, round_up(terms, 16) * stride};
}

}  // namespace compacter::cuda
