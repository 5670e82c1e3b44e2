// The products of a tile whose sums end with the tile, for the shapes of shapes.h.
//
// For n = 4, only four of the eight columns of a product with n columns are needed. The other four have the product
// with what rounding took from the weights. `whole` adds both.
#pragma once

#include "matrices.h"
#include "part.h"

namespace compacter::cuda {

template <class S>
using Operands = Four[S::own];  // of the warp's pairs
template <class S>
using Chunks = float[S::own][2][4];  // sums of the warp's chunks: rows are tokens
template <class S>
using Eights = float[S::share][4];  // sums of the warp's share of the bottleneck

template <class S>
COMPACTER_DEVICE float whole(float part) {
    return S::n == 4 ? part + __shfl_xor_sync(0xffffffff, part, 2) : part;
}

// Where a lane's row of C begins: of index i; for n = 4 of both parts.
template <class S>
COMPACTER_DEVICE int folded_row(int lane) {
    return S::n == 4 ? lane % 4 * S::folded_row + lane % 8 / 4 * S::folded_part : lane % 8 * S::folded_row;
}

// Z = x s1 and dV2 = g t2^T of the warp's pairs, as left operands.
template <class S>
COMPACTER_DEVICE void project(const Part<S>& part, Operands<S>& z, Operands<S>& v, const unsigned char* x,
                              const unsigned char* g) {
    constexpr int step = S::n == 4 ? 2 : 1;  // a matrix of n = 4 has both parts of s_i, so that four are two blocks
    const int lane = lane_anew(), at = part.block(lane), row = S::n == 4 ? lane % 8 : lane % 8 + lane / 16 * 8;
    const int column = S::n == 4 ? lane / 8 * 16 : lane / 8 % 2 * 16;
    const unsigned char* factor = shared_memory() + row * S::factor_row + column;
    float sum[2][S::own][2][4] = {};
#pragma unroll 4
    for (int block = 0; block < S::blocks; block += step)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            Four f, a;
            load_matrices(f, factor + (side ? S::right2 : S::left) + block * 32);
#pragma unroll
            for (int j = 0; j < step; ++j) {
                if (block + j >= S::blocks) break;
#pragma unroll
                for (int s = 0; s < S::own; ++s) {
                    load_matrices(a, (side ? g : x) + at + s * 4 * S::chunk + (block + j) * 32);
                    mma_16x8x16(sum[side][s][j], a, {f[2 * j], f[2 * j + 1]});
                    if (step == 1) mma_16x8x16(sum[side][s][1], a, {f[2], f[3]});
                }
            }
        }
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int s = 0; s < S::own; ++s) {
            float d[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) d[e] = whole<S>(sum[side][s][0][e] + sum[side][s][1][e]);
            const uint4 both = both_parts(d[0], d[1], d[2], d[3]);
            Four& to = side ? v[s] : z[s];
#pragma unroll
            for (int e = 0; e < 4; ++e) to[e] = word(both, e);
        }
}

// y += Z C of the warp's eights of the bottleneck, over all pairs of chunks. z(j) is pair j of Z.
template <class S, class Pairs>
COMPACTER_DEVICE void fold(const Part<S>& part, Eights<S>& y, const Pairs& z, int folded) {
    const int lane = lane_anew();
    const unsigned char* right =
        shared_memory() + folded + lane / 8 * S::n * S::folded_row + folded_row<S>(lane) + part.first_eight() * 16;
#pragma unroll
    for (int j = 0; j < S::pairs; j += 2) {
        const uint4 first = z(j), second = z(j + 1);
#pragma unroll
        for (int e = 0; e < S::share; ++e) {
            Four f;
            load_matrices_transposed(f, right + j * 2 * S::n * S::folded_row + e * 16);
            multiply(y[e], first, f[0], f[1]);
            multiply(y[e], second, f[2], f[3]);
        }
    }
}

// dZ += dy C^T of the warp's chunks, for step `step` of 16 numbers of the bottleneck.
template <class S>
COMPACTER_DEVICE void unfold(const Part<S>& part, Chunks<S>& dz, const uint4& dy, int step, int folded) {
    const int lane = lane_anew(), chunk = part.pair(0) * 2 + lane / 16;
    const unsigned char* right =
        shared_memory() + folded + chunk * S::n * S::folded_row + folded_row<S>(lane) + lane / 8 % 2 * 16 + step * 32;
#pragma unroll
    for (int s = 0; s < S::own; ++s) {
        Four f;
        load_matrices(f, right + s * 2 * S::n * S::folded_row);
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (step * 2 + 1 < S::eights)
                multiply(dz[s][h], dy, f[2 * h], f[2 * h + 1]);
            else
                mma_16x8x8(dz[s][h], {dy.x, dy.y}, f[2 * h]);
    }
}

// Z transposed: 16 rows (p,i), k 0-7 the tokens rounded, k 8-15 what rounding took.
template <class S>
COMPACTER_DEVICE void transpose(const Operands<S>& z, int tile, Four& a) {
    const bool upper = lane_anew() % 4 >= 2;
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if constexpr (S::n == 4) {
                const Four& pair = z[tile * 2 + half];  // four columns of each of its chunks
                a[part * 2 + half] = transpose_matrix(upper ? pair[2 + part] : pair[part]);
            } else {
                a[part * 2 + half] = transpose_matrix(z[tile][half * 2 + part]);
            }
}

// dx = dZ s1^T (+ g) of some blocks of 16 columns, in the place of x. dz: the operands against both parts of s1.
template <class S>
COMPACTER_DEVICE void expand(const Part<S>& part, const Operands<S>& dz, unsigned char* x, const unsigned char* g,
                             int begin, int end) {
    const PairLane lane{lane_anew()};
    const uint32_t diagonal = lane.g == lane.t * 2 ? 0x3f80u : lane.g == lane.t * 2 + 1 ? 0x3f800000u : 0u;
    const uint32_t one = part.b.residual_is_x ? diagonal : 0u;
    const int row = S::n == 4 ? lane.index % 4 + lane.index / 8 % 2 * 4 : lane.index % 8, block_at = part.block(lane.index);
    const unsigned char* factor = shared_memory() + S::left + row * S::factor_row + lane.index / 16 * 16;
#pragma unroll 4
    for (int block = begin; block < end; ++block) {
        Four f;
        load_matrices_transposed(f, factor + block * 32);
#pragma unroll
        for (int s = 0; s < S::own; ++s) {
            Four residual;
            const int at = block_at + s * 4 * S::chunk + block * 32;
            load_matrices(residual, g + at);
            float out[2][4] = {};
            mma_16x8x8(out[0], {residual[0], residual[1]}, one);
            mma_16x8x8(out[1], {residual[2], residual[3]}, one);
            mma_16x8x16(out[0], dz[s], {f[0], f[1]});
            mma_16x8x16(out[1], dz[s], {f[2], f[3]});
            Four rounded;
#pragma unroll
            for (int e = 0; e < 4; ++e) rounded[e] = pack_bf16(out[e / 2][e % 2 * 2], out[e / 2][e % 2 * 2 + 1]);
            store_matrices(x + at, rounded);
        }
    }
}

}  // namespace compacter::cuda
