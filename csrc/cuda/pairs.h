// Matrix products of pairs of chunks. A group of warps owns a tile of 8 tokens, in bf16. The 16 rows of
// a product are the chunks 2j and 2j + 1 of these tokens. Lane (g, t) = (lane / 4, lane % 4) holds
//
//     a block of x, 16 x 16, as the left operand        the sums of a product with 8 columns
//                           k  2t 2t+1 | 2t+8 2t+9          column  2t   2t+1
//     row g      token g, chunk 2j      a[0]  |  a[2]                d[0] d[1]
//     row g + 8  token g, chunk 2j + 1  a[1]  |  a[3]                d[2] d[3]
//
// Sums become the left operand of the next product without an exchange between lanes: the pair of
// columns 2t, 2t + 1 of the sums is the pair 2t, 2t + 1 along k. Between the projections a row is a
// whole token, so 8 of the 16 rows are free. They hold what rounding to bf16 takes from the others:
//
//     row g      token g, rounded               a[0] = d[0..1] of chunk 2j   a[2] = d[2..3] of chunk 2j + 1
//     row g + 8  token g, what rounding took    a[1] = a rest                a[3] = a rest
//
// The result of such a product is the sum of rows g and g + 8.
#pragma once

#include "element.h"
#include "sizes.h"

namespace compacter::cuda {

constexpr int tile_tokens = 8;

// How n = 4, 8 and 12 fill fragments of eight rows or columns. Where only four of the eight are
// needed, the other four hold a second part of the same numbers, or the numbers of the other chunk.
template <int N>
struct Pairs {
    static constexpr int n = N, count = N / 2;
    static constexpr int of_warp = N == 4 ? 1 : 2, owners = count / of_warp;  // pairs of a warp; warps for all pairs
    static constexpr int chunks = 2 * of_warp;                                // of a warp
    static constexpr int most_warps = 16 / owners * owners;                   // of a block: the registers of 128 a thread

    // Z: the columns i of the contraction. Whole eights have a fragment for each part of s_i; a half
    // eight has both parts in one. z_tiles eights remain, `steps` steps of 16 (two chunks, eight columns).
    static constexpr int whole = N / 8, left_fragments = 2 * whole + (N % 8 ? 1 : 0);
    static constexpr int z_tiles = (N + 7) / 8, steps = count * z_tiles;

    // V2 of a pair: one fragment for each chunk, and for n = 12 one for the last four i of both.
    static constexpr int v_fragments = N == 12 ? 3 : 2;

    // The right operands of an expansion, 16 x 8 each. k 0-7 and k 8-15 are
    //     n = 4     t2, t2 again (meets the rest of V2)    b2, the rest of b2
    //     n = 8     t2                                     b2
    //     n = 12    t2, i < 8                              t2, i = 8 to 11, twice (each meets the rows of one chunk)
    //     and       b2, q < 8                              b2, q = 8 to 11, then zeros
    static constexpr int operands = N == 12 ? 2 : 1;

    // The index i of column c < 8 in eight `tile` of Z.
    COMPACTER_BOTH static int z_index(int tile, int c) { return tile < whole ? tile * 8 + c : whole * 8 + c % 4; }
    // The chunk (0 or 1) of column c in fragment f of V2, and its index i.
    COMPACTER_BOTH static int v_chunk(int f, int c) { return f < 2 ? f : c / 4; }
    COMPACTER_BOTH static int v_index(int f, int c) { return f == 2 ? 8 + c % 4 : N == 4 ? c % 4 : c; }
};

using Four = uint32_t[4];  // a left operand

struct PairLane {
    int index = threadIdx.x % 32, g = index / 4, t = index % 4;
};

// Four numbers as a left operand: rounded in rows g, what rounding took in rows g + 8. Nothing is taken
// if one of them is Inf, so that it does not become a NaN.
COMPACTER_DEVICE uint4 both_parts(float a, float b, float c, float d) {
    const uint32_t first = pack_bf16(a, b), second = pack_bf16(c, d);
    const uint32_t rest = pack_bf16(a - low_of(first), b - high_of(first));
    const uint32_t rest2 = pack_bf16(c - low_of(second), d - high_of(second));
    const bool finite = fmaxf(fmaxf(fabsf(a), fabsf(b)), fmaxf(fabsf(c), fabsf(d))) < 3.38e38f;
    return make_uint4(first, finite ? rest : 0u, second, finite ? rest2 : 0u);
}

// A pair of numbers, rounded, and what rounding took.
struct PairParts {
    uint32_t rounded, rest;

    COMPACTER_DEVICE PairParts(float low, float high) : rounded(pack_bf16(low, high)) {
        rest = pack_bf16(rest_of(low, low_of(rounded)), rest_of(high, high_of(rounded)));
    }
};

// A right operand, 16 x 8, is two words of each lane: k 2t, 2t + 1 and k 2t + 8, 2t + 9 of column g.
COMPACTER_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b, uint32_t next) {
    mma_16x8x16(d, a, {b, next});
}
COMPACTER_DEVICE void multiply(float (&d)[4], const uint4& a, uint32_t b, uint32_t next) {
    mma_16x8x16(d, {a.x, a.y, a.z, a.w}, {b, next});
}

// Where a lane points in a tile for ldmatrix and stmatrix of a block: lanes 0-7 to the tokens of chunk
// 2j, lanes 8-15 to those of chunk 2j + 1, lanes 16-31 to the same, eight columns later. Bytes.
COMPACTER_DEVICE int block_offset(int lane, int row, int chunk) {
    return lane % 8 * row + lane / 8 % 2 * chunk + lane / 16 * 16;
}

// Adds the fresh accumulators of a tile to sums over tiles.
COMPACTER_DEVICE void add(float (&sum)[4], const float (&fresh)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += fresh[e];
}

}  // namespace compacter::cuda
