// The sums over tokens that a warp keeps in registers, and the gradients that follow from them.
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

COMPACTER_DEVICE float4 operator+(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

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

// The sums of a block, which the groups have written to the place of their tiles.
template <class S>
struct Totals {
    unsigned char* first;
    int groups, stride;  // bytes from one group to the next
    bool at_once;        // dC1 and dC2 are behind the wide sums, else in their place

    // The wide sums and the biases, as [rank][place][lane].
    COMPACTER_DEVICE float4* wide(int group, int rank, int place) const {
        return reinterpret_cast<float4*>(first + group * stride) + (rank * S::wide + place) * 32;
    }
    COMPACTER_DEVICE float4 wide_total(int rank, int place, int lane) const {
        float4 sum = wide(0, rank, place)[lane];
#pragma unroll
        for (int group = 1; group < S::most_groups; ++group)
            if (group < groups) sum = sum + wide(group, rank, place)[lane];
        return sum;
    }

    // The block of dC1 or dC2 with rows 8r to 8r + 7 and columns 8c to 8c + 7: two neighbours of a row for each lane.
    COMPACTER_DEVICE float2* block(int group, bool second, int r, int c) const {
        return reinterpret_cast<float2*>(first + group * stride + at_once * S::wide_bytes + second * S::folded_bytes +
                                         (r * S::eights + c) * S::block_bytes);
    }
    // Columns 2 pair and 2 pair + 1 of row k n + i.
    COMPACTER_DEVICE float2 folded_total(bool second, int k, int i, int pair) const {
        static_assert(8 % S::n == 0, "a block of eight rows has all i of its k");
        const int r = k * S::n / 8, at = (k * S::n % 8 + i) * 4 + pair % 4;
        float2 sum = block(0, second, r, pair / 4)[at];
#pragma unroll
        for (int group = 1; group < S::most_groups; ++group)
            if (group < groups) {
                const float2 other = block(group, second, r, pair / 4)[at];
                sum = make_float2(sum.x + other.x, sum.y + other.y);
            }
        return sum;
    }

    COMPACTER_DEVICE void write_wide(const Sums<S>& sums, int group, int rank) const {
        const int lane = lane_anew();
#pragma unroll
        for (int place = 0; place < S::wide; ++place) wide(group, rank, place)[lane] = sums.vector(place);
    }
    COMPACTER_DEVICE void write_folded(const Sums<S>& sums, int group, int rank) const {
        const int lane = lane_anew();
#pragma unroll
        for (int second = 0; second < 2; ++second)
#pragma unroll
            for (int tile = 0; tile < S::row_tiles; ++tile)
#pragma unroll
                for (int e = 0; e < S::eights; ++e) {
                    const float4 four = sums.vector((second ? S::at_folded2 : S::at_folded) + tile * S::eights + e);
                    const int r = (rank * S::row_tiles + tile) * 2;
                    block(group, second, r, e)[lane] = make_float2(four.x, four.y);
                    block(group, second, r + 1, e)[lane] = make_float2(four.z, four.w);
                }
    }
};

// The gradients of the wide factors: a warp writes 16 columns u of all c at once, eight neighbours of each.
template <class S>
COMPACTER_DEVICE void store_wide(const Totals<S>& totals, const Backward& b, float* row, int warp, int warps) {
    const PairLane lane{lane_anew()};
    for (int job = warp; job < S::left_tiles + S::blocks; job += warps) {
        float4 four = totals.wide_total(0, job, lane.index);
#pragma unroll
        for (int rank = 1; rank < S::group; ++rank) four = four + totals.wide_total(rank, job, lane.index);
        const bool right = job >= S::left_tiles;
        const int c = lane.t * 2, second = S::n == 4 && c >= 4, i = second ? c - 4 : c;
        const int block = right ? job - S::left_tiles : job * S::parts + second, u = block * 16 + lane.g;
        float* to = row + (!right ? b.left : second ? b.bias2 : b.right2) + i * S::chunk + u;
        const float scale = right ? b.factors.scale : 1.f;
        if (block >= S::blocks || (right && second && !b.has_bias2)) continue;
        to[0] = four.x * scale;
        to[S::chunk] = four.y * scale;
        to[8] = four.z * scale;
        to[S::chunk + 8] = four.w * scale;
    }
}

// A place of bias2 is 16 columns u of 4 / own blocks; its column c is chunk c % (2 own) of the rank.
template <class S>
COMPACTER_DEVICE void store_bias2(const Totals<S>& totals, float* gradient, float scale, int warp, int warps) {
    const PairLane lane{lane_anew()};
    for (int job = warp; job < S::group * S::bias_tiles; job += warps) {
        const int rank = job % S::group, at = job / S::group;
        const float4 four = totals.wide_total(rank, S::at_bias2 + at, lane.index);
        const float sum[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = lane.t * 2 + e % 2, block = at * (4 / S::own) + c / (2 * S::own);
            const int q = rank * 2 * S::own + c % (2 * S::own), u = block * 16 + lane.g + e / 2 * 8;
            if (block < S::blocks) gradient[q * S::chunk + u] = sum[e] * scale;
        }
    }
}

// The columns of the sums of dy are the bottleneck, their rows tokens.
template <class S>
COMPACTER_DEVICE void store_bias(const Totals<S>& totals, float* gradient, int warp, int warps) {
    const PairLane lane{lane_anew()};
    for (int eight = warp; eight < S::eights; eight += warps) {
        const float4 four = totals.wide_total(eight / S::share, S::at_bias + eight % S::share, lane.index);
        const float2 sum = make_float2(sum_of_lanes<8, 4>(four.x), sum_of_lanes<8, 4>(four.y));
        if (lane.g == 0) reinterpret_cast<float2*>(gradient + eight * 8)[lane.t] = sum;
    }
}

// dA_i and dt_i of both sides for one i, by a warp. A lane has two neighbours v, v + 1 of a column (q,v) of dC1, and all rows
// (p,i). Of dC2, the rows are (q,i) and the columns (p,v).
template <class S>
COMPACTER_DEVICE void store_narrow(const Totals<S>& totals, const Backward& b, int i, float* row) {
    constexpr int pairs = S::inner / 2, lanes = S::d / 2;
    static_assert(lanes <= 32);
    const int lane = lane_anew(), there = lane < lanes ? lane : 0, column = there / pairs, v = there % pairs * 2;
    float over_v[2][S::n];
    float2 narrow[2];
#pragma unroll
    for (int second = 0; second < 2; ++second) {
        const float* rule = floats_at(second ? S::rule2 : S::rule) + i * S::matrix + column * (second ? S::n : 1);
        const float2 factor = *reinterpret_cast<const float2*>(floats_at(second ? S::narrow2 : S::narrow) + i * S::inner + v);
        narrow[second] = make_float2(0.f, 0.f);
#pragma unroll
        for (int k = 0; k < S::n; ++k) {
            const float2 sum = totals.folded_total(second, k, i, there);
            const float a = rule[k * (second ? 1 : S::n)];
            narrow[second] = make_float2(fmaf(sum.x, a, narrow[second].x), fmaf(sum.y, a, narrow[second].y));
            over_v[second][k] = sum.x * factor.x + sum.y * factor.y;
        }
    }
#pragma unroll
    for (int second = 0; second < 2; ++second) {
#pragma unroll
        for (int k = 0; k < S::n; ++k) over_v[second][k] = sum_of_lanes<pairs, 1>(over_v[second][k]);
        narrow[second] = make_float2(sum_of_lanes<S::n, pairs>(narrow[second].x), sum_of_lanes<S::n, pairs>(narrow[second].y));
    }
#pragma unroll
    for (int second = 0; second < 2; ++second) {
        float* rule = row + (second ? b.rule2 : b.rule) + i * S::n * S::n + column * (second ? S::n : 1);
        if (v == 0 && lane < lanes)
#pragma unroll
            for (int k = 0; k < S::n; ++k) rule[k * (second ? 1 : S::n)] = over_v[second][k];
        if (lane < pairs) reinterpret_cast<float2*>(row + (second ? b.left2 : b.right) + i * S::inner)[lane] = narrow[second];
    }
}

// The block's row of partials, from the sums of its warps.
template <class S>
COMPACTER_DEVICE void store_row(const Sums<S>& sums, const Totals<S>& totals, const Backward& b, const Group& group, float* row) {
    const int warp = warp_index(), warps = totals.groups * S::group;
    totals.write_wide(sums, group.index, group.rank);
    if (totals.at_once) totals.write_folded(sums, group.index, group.rank);
    __syncthreads();
    store_wide(totals, b, row, warp, warps);
    if (S::bias_tiles && b.has_bias2) store_bias2(totals, row + b.bias2, b.factors.scale, warp, warps);
    if (b.factors.bias.data) store_bias(totals, row + b.bias, warp, warps);
    if (!totals.at_once) {
        __syncthreads();
        totals.write_folded(sums, group.index, group.rank);
        __syncthreads();
    }
    for (int i = warp; i < S::n; i += warps) store_narrow(totals, b, i, row);
}

}  // namespace compacter::cuda
