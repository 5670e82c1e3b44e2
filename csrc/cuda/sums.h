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

COMPACTER_DEVICE float4 operator+(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <class S>
struct Sums {
    float left[S::blocks][4], right2[S::blocks][4], bias2[S::n == 4 ? 1 : S::bias_blocks][4];
    float folded[S::own][S::eights][4], folded2[S::own][S::eights][4], bias[S::share][4];

    // Adds them to what is there, unless they are the first.
    COMPACTER_DEVICE void add_to(float4* place, bool first) const {
        const auto add = [&](const float (&sum)[4], int at) {
            float4 total = make_float4(sum[0], sum[1], sum[2], sum[3]);
            if (!first) total = total + place[at * 32];
            place[at * 32] = total;
        };
#pragma unroll
        for (int e = 0; e < S::blocks; ++e) add(left[e], e);
#pragma unroll
        for (int e = 0; e < S::blocks; ++e) add(right2[e], S::at_right2 + e);
#pragma unroll
        for (int e = 0; e < S::own * S::eights; ++e) add(folded[e / S::eights][e % S::eights], S::at_folded + e);
#pragma unroll
        for (int e = 0; e < S::own * S::eights; ++e) add(folded2[e / S::eights][e % S::eights], S::at_folded2 + e);
#pragma unroll
        for (int e = 0; e < S::share; ++e) add(bias[e], S::at_bias + e);
#pragma unroll
        for (int e = 0; e < S::bias_blocks; ++e) add(bias2[e], S::at_bias2 + e);
    }
};

// The sums of a block.
template <class S>
struct Totals {
    const float4* first;

    COMPACTER_DEVICE const float4& vector(int rank, int place, int lane) const { return first[(rank * S::places + place) * 32 + lane]; }
    COMPACTER_DEVICE float* plain(int second) const {
        return reinterpret_cast<float*>(const_cast<float4*>(first)) + S::sums_bytes / 4 + second * S::plain;
    }

    // dC1 and dC2 as plain matrices.
    COMPACTER_DEVICE void unpack() const {
        const PairLane lane;
        constexpr int each = S::own * S::eights;
        for (int job = threadIdx.x / 32; job < S::group * 2 * each; job += blockDim.x / 32) {
            const int rank = job % S::group, at = job / S::group, second = at / each;
            const int pair = rank * S::own + at % each / S::eights, c = at % S::eights * 8 + lane.t * 2;
            const float4 four = vector(rank, S::at_folded + at, lane.index);
            float* to = plain(second) + (pair * 16 + lane.g) * S::plain_row + c;
            to[0] = four.x;
            to[1] = four.y;
            to[8 * S::plain_row] = four.z;
            to[8 * S::plain_row + 1] = four.w;
        }
    }

    // Row (p,i) and column c of dC1, or of dC2.
    COMPACTER_DEVICE float folded(int second, int p, int i, int c) const {
        const float* row = plain(second) + (p * 8 + i) * S::plain_row + c;
        return S::n == 4 ? row[0] + row[4 * S::plain_row] : row[0];
    }

    COMPACTER_DEVICE float bias(int c) const {
        const int eight = c / 8, rank = eight / S::share;
        float sum = 0.f;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            const float4& four = vector(rank, S::at_bias + eight % S::share, g * 4 + c % 8 / 2);
            sum += c % 2 ? four.y : four.x;
        }
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
        float4 four = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int rank = 0; rank < S::group; ++rank) {
            four = four + totals.vector(rank, job, lane.index);
            if (S::n == 4 && !right) four = four + totals.vector(rank, job, lane.index ^ 2);
        }
        const float sum[4] = {four.x, four.y, four.z, four.w};
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
        const float4 four = totals.vector(rank, S::at_bias2 + at, lane.index);
        const float sum[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = lane.t * 2 + e % 2, block = at * (4 / S::own) + c / (2 * S::own);
            const int q = rank * 2 * S::own + c % (2 * S::own), u = block * 16 + lane.g + e / 2 * 8;
            if (block < S::blocks) gradient[q * S::chunk + u] = sum[e] * scale;
        }
    }
}

// dA_i[p,q] of one side. Neighbouring lanes have different rows of dC. Second: its rows are (q,i).
template <class S, bool Second>
COMPACTER_DEVICE void store_rule(const Totals<S>& totals, float* gradient, const float* factor, int e) {
    const int i = e % S::n, row = e / S::n % S::n, other = e / (S::n * S::n);
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < S::inner; ++v)
        sum = fmaf(totals.folded(Second, row, i, other * S::inner + v), factor[i * S::inner + v], sum);
    gradient[(i * S::n + (Second ? other : row)) * S::n + (Second ? row : other)] = sum;
}

// dt_i[v] of one side: n lanes have a row of dC each, and add their sums.
template <class S, bool Second>
COMPACTER_DEVICE void store_narrow(const Totals<S>& totals, float* gradient, const float* rule, int e) {
    const int row = e % S::n, i = e / S::n % S::n, v = e / (S::n * S::n);
    float sum = 0.f;
#pragma unroll
    for (int other = 0; other < S::n; ++other)
        sum = fmaf(totals.folded(Second, row, i, other * S::inner + v),
                   rule[(i * S::n + (Second ? other : row)) * S::n + (Second ? row : other)], sum);
#pragma unroll
    for (int step = 1; step < S::n; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (row == 0) gradient[i * S::inner + v] = sum;
}

// The block's row of partials.
template <class S>
COMPACTER_DEVICE void store_row(const Totals<S>& totals, const Backward& b, float* row) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const RawFactors raw = raw_factors<S>();
    totals.unpack();
    store_wide(totals, b, row, warp, warps);
    if (S::bias_blocks) store_bias2(totals, row + b.bias2, b.factors.scale, warp, warps);
    __syncthreads();
    constexpr int rule = S::n * S::n * S::n, narrow = S::n * S::d;  // whole warps
    for (int e = threadIdx.x; e < 2 * (rule + narrow) + S::d; e += blockDim.x) {
        if (e < narrow) store_narrow<S, false>(totals, row + b.right, raw.rule, e);
        else if (e < 2 * narrow) store_narrow<S, true>(totals, row + b.left2, raw.rule2, e - narrow);
        else if (e < 2 * narrow + rule) store_rule<S, false>(totals, row + b.rule, raw.right, e - 2 * narrow);
        else if (e < 2 * narrow + 2 * rule) store_rule<S, true>(totals, row + b.rule2, raw.left2, e - 2 * narrow - rule);
        else row[b.bias + e - 2 * narrow - 2 * rule] = totals.bias(e - 2 * narrow - 2 * rule);
    }
}

}  // namespace compacter::cuda
