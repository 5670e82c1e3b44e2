// The sums over tokens that a warp of the wide backward keeps in registers, and the gradients that follow from them.
//
//     left[u,i]   = sum_{tok,p} x[p,u] dZ[p,i]    right2[u,i] = sum_{tok,q} g[q,u] V2[q,i]    of the warp's columns u
//     bias2[u,q]  = sum_tok g[q,u]                bias[q,v]   = sum_tok dy[q,v]               of the warp's chunk q
//     folded[0]   = dC1^T[(q,v),(p,i)]            folded[1]   = dC2^T[(p,v),(q,i)]            of the warp's chunk of y
// and at the end
//     dA1_i[p,q] = sum_v dC1[(p,i),(q,v)] t1_i[v]     dt1_i[v] = sum_{p,q} dC1[(p,i),(q,v)] A1_i[p,q]
//     dA2_i[p,q] = sum_v dC2[(q,i),(p,v)] s2_i[v]     ds2_i[v] = sum_{p,q} dC2[(q,i),(p,v)] A2_i[p,q]
//
// They are accumulators, 16 rows by 8 columns. Only dt1 and ds2 are sums over warps.
#pragma once

#include "wide_weights.h"

namespace compacter::cuda {

// Sums of eight numbers over the eight g of a warp: lane (g, t) gets that of number g.
COMPACTER_DEVICE float sum_over_rows(float (&v)[8]) {
    const int g = lane_anew() / 4;
#pragma unroll
    for (int half = 4; half; half /= 2)
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const bool upper = g & half;
            v[j] = (upper ? v[j + half] : v[j]) + __shfl_xor_sync(0xffffffff, upper ? v[j] : v[j + half], half * 4);
        }
    return v[0];
}

template <class S>
struct WideSums {
    float left[S::blocks][4], right2[S::blocks][4], bias2[S::blocks][4], folded[2][S::n][4], bias;

    // The block's row of partials.
    COMPACTER_DEVICE void store(const Backward& b, int warp, float* row) {
        const PairLane lane{lane_anew()};
        const int u = warp * S::columns + lane.g, c = lane.t * 2;
        const auto store_columns = [&](const float (&sum)[S::blocks][4], int at, float scale) {
            float* to = row + at + c * S::chunk + u;
#pragma unroll
            for (int block = 0; block < S::blocks; ++block)
#pragma unroll
                for (int e = 0; e < 4; ++e) to[e % 2 * S::chunk + block * 16 + e / 2 * 8] = sum[block][e] * scale;
        };
        store_columns(left, b.left, 1.f);
        store_columns(right2, b.right2, b.factors.scale);
        if (b.has_bias2) store_columns(bias2, b.bias2, b.factors.scale);
        bias += __shfl_xor_sync(0xffffffff, bias, 1);
        if (b.factors.bias.data && lane.t % 2 == 0) row[b.bias + warp * S::inner + lane.g + lane.t / 2 * 8] = bias;

        const Small<S> small;
        auto* shared = reinterpret_cast<float*>(shared_memory() + S::partial);  // dt1 and ds2: [side][warp][i][v]
        constexpr int all = S::n * S::inner;
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int i = c + e;
                float of_rule[S::n], of_factor[2] = {};  // of each p, before the sum over v; of v = g and g + 8
                const float f0 = small.factor(side, i, lane.g), f1 = small.factor(side, i, lane.g + 8);
#pragma unroll
                for (int p = 0; p < S::n; ++p) {
                    const float* sum = folded[side][p];
                    const float rule = small.rule(side, i, p, warp);
                    of_rule[p] = sum[e] * f0 + sum[2 + e] * f1;
                    of_factor[0] += sum[e] * rule;
                    of_factor[1] += sum[2 + e] * rule;
                }
                const int p = side ? warp : lane.g, q = side ? lane.g : warp;
                row[(side ? b.rule2 : b.rule) + (i * S::n + p) * S::n + q] = sum_over_rows(of_rule);
                float* to = shared + (side * S::warps + warp) * all + i * S::inner + lane.g;
                to[0] = of_factor[0];
                to[8] = of_factor[1];
            }
        __syncthreads();
        for (int job = threadIdx.x; job < 2 * all; job += blockDim.x) {
            const int side = job / all, at = job % all;
            float sum = 0.f;
#pragma unroll
            for (int other = 0; other < S::warps; ++other) sum += shared[(side * S::warps + other) * all + at];
            row[(side ? b.left2 : b.right) + at] = sum;
        }
    }
};

}  // namespace compacter::cuda
