// The wide factors in shared memory: one copy for the right operands of both matrix products.
//
// For a product 16 x 8 x 16, lane (g, t) = (lane / 4, lane % 4) gives two pairs of numbers of
// column g of the right operand. The order of the summed numbers in a product is free, and so is
// the column of the output that is column g. They are chosen such that lane t of x and of the
// output has eight neighbours, 16 bytes of bf16. In one segment of 32 columns u:
//
//     u          0 1 2 3 4 5 6 7 | 8 ... 15 | 16 ... 23 | 24 ... 31   in memory: lane 0 | 1 | 2 | 3
//     pair j     0   1   2   3   | 0 1 2 3  | 0 1 2 3   | 0 1 2 3
//
//     contraction   Z[row, c] += sum_u x[row, u] s_c[u]    pairs 0, 1 of each lane, then pairs 2, 3
//     expansion     out[row, u] += sum_c V[row, c] t_c[u]  pair j of each lane in product j, whose
//                                                          column g is u = 8 (g / 2) + 2 j + g % 2
// So a factor is [part][c][segment][pair j][t][2] in bf16, all pairs 0 before all pairs 1, 2, 3. A
// contraction reads the pairs of a lane, an expansion eight c by eight numbers (ldmatrix.trans).
#pragma once

#include "numbers.h"
#include "sizes.h"

namespace compacter::cuda {

// Numbers in parts, [part][c][...] in bf16.
struct Parts {
    uint16_t* first;
    int stride, part;  // numbers from one c to the next, and from one part to the next
};

// The stride is an odd multiple of 16 bytes, so that eight c are in different banks.
COMPACTER_BOTH constexpr int factor_stride(int width) { return segments(width) * segment + 8; }

COMPACTER_BOTH constexpr int64_t factor_bytes(int width, int terms, int parts) {
    return int64_t{2} * parts * terms * factor_stride(width);
}

COMPACTER_DEVICE Parts factor_parts(unsigned char* at, int width, int terms) {
    return {reinterpret_cast<uint16_t*>(at), factor_stride(width), terms * factor_stride(width)};
}

// The position of the pair of columns u, u + 1.
COMPACTER_DEVICE int place_of(int u) { return u / segment * segment + u % 8 / 2 * 8 + u % segment / 8 * 2; }

// All threads of the block stage a factor, four pairs in flight. ask(c, u) loads an existing one.
template <class T, class Ask>
COMPACTER_DEVICE void stage_factor(const Parts& to, int width, int terms, float scale, const Ask& ask) {
    constexpr int ahead = 4;
    const int pairs = segments(width) * segment / 2, step = blockDim.x;
    for (int first = threadIdx.x; first < terms * pairs; first += ahead * step) {
        Asked asked[ahead][2];
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = first + j * step, c = e / pairs, u = (e - c * pairs) * 2, there = c < terms ? c : terms - 1;
            asked[j][0] = ask(there, u < width ? u : width - 1);
            asked[j][1] = ask(there, u + 1 < width ? u + 1 : width - 1);
        }
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = first + j * step, c = e / pairs, u = (e - c * pairs) * 2;
            if (c >= terms) break;
            uint32_t pair[T::factor_parts];
            split(u < width ? asked[j][0].value() * scale : 0.f, u + 1 < width ? asked[j][1].value() * scale : 0.f, pair);
#pragma unroll
            for (int part = 0; part < T::factor_parts; ++part)
                *reinterpret_cast<uint32_t*>(to.first + part * to.part + c * to.stride + place_of(u)) = pair[part];
        }
    }
}

// The pairs of column c = 8 group + g in segment 0, for a contraction, unused if c is missing.
COMPACTER_DEVICE const uint16_t* contraction_column(const Parts& from, int terms, int group, int g, int t) {
    const int c = group * 8 + g;
    return from.first + (c < terms ? c : 0) * from.stride + t * 2;
}
COMPACTER_DEVICE uint32_t pair_of(const uint16_t* column, int j) {
    return *reinterpret_cast<const uint32_t*>(column + j * 8);
}

// The right operands of the four products of a segment in an expansion, c = 8 step to 8 step + 7. A
// missing c reads one of another bank, which meets zeros.
COMPACTER_DEVICE void load_expansion(uint32_t (&b)[4], const Parts& from, int terms, int part, int step, int at, int lane) {
    const int c = step * 8 + lane % 8, there = c < terms ? c : step ? c - 8 : 0;
    load_matrices_transposed(b, from.first + part * from.part + there * from.stride + at * segment + lane / 8 * 8);
}

}  // namespace compacter::cuda
