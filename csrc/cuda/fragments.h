// The factors of the wide sides as right operands of the matrix instructions, in the order in which lanes take them.
//
// A product 16 x 8 x 16 takes of its right side, from lane (g, t) = (lane / 4, lane % 4), two pairs of numbers of column g.
// Which 16 of the numbers that are summed over sit in one product is free, and so is which column of the output is column g:
//
//   contraction   Z[row, c] += sum_u x[row, u] s_c[u]          one segment, 32 columns u:
//       u    0 ...  7 | 8 ... 15 | 16 ... 23 | 24 ... 31
//            lane t=0 |   t=1    |    t=2    |    t=3         each lane takes the 16 bytes of x that it loads anyway,
//       and of s_c, c = g, the same eight u: pairs 0, 1 in one product, pairs 2, 3 in the next.
//
//   expansion     out[row, u] += sum_c V[row, c] t_c[u]        one segment, 32 columns u, four products j:
//       lane t receives of product j its columns 2t, 2t+1, and owns the eight u from 8t: product j, column g is
//       u = 8 (g / 2) + 2 j + g % 2, so that the lane's pairs of j = 0 ... 3 lie side by side: one store of 16 bytes.
#pragma once

#include "element.h"
#include "sizes.h"

namespace compacter::cuda {

// Vectors of 16 bytes that the fragments take.
template <class T>
COMPACTER_BOTH constexpr int fragment_vectors(int width, int terms) {
    return segments(width) * eights(terms) * T::factor_parts * 32;
}

// to[segment][c / 8][part][lane]; factor(c, u) is asked for c < terms and u < width.
template <class T, class Factor>
COMPACTER_DEVICE void pack_contraction(uint4* to, int width, int terms, const Factor& factor) {
    const int groups = eights(terms);
    for (int e = threadIdx.x; e < segments(width) * groups * 32; e += blockDim.x) {
        const int lane = e % 32, group = e / 32 % groups, c = group * 8 + lane / 4;
        const int u = e / 32 / groups * segment + lane % 4 * 8;
        const auto number = [&](int at) { return c < terms && at < width ? factor(c, at) : 0.f; };
        uint32_t pairs[4][T::factor_parts];
#pragma unroll
        for (int j = 0; j < 4; ++j) split(number(u + 2 * j), number(u + 2 * j + 1), pairs[j]);
#pragma unroll
        for (int part = 0; part < T::factor_parts; ++part)
            to[(e / 32 * T::factor_parts + part) * 32 + lane] =
                make_uint4(pairs[0][part], pairs[1][part], pairs[2][part], pairs[3][part]);
    }
}

// to[segment][c / 8][part][lane], the words of a vector being the products j.
template <class T, class Factor>
COMPACTER_DEVICE void pack_expansion(uint4* to, int width, int terms, const Factor& factor) {
    const int groups = eights(terms);
    for (int e = threadIdx.x; e < segments(width) * groups * 32; e += blockDim.x) {
        const int lane = e % 32, g = lane / 4, c = e / 32 % groups * 8 + lane % 4 * 2;
        const int u = e / 32 / groups * segment + g / 2 * 8 + g % 2;
        const auto number = [&](int term, int at) { return term < terms && at < width ? factor(term, at) : 0.f; };
        uint32_t pairs[4][T::factor_parts];
#pragma unroll
        for (int j = 0; j < 4; ++j) split(number(c, u + 2 * j), number(c + 1, u + 2 * j), pairs[j]);
#pragma unroll
        for (int part = 0; part < T::factor_parts; ++part)
            to[(e / 32 * T::factor_parts + part) * 32 + lane] =
                make_uint4(pairs[0][part], pairs[1][part], pairs[2][part], pairs[3][part]);
    }
}

}  // namespace compacter::cuda
