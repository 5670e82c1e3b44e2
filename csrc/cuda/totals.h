// The sums of a block, and its row of partials.
//
// At the end, each warp writes what it has to the place of its group's tiles: its wide sums as they are, and what dC1, dC2
// and the sums of dy give to the narrow gradients. All warps then add what the groups and warps have, in a fixed order.
#pragma once

#include "sums.h"

namespace compacter::cuda {

COMPACTER_DEVICE float4 operator+(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <class S>
struct Totals {
    unsigned char* first;
    int groups, stride;  // bytes from one group to the next

    // The wide sums, as [rank][place][lane].
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

    // Behind them, of a group: the gradients of the rules [i][k][c]; of each warp those of the narrow factors [i][pair]; and
    // that of the bias.
    COMPACTER_DEVICE float* rule(int group, int second) const {
        return reinterpret_cast<float*>(first + group * stride + S::wide_bytes) + second * S::n * S::matrix;
    }
    COMPACTER_DEVICE float2* narrow(int group, int rank, int second) const {
        return reinterpret_cast<float2*>(rule(group, 2)) + (rank * 2 + second) * S::n * S::cycle * 4;
    }
    COMPACTER_DEVICE float2* bias(int group) const { return narrow(group, S::group, 0); }

    // The compiler keeps reads behind writes, so what needs the parameters is computed before any of it is written.
    COMPACTER_DEVICE void write(const Sums<S>& sums, int group, int rank) const {
        const PairLane lane{lane_anew()};
#pragma unroll
        for (int place = 0; place < S::wide; ++place) wide(group, rank, place)[lane.index] = sums.vector(place);
        const NarrowSums<S> first_side(sums, rank, 0), second_side(sums, rank, 1);
        float2 of_bias[S::share];
#pragma unroll
        for (int e = 0; e < S::share; ++e) {
            const float(&sum)[4] = sums.at[S::at_bias + e];
            of_bias[e] = make_float2(sum_of_lanes<8, 4>(sum[0]), sum_of_lanes<8, 4>(sum[1]));
        }
        first_side.write(rule(group, 0), narrow(group, rank, 0), rank);
        second_side.write(rule(group, 1), narrow(group, rank, 1), rank);
#pragma unroll
        for (int e = 0; e < S::share; ++e)
            if (lane.g == 0) bias(group)[(rank * S::share + e) * 4 + lane.t] = of_bias[e];
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

// The gradients of the rules, the narrow factors and the bias: a warp writes those of one i, and eight of the bias.
template <class S>
COMPACTER_DEVICE void store_narrow(const Totals<S>& totals, const Backward& b, float* row, int warp, int warps) {
    constexpr int pairs = S::inner / 2, columns = S::cycle * 4, vectors = S::n * S::n / 2;
    static_assert(columns <= 32 && vectors <= 32 && S::eights <= S::n);
    const int lane = lane_anew(), of_narrow = lane < columns ? lane : 0, of_rule = lane < vectors ? lane : 0;
    for (int i = warp; i < S::n; i += warps) {
        const int of_bias = i < S::eights ? i * 4 + lane % 4 : 0;
        float2 rule[2] = {}, narrow[2] = {}, bias = {};
#pragma unroll
        for (int group = 0; group < S::most_groups; ++group) {
            const bool exists = group < totals.groups;
            const int from = exists ? group : 0;  // no branch, so that all loads start at once
            const auto add_to = [&](float2& sum, const float2& other) {
                sum = make_float2(sum.x + (exists ? other.x : 0.f), sum.y + (exists ? other.y : 0.f));
            };
#pragma unroll
            for (int second = 0; second < 2; ++second) {
                add_to(rule[second], reinterpret_cast<const float2*>(totals.rule(from, second) + i * S::matrix)[of_rule]);
#pragma unroll
                for (int rank = 0; rank < S::group; ++rank)
                    add_to(narrow[second], totals.narrow(from, rank, second)[i * columns + of_narrow]);
            }
            add_to(bias, totals.bias(from)[of_bias]);
        }
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            // Pairs of columns have the same v when they are a chunk apart.
            const float2 sum = make_float2(sum_of_lanes<columns / pairs, pairs>(narrow[second].x),
                                           sum_of_lanes<columns / pairs, pairs>(narrow[second].y));
            if (lane < pairs) reinterpret_cast<float2*>(row + (second ? b.left2 : b.right) + i * S::inner)[lane] = sum;
            float* to = row + (second ? b.rule2 : b.rule) + i * S::n * S::n;
            const int k = lane * 2 / S::n, c = lane * 2 % S::n, next = second ? S::n : 1;
            to += second ? c * S::n + k : k * S::n + c;
            if (lane < vectors) {
                to[0] = rule[second].x;
                to[next] = rule[second].y;
            }
        }
        if (i < S::eights && lane < 4 && b.factors.bias.data) reinterpret_cast<float2*>(row + b.bias + i * 8)[lane] = bias;
    }
}

// The block's row of partials, from the sums of its warps.
template <class S>
COMPACTER_DEVICE void store_row(const Sums<S>& sums, const Totals<S>& totals, const Backward& b, const Group& group, float* row) {
    const int warp = warp_index(), warps = totals.groups * S::group;
    totals.write(sums, group.index, group.rank);
    __syncthreads();
    store_wide(totals, b, row, warp, warps);
    if (S::bias_tiles && b.has_bias2) store_bias2(totals, row + b.bias2, b.factors.scale, warp, warps);
    store_narrow(totals, b, row, warp, warps);
}

}  // namespace compacter::cuda
