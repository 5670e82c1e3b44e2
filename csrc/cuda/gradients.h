// The gradients of the wide factors: products over the rows of a tile, summed in shared memory.
//
//   sums[u, c] += sum_row x[row, u] B[row, c], B = dZ for x, [V2 | 1 if c - m is the row's q] for g
//
// The left operand is x transposed, by ldmatrix.trans for 16-bit numbers and plain loads for fp32.
// B is [part][c][row], so that two rows are a pair. A job is 16 columns u with all c. Its sums are
// [u / 16][c / 8][lane], one vector each. Tensor cores truncate what they add to an accumulator, so
// the errors of many tiles would add up. Each tile has a new one, which fp32 additions round.
#pragma once

#include "columns.h"

namespace compacter::cuda {

// The vectors that the sums of a job take for `terms` numbers c.
COMPACTER_BOTH constexpr int sum_vectors(int terms) { return terms / 8 * 32 + (terms % 8 + 1) / 2 * 8; }

// The index of a lane's vector for c / 8 = column, or -1.
COMPACTER_DEVICE int sum_place(int terms, int column, const Lane& lane) {
    const int left = (terms - column * 8 + 1) / 2, lanes = left < 4 ? left : 4;
    return lane.t < lanes ? column * 32 + lane.g * lanes + lane.t : -1;
}

// The right operand of rows `row` to `row` + 15 and c / 8 = column.
COMPACTER_DEVICE void load_right(uint32_t (&b)[2], const Parts& from, int part, int column, int row, const Lane& lane) {
    const uint16_t* at = from.first + part * from.part + (column * 8 + lane.g) * from.stride + row + lane.t * 2;
    b[0] = *reinterpret_cast<const uint32_t*>(at);
    b[1] = *reinterpret_cast<const uint32_t*>(at + 8);
}

// The left operand in parts: rows `row` to `row` + 15 of columns u to u + 15, transposed.
COMPACTER_DEVICE void load_transposed(uint32_t (&a)[1][4], const SharedRows<bf16>& rows, int row, int u, const Lane& lane) {
    const int at = row + (lane.index & 7) + lane.index / 16 * 8;
    load_matrices_transposed(a[0], rows.first + at * rows.stride + (u + (lane.index / 8 & 1) * 8) * 2);
}
COMPACTER_DEVICE void load_transposed(uint32_t (&a)[2][4], const SharedRows<f16>& rows, int row, int u, const Lane& lane) {
    const int at = row + (lane.index & 7) + lane.index / 16 * 8;
    uint32_t raw[4];
    load_matrices_transposed(raw, rows.first + at * rows.stride + (u + (lane.index / 8 & 1) * 8) * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float low, high;
        uint32_t pair[2];
        widen(f16{}, raw[j], low, high);
        split(low, high, pair);
        a[0][j] = pair[0];
        a[1][j] = pair[1];
    }
}
COMPACTER_DEVICE void load_transposed(uint32_t (&a)[3][4], const SharedRows<f32>& rows, int row, int u, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const unsigned char* from = rows.first + (row + lane.t * 2 + j / 2 * 8) * rows.stride + (u + lane.g + j % 2 * 8) * 4;
        uint32_t pair[3];
        split(*reinterpret_cast<const float*>(from), *reinterpret_cast<const float*>(from + rows.stride), pair);
#pragma unroll
        for (int part = 0; part < 3; ++part) a[part][j] = pair[part];
    }
}

// One job: columns u to u + 15 with all c, at most Most groups of eight, five of them in registers.
template <class T, int Most>
COMPACTER_DEVICE void add_gradient(const SharedRows<T>& x, int u, int rows, const Parts& b, uint4* sums, int terms) {
    constexpr int batch = Most < 5 ? Most : 5;
    const Lane lane;
    const int columns = eights(terms);
    for (int first = 0; first < columns; first += batch) {
        float sum[batch][4] = {};
        for (int row = 0; row < rows; row += 16) {
            uint32_t a[T::parts][4];
            load_transposed(a, x, row, u, lane);
#pragma unroll
            for (int j = 0; j < batch; ++j) {
                if (first + j >= columns) break;
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part) {
                    uint32_t right[2];
                    load_right(right, b, part, first + j, row, lane);
#pragma unroll
                    for (int of_x = 0; of_x < T::parts; ++of_x)
                        if (counts<T::parts, T::factor_parts>(of_x, part)) mma_16x8x16(sum[j], a[of_x], right);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < batch; ++j) {
            const int at = sum_place(terms, first + j, lane);
            if (at < 0) continue;
            uint4 v = sums[at];
#pragma unroll
            for (int e = 0; e < 4; ++e) word(v, e) = __float_as_uint(__uint_as_float(word(v, e)) + sum[j][e]);
            sums[at] = v;
        }
    }
}

// body(u, c, sum) for all sums of a width, on all warps of the block.
template <class Body>
COMPACTER_DEVICE void for_each_sum(const uint4* sums, int width, int terms, const Body& body) {
    const Lane lane;
    const int columns = eights(terms);
    for (int job = threadIdx.x / 32; job < (width + 15) / 16 * columns; job += blockDim.x / 32) {
        const int column = job % columns, at = sum_place(terms, column, lane), u = job / columns * 16 + lane.g;
        if (at < 0) continue;
        const uint4 v = sums[job / columns * sum_vectors(terms) + at];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int c = column * 8 + lane.t * 2 + j % 2;
            if (c < terms && u + j / 2 * 8 < width) body(u + j / 2 * 8, c, __uint_as_float(word(v, j)));
        }
    }
}

}  // namespace compacter::cuda
