// The sums over tokens that a warp keeps in registers, and what they give to the narrow gradients.
//
//     left[u,c]      = sum_{tok,p} x[p,u] dZ[p,i]     right2[u,c] = sum_{tok,q} g[q,u] V2[q,i]
//     bias2[u,q]     = sum_tok g[q,u]                 bias[q,v]   = sum_tok dy[q,v]
//     folded         = dC1 = sum_tok Z^T dy           folded2     = dC2 = sum_tok dV2^T h
// and at the end
//     dA1_i[p,q] = sum_v dC1[(p,i),(q,v)] t1_i[v]     dt1_i[v] = sum_{p,q} dC1[(p,i),(q,v)] A1_i[p,q]
//     dA2_i[p,q] = sum_v dC2[(q,i),(p,v)] s2_i[v]     ds2_i[v] = sum_{p,q} dC2[(q,i),(p,v)] A2_i[p,q]
//
// They are accumulators, 16 rows by 8 columns. The rows are 16 columns u, or 16 rows (p,i). For n = 4, left has two
// blocks of u side by side, and the second four columns of right2 are bias2. For n = 8, bias2 has 4 / own blocks side
// by side, each with the chunks of the warp.
#pragma once

#include "matrices.h"
#include "ring.h"

namespace compacter::cuda {

template <class S>
struct Sums {
    float at[S::places][4];

    COMPACTER_DEVICE void add(int place, const float (&fresh)[4]) { cuda::add(at[place], fresh); }

    COMPACTER_DEVICE float4 vector(int place) const {
        const float(&sum)[4] = at[place];
        return make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
};

// The sum over Count lanes, each Stride after the one before, in the first of them.
template <int Count, int Stride>
COMPACTER_DEVICE float sum_of_lanes(float value) {
    if constexpr (Count == 1) return value;
    else if constexpr (Count % 2 == 0)
        return sum_of_lanes<Count / 2, Stride>(value + __shfl_down_sync(0xffffffff, value, Count / 2 * Stride));
    else return value + sum_of_lanes<Count - 1, Stride>(__shfl_down_sync(0xffffffff, value, Stride));
}

// Count sums over four neighbouring lanes. Each of the lanes gets a quarter of them, in front, and the number of its first.
template <int Count>
COMPACTER_DEVICE int share_sums(float (&value)[Count], int t) {
    int first = 0;
#pragma unroll
    for (int bit = 1, half = Count / 2; bit < 4; bit *= 2, half /= 2) {
        const bool upper = t & bit;
        first += upper ? half : 0;
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const float send = upper ? value[j] : value[j + half], keep = upper ? value[j + half] : value[j];
            value[j] = keep + __shfl_xor_sync(0xffffffff, send, bit);
        }
    }
    return first;
}

// What dC1 of a warp gives to dA1_i and dt1_i, in the lanes whose g % n is i; or, for the second side, dC2 to dA2_i and ds2_i.
// k is the chunk of a row of dC1 or dC2, and c that of a column: p and q, or q and p.
template <class S>
struct NarrowSums {
    static constexpr int halves = 2 * S::row_tiles, pairs = S::inner / 2;  // eights of rows; neighbours v, v + 1 of a chunk
    float rule[halves][S::n];      // [k][c]: n / 4 columns c from `column` on
    int column;
    float2 narrow[S::cycle] = {};  // of v, v + 1 of the lane's columns, the sum over the warp's k and every c

    COMPACTER_DEVICE NarrowSums(const Sums<S>& sums, int rank, int second) {
        const PairLane lane{lane_anew()};
        const int i = lane.g % S::n;
        const float* of_rule = floats_at(second ? S::rule2 : S::rule) + i * S::matrix;
        const auto* factor = reinterpret_cast<const float2*>(floats_at(second ? S::narrow2 : S::narrow) + i * S::inner);
#pragma unroll
        for (int half = 0; half < halves; ++half) {
            const int k = row_chunk(rank, half, lane.g);
#pragma unroll
            for (int c = 0; c < S::n; ++c) rule[half][c] = 0.f;
#pragma unroll
            for (int e = 0; e < S::eights; ++e) {
                const int pair = e * 4 + lane.t, chunk = pair / pairs;
                const float(&sum)[4] = sums.at[(second ? S::at_folded2 : S::at_folded) + half / 2 * S::eights + e];
                const float low = sum[half % 2 * 2], high = sum[half % 2 * 2 + 1];
                const float2 v = factor[pair % pairs];
                const float a = of_rule[second ? chunk * S::n + k : k * S::n + chunk];
#pragma unroll
                for (int c = 0; c < S::n; ++c) rule[half][c] += c == chunk ? low * v.x + high * v.y : 0.f;
                float2& over_k = narrow[e % S::cycle];
                over_k = make_float2(fmaf(low, a, over_k.x), fmaf(high, a, over_k.y));
            }
            column = share_sums(rule[half], lane.t);
        }
        if (S::n == 4)  // lanes g and g + 4 have the same i
#pragma unroll
            for (float2& sum : narrow)
                sum = make_float2(sum.x + __shfl_xor_sync(0xffffffff, sum.x, 16), sum.y + __shfl_xor_sync(0xffffffff, sum.y, 16));
    }

    // The k of a row of the warp.
    COMPACTER_DEVICE static int row_chunk(int rank, int half, int g) { return ((rank * halves + half) * 8 + g) / S::n; }

    // To [i][k][c] of the rule and [i][pair] of the narrow factor.
    COMPACTER_DEVICE void write(float* to_rule, float2* to_narrow, int rank) const {
        const PairLane lane{lane_anew()};
        const int i = lane.g % S::n;
#pragma unroll
        for (int half = 0; half < halves; ++half)
#pragma unroll
            for (int j = 0; j < S::n / 4; ++j)
                to_rule[i * S::matrix + row_chunk(rank, half, lane.g) * S::n + column + j] = rule[half][j];
        if (lane.g < S::n)
#pragma unroll
            for (int e = 0; e < S::cycle; ++e) to_narrow[(i * S::cycle + e) * 4 + lane.t] = narrow[e];
    }
};

}  // namespace compacter::cuda
