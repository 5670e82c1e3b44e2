// The wide sides of a tile: matrix instructions contract and expand 16 rows at once.
#pragma once

#include "fragments.h"

namespace compacter::cuda {

struct Lane {
    int index = threadIdx.x % 32, g = index / 4, t = index % 4;
};

// The rows of a tile in global memory, of which `valid` exist.
template <class T>
struct GlobalRows {
    const T* first;
    int valid, width;
    bool vectors;

    COMPACTER_DEVICE Eight<T> load(int row, int column) const {
        const int count = row < valid ? width - column : 0;
        return load_eight(first + static_cast<int64_t>(row) * width + column, count, vectors);
    }
};

// The rows of a tile in shared memory, whole segments padded with zeros.
template <class T>
struct SharedRows {
    const unsigned char* first;
    int stride;  // bytes

    COMPACTER_DEVICE Eight<T> load(int row, int column) const {
        Eight<T> eight;
        const auto* from = reinterpret_cast<const uint4*>(first + row * stride + column * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int v = 0; v < Eight<T>::vectors; ++v) eight.raw[v] = from[v];
        return eight;
    }
};

struct NoRows {};

// z[token][c][p] = sum_u x[row, u] s_c[u] of rows `row` to `row` + 15 over segments begin to end.
// Tensor cores truncate what they add to an accumulator. For fp32 each segment has a new one, whose
// sum an fp32 addition rounds; the rounding of a 16-bit x is far above the error.
template <class T, class K, class Rows>
COMPACTER_DEVICE void contract(const Rows& rows, int row, const Parts& factor, int begin, int end, const Sizes& s, float* z) {
    constexpr int ahead = K::most_columns > 1 || T::parts > 1 ? 2 : 4;  // segments that are loaded before the first is used
    const Lane lane;
    const int m = K::m(s), columns = eights(m);
    float sum[K::most_columns][4] = {};
    for (int first = begin; first < end; first += ahead) {
        Eight<T> upper[ahead], lower[ahead];
#pragma unroll
        for (int j = 0; j < ahead; ++j)
            if (first + j < end) {
                upper[j] = rows.load(row + lane.g, (first + j) * segment + lane.t * 8);
                lower[j] = rows.load(row + lane.g + 8, (first + j) * segment + lane.t * 8);
            }
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            if (first + j >= end) break;
            uint32_t a[4][T::parts], b[4][T::parts];
            to_parts(upper[j], a);
            to_parts(lower[j], b);
#pragma unroll
            for (int column = 0; column < K::most_columns; ++column) {
                if (column >= columns) break;
                const uint16_t* from = contraction_column(factor, m, column, lane.g, lane.t) + (first + j) * segment;
                float apart[4] = {};
                float(&total)[4] = T::parts == 3 ? apart : sum[column];
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part, from += factor.part) {
                    const uint32_t f[4] = {pair_of(from, 0), pair_of(from, 1), pair_of(from, 2), pair_of(from, 3)};
#pragma unroll
                    for (int of_x = 0; of_x < T::parts; ++of_x) {
                        if (!counts<T::parts, T::factor_parts>(of_x, part)) continue;
                        mma_16x8x16(total, {a[0][of_x], b[0][of_x], a[1][of_x], b[1][of_x]}, {f[0], f[1]});
                        mma_16x8x16(total, {a[2][of_x], b[2][of_x], a[3][of_x], b[3][of_x]}, {f[2], f[3]});
                    }
                }
                if constexpr (T::parts == 3)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[column][e] += apart[e];
            }
        }
    }
    const int n = K::n(s);
#pragma unroll
    for (int column = 0; column < K::most_columns; ++column)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at = row + lane.g + e / 2 * 8, c = column * 8 + lane.t * 2 + e % 2, token = K::by_n(s, at);
            if (c < m) z[(token * m + c) * n + at - token * n] = sum[column][e];
        }
}

// The left operand of an expansion: 16 rows of numbers c < 8 * steps, padded with zeros.
template <class T, int Most>
struct Operand {
    uint32_t pairs[Most][T::factor_parts][2];

    // From [part][c][row].
    COMPACTER_DEVICE Operand(const Parts& from, int row, int steps) {
        const Lane lane;
#pragma unroll
        for (int step = 0; step < Most; ++step) {
            if (step >= steps) break;
#pragma unroll
            for (int part = 0; part < T::factor_parts; ++part) {
                const uint16_t* at = from.first + part * from.part + (step * 8 + lane.t * 2) * from.stride + row + lane.g;
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    pairs[step][part][half] = at[half * 8] | static_cast<uint32_t>(at[half * 8 + from.stride]) << 16;
            }
        }
    }

    // From number(row, c).
    template <class Number>
    COMPACTER_DEVICE Operand(const Number& number, int row, int steps) {
        const Lane lane;
#pragma unroll
        for (int step = 0; step < Most; ++step) {
            if (step >= steps) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = row + lane.g + half * 8, c = step * 8 + lane.t * 2;
                uint32_t pair[T::factor_parts];
                split(number(at, c), number(at, c + 1), pair);
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part) pairs[step][part][half] = pair[part];
            }
        }
    }
};

// out[row, u] = residual[row, u] + sum_c V[row, c] t_c[u] of 16 rows and one segment of a tile, out
template <class T, int Most, class Residual>
COMPACTER_DEVICE void expand(const Operand<T, Most>& v, int steps, int row, int at, const Parts& factor, int terms,
                             const Residual& residual, T* out, int valid, int width, bool vectors) {
    const Lane lane;
    const int column = at * segment + lane.t * 8;
    float value[2][8] = {};
    if constexpr (!std::is_same_v<Residual, NoRows>) {
        to_floats(residual.load(row + lane.g, column), value[0]);
        to_floats(residual.load(row + lane.g + 8, column), value[1]);
    }
    float sum[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = value[e / 2][2 * j + e % 2];
#pragma unroll
    for (int step = 0; step < Most; ++step) {
        if (step >= steps) break;
#pragma unroll
        for (int part = 0; part < T::factor_parts; ++part) {
            uint32_t f[4];
            load_expansion(f, factor, terms, part, step, at, lane.index);
#pragma unroll
            for (int of_v = 0; of_v < T::factor_parts; ++of_v) {
                if (!counts<T::factor_parts, T::factor_parts>(of_v, part)) continue;
#pragma unroll
                for (int j = 0; j < 4; ++j) mma_16x8x8(sum[j], v.pairs[step][of_v], f[j]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int to = row + lane.g + half * 8;
#pragma unroll
        for (int j = 0; j < 8; ++j) value[half][j] = sum[j / 2][half * 2 + j % 2];
        if (to < valid)
            store_eight(out + static_cast<int64_t>(to) * width + column, from_floats(T{}, value[half]), width - column, vectors);
    }
}

}  // namespace compacter::cuda
