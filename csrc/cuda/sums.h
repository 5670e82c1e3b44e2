// The sums over tokens that a warp keeps in registers, and the gradients that follow from them.
//
//     left[u,c]      = sum_{tok,p} x[p,u] dZ[p,i]     right2[u,c] = sum_{tok,q} g[q,u] V2[q,i]
//     bias2[u,q]     = sum_tok g[q,u]                 bias[q,v]   = sum_tok dy[q,v]
//     folded         = dC1 = sum_tok Z^T dy           folded2     = dC2 = sum_tok dV2^T h
// and at the end
//     dA1_i[p,q] = sum_v dC1[(p,i),(q,v)] t1_i[v]     dt1_i[v] = sum_{p,q} dC1[(p,i),(q,v)] A1_i[p,q]
//     dA2_i[p,q] = sum_v dC2[(q,i),(p,v)] s2_i[v]     ds2_i[v] = sum_{p,q} dC2[(q,i),(p,v)] A2_i[p,q]
//
// For n = 4, c and the rows (p,i) are eight places of a chunk: i of the rounded parts, then i of what rounding took,
// which are added at the end. In right2, the second four are q of bias2.
#pragma once

#include "matrices.h"

namespace compacter::cuda {

template <class S>
struct Sums {
    float left[S::blocks][4], right2[S::blocks][4], bias2[S::n == 4 ? 1 : S::bias_blocks][4];
    float folded[S::own][S::eights][4], folded2[S::own][S::eights][4], bias[S::share][4];

    // Adds to what is there, which the first warp sets.
    COMPACTER_DEVICE void add_to(float4* place, int rank, bool first, bool first_of_rank) const {
        const auto add = [&](const float (&sum)[4], int at, bool set) {
            float4 total = make_float4(sum[0], sum[1], sum[2], sum[3]);
            if (!set) {
                const float4 before = place[at * 32];
                total = make_float4(before.x + sum[0], before.y + sum[1], before.z + sum[2], before.w + sum[3]);
            }
            place[at * 32] = total;
        };
#pragma unroll
        for (int b = 0; b < S::blocks; ++b) add(left[b], b, first);
#pragma unroll
        for (int b = 0; b < S::blocks; ++b) add(right2[b], S::at_right2 + b, first);
        const int own = S::common + rank * S::of_rank;
#pragma unroll
        for (int e = 0; e < S::at_folded2; ++e) {
            add(folded[e / S::eights][e % S::eights], own + e, first_of_rank);
            add(folded2[e / S::eights][e % S::eights], own + S::at_folded2 + e, first_of_rank);
        }
#pragma unroll
        for (int e = 0; e < S::share; ++e) add(bias[e], own + S::at_bias + e, first_of_rank);
#pragma unroll
        for (int e = 0; e < S::bias_blocks; ++e) add(bias2[e], own + S::at_bias2 + e, first_of_rank);
    }
};

// The sums of a block.
template <class S>
struct Totals {
    const float4* first;

    COMPACTER_DEVICE float4 vector(int place, int lane) const { return first[place * 32 + lane]; }
    COMPACTER_DEVICE float number(int place, int lane, int e) const {
        return reinterpret_cast<const float*>(first + place * 32 + lane)[e];
    }

    // Row (p,i) and column c of dC1, or of dC2.
    COMPACTER_DEVICE float folded(int second, int p, int i, int c) const {
        const int rank = p / 2 / S::own, eight = c / 8, e = p % 2 * 2 + c % 2, lane = i * 4 + c % 8 / 2;
        const int place = S::common + rank * S::of_rank + second * S::at_folded2 + p / 2 % S::own * S::eights + eight;
        const float sum = number(place, lane, e);
        return S::n == 4 ? sum + number(place, lane + 16, e) : sum;
    }

    COMPACTER_DEVICE float bias(int c) const {
        const int eight = c / 8, rank = eight / S::share;
        float sum = 0.f;
#pragma unroll
        for (int g = 0; g < 8; ++g)
            sum += number(S::common + rank * S::of_rank + S::at_bias + eight % S::share, g * 4 + c % 8 / 2, c % 2);
        return sum;
    }
};

// The gradients of the wide factors: a warp writes 16 columns u of all c at once, eight neighbours of each.
template <class S>
COMPACTER_DEVICE void store_wide(const Totals<S>& totals, const Backward& b, float* row, int warp, int warps) {
    const PairLane lane;
    const float scale = b.factors.scale;
    for (int job = warp; job < 2 * S::blocks; job += warps) {
        const bool right = job >= S::blocks;
        const float4 four = totals.vector(job, lane.index);
        float sum[4] = {four.x, four.y, four.z, four.w};
        const float4 other = totals.vector(job, lane.index ^ (S::n == 4 ? 2 : 0));
        if (S::n == 4 && !right) {
            sum[0] += other.x;
            sum[1] += other.y;
            sum[2] += other.z;
            sum[3] += other.w;
        }
        const int c = lane.t * 2, u = job % S::blocks * 16 + lane.g;
        float* to = row + (!right ? b.left : c < S::n ? b.right2 : b.bias2 - S::n * S::chunk) + c * S::chunk + u;
        if (!right && c >= S::n) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e % 2 * S::chunk + e / 2 * 8] = right ? sum[e] * scale : sum[e];
    }
}

// A place of bias2 is 16 columns u of 4 / own blocks; its column c is chunk c % (2 own) of the rank.
template <class S>
COMPACTER_DEVICE void store_bias2(const Totals<S>& totals, float* gradient, float scale, int warp, int warps) {
    const PairLane lane;
    for (int job = warp; job < S::group * S::bias_blocks; job += warps) {
        const int rank = job % S::group, at = job / S::group;
        const float4 four = totals.vector(S::common + rank * S::of_rank + S::at_bias2 + at, lane.index);
        const float sum[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = lane.t * 2 + e % 2, block = at * (4 / S::own) + c / (2 * S::own);
            const int q = rank * 2 * S::own + c % (2 * S::own), u = block * 16 + lane.g + e / 2 * 8;
            if (block < S::blocks) gradient[q * S::chunk + u] = sum[e] * scale;
        }
    }
}

// dA_i[p,q] of one side. Second: the rows of dC are (q,i).
template <class S, bool Second>
COMPACTER_DEVICE void store_rule(const Totals<S>& totals, float* gradient, const float* factor, int begin) {
    for (int e = begin; e < S::n * S::n * S::n; e += blockDim.x) {
        const int i = e / (S::n * S::n), p = e / S::n % S::n, q = e % S::n;
        float sum = 0.f;
#pragma unroll
        for (int v = 0; v < S::inner; ++v)
            sum = fmaf(totals.folded(Second, Second ? q : p, i, (Second ? p : q) * S::inner + v), factor[i * S::inner + v], sum);
        gradient[e] = sum;
    }
}

// dt_i[v] of one side: n lanes have a row of dC each, and add their sums.
template <class S, bool Second>
COMPACTER_DEVICE void store_narrow(const Totals<S>& totals, float* gradient, const float* rule, int begin) {
    for (int e = begin; e < S::n * S::d; e += blockDim.x) {
        const int row = e % S::n, at = e / S::n, i = at / S::inner, v = at % S::inner;
        float sum = 0.f;
#pragma unroll
        for (int other = 0; other < S::n; ++other)
            sum = fmaf(totals.folded(Second, row, i, other * S::inner + v),
                       rule[(i * S::n + (Second ? other : row)) * S::n + (Second ? row : other)], sum);
#pragma unroll
        for (int step = 1; step < S::n; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
        if (row == 0) gradient[at] = sum;
    }
}

// The block's row of partials. The small jobs begin at different warps.
template <class S>
COMPACTER_DEVICE void store_row(const Totals<S>& totals, const Backward& b, float* row) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, thread = threadIdx.x;
    const RawFactors raw = raw_factors<S>();
    const auto from = [&](int first) { return (thread + blockDim.x - first % blockDim.x) % blockDim.x; };
    constexpr int rule = S::n * S::n * S::n, narrow = S::n * S::d;
    store_narrow<S, false>(totals, row + b.right, raw.rule, from(0));
    store_narrow<S, true>(totals, row + b.left2, raw.rule2, from(narrow));
    store_rule<S, false>(totals, row + b.rule, raw.right, from(2 * narrow));
    store_rule<S, true>(totals, row + b.rule2, raw.left2, from(2 * narrow + rule));
    for (int c = from(2 * narrow + 2 * rule); c < S::d; c += blockDim.x) row[b.bias + c] = totals.bias(c);
    store_wide(totals, b, row, warp, warps);
    if (S::bias_blocks) store_bias2(totals, row + b.bias2, b.factors.scale, warp, warps);
}

}  // namespace compacter::cuda
