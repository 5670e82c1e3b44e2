// The sums over tokens of a warp of backward_sides.cu, and the gradients that follow from them (formulas in sums.h).
#pragma once

#include "matrices.h"
#include "sides.h"

namespace compacter::cuda {

// Of four numbers of each lane, the sum of number g % 4 over the four lanes that differ only in g % 4.
COMPACTER_DEVICE float sum_own(const float (&d)[4]) {
    const int lane = lane_anew();
    const bool odd = lane & 4, high = lane & 8;
    float two[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
        two[e] = (high ? d[2 + e] : d[e]) + __shfl_xor_sync(0xffffffff, high ? d[e] : d[2 + e], 8);
    return (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffff, odd ? two[0] : two[1], 4);
}

template <class S>
struct SumsOfSide {
    float wide[S::blocks][2][4];   // ds1 or dt2: 16 columns u by i < 8, and by i >= 8 with the sums of both chunks
    float folded[S::steps][3][4];  // dC1 or dC2: 16 columns c = (q,v) by 8 rows (p,i)
    float bias[2];                 // db1: two columns c, of one token in eight

    // The block's row of partials. The rows of C1 and C2 are divided among the warps, so that each has all of dA_i[p,q]
    // for its p (its q in C2). The warps add the rest in shared memory.
    COMPACTER_DEVICE void store(const SidePart<S>& part, float* row) const {
        const Backward& b = part.b;
        auto* vectors = reinterpret_cast<float4*>(shared_memory() + S::parts);  // [warp][block][fragment][lane]
        float* narrow = floats_at(S::parts) + S::warps * S::blocks * 256;       // [warp][(i,v)]
        float* of_bias = narrow + S::warps * S::d;                              // [half][c]
        share_wide(vectors + part.warp * S::blocks * 64);
        share_bias(of_bias + part.warp / S::eights * S::d + part.warp % S::eights * 8);
        folded_gradients(part, row + (part.side ? b.rule2 : b.rule), narrow + part.warp * S::d);
        __syncthreads();
        if (b.has_bias2 && part.side == 1) store_bias2(row + b.bias2 + part.pair * 2 * S::chunk, b.factors.scale);
        store_wide(part, vectors, row);
        if (threadIdx.x < 2 * S::d) {
            const int side = threadIdx.x / S::d, c = threadIdx.x % S::d;
            float sum = 0.f;
#pragma unroll
            for (int pair = 0; pair < S::pairs; ++pair) sum += narrow[(side * S::pairs + pair) * S::d + c];
            row[(side ? b.left2 : b.right) + c] = sum;
            if (side == 0 && b.factors.bias.data) row[b.bias + c] = of_bias[c] + of_bias[S::d + c];
        }
    }

  private:
    COMPACTER_DEVICE void share_wide(float4* to) const {
        to += lane_anew();
#pragma unroll
        for (int block = 0; block < S::blocks; ++block)
#pragma unroll
            for (int fragment = 0; fragment < 2; ++fragment) {
                const float(&sum)[4] = wide[block][fragment];
                to[(block * 2 + fragment) * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
    }

    COMPACTER_DEVICE void share_bias(float* to) const {
        const PairLane lane;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float sum = bias[e];
#pragma unroll
            for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
            if (lane.g == 0) to[lane.t * 2 + e] = sum;
        }
    }

    // dA_i[p,q], and what the pair gives to dt_i[v]. The rows g of an accumulator are (q,v), so that the four v are in
    // four lanes, and the columns 2t and 2t + 1 are two i.
    COMPACTER_DEVICE void folded_gradients(const SidePart<S>& part, float* gradient, float* narrow) const {
        static_assert(S::inner == 4);
        const PairLane lane;
        const float* rules = floats_at(part.side ? S::rule2 : S::rule);
        const float* factors = floats_at(part.side ? S::narrow2 : S::narrow);
        const int of_row = part.side ? 1 : S::n, of_column = part.side ? S::n : 1, v = lane.g % 4;
        float sums[3][2] = {};  // of dt
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            const int chunk = part.pair * 2 + (r < 2 ? r : lane.t / 2), i = r < 2 ? lane.t * 2 : 8 + lane.t * 2 % 4;
            const float t[2] = {factors[i * 4 + v], factors[i * 4 + 4 + v]};
            const float* a = rules + i * S::matrix + chunk * of_row;
#pragma unroll
            for (int step = 0; step < S::steps; ++step) {
                const float(&d)[4] = folded[step][r];
                const int q = step * 4 + lane.g / 4;  // and two more in d[2] and d[3]
                const float sum = sum_own({d[0] * t[0], d[1] * t[1], d[2] * t[0], d[3] * t[1]});
                gradient[(i + v % 2) * S::n * S::n + chunk * of_row + (q + v / 2 * 2) * of_column] = sum;
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[r][e % 2] = fmaf(d[e], a[e % 2 * S::matrix + (q + e / 2 * 2) * of_column], sums[r][e % 2]);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float first = sums[0][e] + sums[1][e], last = sums[2][e];
            first += __shfl_xor_sync(0xffffffff, first, 16);
            last += __shfl_xor_sync(0xffffffff, last, 16);
            last += __shfl_xor_sync(0xffffffff, last, 2);
            if (lane.g < 4) narrow[(lane.t * 2 + e) * 4 + v] = first;
            if (lane.g < 4 && lane.t < 2) narrow[(8 + lane.t * 2 + e) * 4 + v] = last;
        }
    }

    // db2 of the warp's chunks, which follow each other.
    COMPACTER_DEVICE void store_bias2(float* gradient, float scale) const {
        const PairLane lane;
        if (lane.t != 2) return;
#pragma unroll
        for (int block = 0; block < S::blocks; ++block)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                gradient[e % 2 * S::chunk + block * 16 + lane.g + e / 2 * 8] = wide[block][1][e] * scale;
    }

    // ds1 and dt2: a warp adds those of all pairs, 16 columns u of eight i.
    COMPACTER_DEVICE static void store_wide(const SidePart<S>& part, const float4* vectors, float* row) {
        const PairLane lane;
        constexpr int each = S::blocks * 2;
        for (int job = part.warp; job < 2 * each; job += S::warps) {
            const int side = job / each, place = job % each, i = place % 2 * 8 + lane.t * 2;
            if (i >= S::n) continue;
            float sum[4] = {};
#pragma unroll
            for (int pair = 0; pair < S::pairs; ++pair) {
                const float4 four = vectors[((side * S::pairs + pair) * each + place) * 32 + lane.index];
                add(sum, {four.x, four.y, four.z, four.w});
            }
            const float scale = side ? part.b.factors.scale : 1.f;
            float* to = row + (side ? part.b.right2 : part.b.left) + i * S::chunk + place / 2 * 16 + lane.g;
#pragma unroll
            for (int e = 0; e < 4; ++e) to[e % 2 * S::chunk + e / 2 * 8] = sum[e] * scale;
        }
    }
};

}  // namespace compacter::cuda
