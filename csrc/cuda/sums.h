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

namespace compacter::cuda {

COMPACTER_DEVICE float4 operator+(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <class S>
struct Sums {
    float at[S::places][4];

    COMPACTER_DEVICE void add(int place, const float (&fresh)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) at[place][e] += fresh[e];
    }

    // Adds them to what is there, unless they are the first.
    COMPACTER_DEVICE void add_to(float4* there, bool first) const {
        constexpr int ahead = 8;
#pragma unroll
        for (int begin = 0; begin < S::places; begin += ahead) {
            float4 before[ahead];
#pragma unroll
            for (int j = 0; j < ahead; ++j)
                before[j] = first || begin + j >= S::places ? make_float4(0.f, 0.f, 0.f, 0.f) : there[(begin + j) * 32];
#pragma unroll
            for (int j = 0; j < ahead; ++j)
                if (begin + j < S::places) {
                    const float(&sum)[4] = at[begin + j];
                    there[(begin + j) * 32] = before[j] + make_float4(sum[0], sum[1], sum[2], sum[3]);
                }
        }
    }
};

// The sums of a block.
template <class S>
struct Totals {
    const float4* first;

    COMPACTER_DEVICE const float4& vector(int rank, int place, int lane) const {
        return first[(rank * S::places + place) * 32 + lane];
    }
    COMPACTER_DEVICE float* plain(int second) const {
        return reinterpret_cast<float*>(const_cast<float4*>(first)) + S::sums_bytes / 4 + second * S::plain;
    }

    // dC1 and dC2 as plain matrices.
    COMPACTER_DEVICE void unpack() const {
        const PairLane lane;
        constexpr int each = S::row_tiles * S::eights;
        for (int job = threadIdx.x / 32; job < S::group * 2 * each; job += blockDim.x / 32) {
            const int rank = job % S::group, at = job / S::group;
            const int row = (rank * S::row_tiles + at % each / S::eights) * 16 + lane.g;
            const float4 four = vector(rank, S::at_folded + at, lane.index);
            float* to = plain(at / each) + row * S::plain_row + at % S::eights * 8 + lane.t * 2;
            to[0] = four.x;
            to[1] = four.y;
            to[8 * S::plain_row] = four.z;
            to[8 * S::plain_row + 1] = four.w;
        }
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
    for (int job = warp; job < S::left_tiles + S::blocks; job += warps) {
        float4 four = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int rank = 0; rank < S::group; ++rank) four = four + totals.vector(rank, job, lane.index);
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
    const PairLane lane;
    for (int job = warp; job < S::group * S::bias_tiles; job += warps) {
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

// dA_i[p,q] of one side, by one thread. Neighbouring lanes have different rows of dC. Second: its rows are (q,i).
template <class S, bool Second>
COMPACTER_DEVICE void store_rule(const Totals<S>& totals, float* gradient, const float* factor, int e) {
    const int i = e % S::n, row = e / S::n % S::n, other = e / (S::n * S::n);
    const float* from = totals.plain(Second) + (row * S::n + i) * S::plain_row + other * S::inner;
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < S::inner; ++v) sum = fmaf(from[v], factor[i * S::inner + v], sum);
    gradient[(i * S::n + (Second ? other : row)) * S::n + (Second ? row : other)] = sum;
}

// dt_i[v] of one side for one i and A_i, by a warp. Lane v + inner k has the columns (q,v) of every fourth q.
template <class S, bool Second>
COMPACTER_DEVICE void store_narrow(const Totals<S>& totals, float* gradient, const float* rule, int i) {
    static_assert(S::inner <= 8, "four numbers of a row (p,i) with the same v are in a warp");
    const int lane = threadIdx.x % 32, k = lane / S::inner, v = lane % S::inner;
    const float* from = totals.plain(Second) + i * S::plain_row + k * S::inner + v;
    float sum = 0.f;
    if (k < 4)
#pragma unroll
        for (int row = 0; row < S::n; ++row)
#pragma unroll
            for (int four = 0; four < S::n; four += 4)
                sum = fmaf(from[row * S::n * S::plain_row + four * S::inner],
                           rule[(Second ? four + k : row) * S::n + (Second ? row : four + k)], sum);
    sum += __shfl_down_sync(0xffffffff, sum, 2 * S::inner);
    sum += __shfl_down_sync(0xffffffff, sum, S::inner);
    if (k == 0) gradient[i * S::inner + v] = sum;
}

// The block's row of partials.
template <class S>
COMPACTER_DEVICE void store_row(const Totals<S>& totals, const Backward& b, float* row) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const RawFactors raw(floats_at(S::raw), known<S>(b.pair));
    totals.unpack();
    store_wide(totals, b, row, warp, warps);
    if (S::bias_tiles && b.has_bias2) store_bias2(totals, row + b.bias2, b.factors.scale, warp, warps);
    __syncthreads();
    constexpr int rules = S::n * S::n * S::n / 32;  // jobs of a warp: those of a rule, of the narrow factors, of the bias
    for (int job = warp; job < 2 * (rules + S::n) + 1; job += warps) {
        const int thread = job % rules * 32 + threadIdx.x % 32, i = job - 2 * rules;
        if (job < rules) store_rule<S, false>(totals, row + b.rule, raw.right, thread);
        else if (job < 2 * rules) store_rule<S, true>(totals, row + b.rule2, raw.left2, thread);
        else if (i < S::n) store_narrow<S, false>(totals, row + b.right, raw.rule + i * raw.matrix, i);
        else if (i < 2 * S::n) store_narrow<S, true>(totals, row + b.left2, raw.rule2 + (i - S::n) * raw.matrix, i - S::n);
        else if (b.factors.bias.data)
            for (int c = threadIdx.x % 32; c < S::d; c += 32) row[b.bias + c] = totals.bias(c);
    }
}

}  // namespace compacter::cuda
