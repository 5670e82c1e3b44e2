// The middle of an adapter of rank 1, between Z and V2, as two matrix products. The mix with a rule
// and the small factor beside it are one matrix:
//
//     y[q,v]  = sum_{p,i} Z[p,i] C1[(p,i),(q,v)] + b1[q,v]    C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v]
//     V2[q,i] = sum_{p,v} h[p,v] C2[(p,v),(q,i)]              C2[(p,v),(q,i)] = A2_i[p,q] s2_i[v]
//
// C1 and C2 are formed once for each block, from factors that are first copied to shared memory.
#pragma once

#include "kernels.h"
#include "pairs.h"

namespace compacter::cuda {

// The small factors in shared memory, in fp32, in the layouts of the parameters.
struct RawFactors {
    float *rule, *right, *rule2, *left2;

    COMPACTER_DEVICE RawFactors(void* at, const PairSizes& s)
        : rule(static_cast<float*>(at)), right(rule + s.n * s.n * s.n), rule2(right + s.bottleneck),
          left2(rule2 + s.n * s.n * s.n) {}
    static int floats(const PairSizes& s) { return 2 * (s.n * s.n * s.n + s.bottleneck); }
};

// Copies them, and b1 padded with zeros to whole steps. All five loads of a thread are in flight at once.
COMPACTER_DEVICE void stage_raw(const RawFactors& to, float* bias, const Factors& f, const PairSizes& s) {
    const int matrix = s.n * s.n * s.n, padded = s.steps() * 16, most = matrix > padded ? matrix : padded;
    for (int e = threadIdx.x; e < most; e += blockDim.x) {
        const int of_rule = e < matrix ? e : 0, of_factor = e < s.bottleneck ? e : 0;
        const Asked rule(f.rule, of_rule), rule2(f.rule2, of_rule), right(f.right, of_factor), left2(f.left2, of_factor);
        const Asked of_bias(f.bias.data ? f.bias : f.right, of_factor);
        if (e < matrix) {
            to.rule[e] = rule.value();
            to.rule2[e] = rule2.value();
        }
        if (e < s.bottleneck) {
            to.right[e] = right.value();
            to.left2[e] = left2.value();
        }
        if (e < padded) bias[e] = e < s.bottleneck && f.bias.data ? of_bias.value() : 0.f;
    }
}

// C1 as right operands [step of h][step of Z][lane][two eights of y]: a warp forms eight columns of y.
template <int N>
COMPACTER_DEVICE void form_columns(uint2* c1, int eight, const RawFactors& raw, const PairSizes& s) {
    using P = Pairs<N>;
    const PairLane lane;
    const int column = eight * 8 + lane.g, q = s.by_inner.quotient(column), v = column - q * s.inner;
    const bool exists = column < s.bottleneck;
    uint2* to = c1 + (eight / 2 * P::steps * 32 + lane.index) * 2 + eight % 2;
#pragma unroll
    for (int tile = 0; tile < P::z_tiles; ++tile) {
        const int i = P::z_index(tile, lane.t * 2);
        const float t0 = exists ? raw.right[i * s.inner + v] : 0.f, t1 = exists ? raw.right[(i + 1) * s.inner + v] : 0.f;
        const float* rule = raw.rule + i * N * N + (exists ? q : 0);  // A_i[p,q] is rule[p * N]
#pragma unroll
        for (int pair = 0; pair < P::count; ++pair) {
            const float *even = rule + 2 * pair * N, *odd = even + N;
            to[(pair * P::z_tiles + tile) * 64] =
                make_uint2(pack_bf16(even[0] * t0, even[N * N] * t1), pack_bf16(odd[0] * t0, odd[N * N] * t1));
        }
    }
}

// C2 as right operands [pair][step of h][fragment of V2][lane]: a warp forms one fragment of all pairs.
template <int N>
COMPACTER_DEVICE void form_rows(uint2* c2, int step, int f, const RawFactors& raw, const PairSizes& s) {
    using P = Pairs<N>;
    const PairLane lane;
    const int i = P::v_index(f, lane.g);
    float factor[4];
    const float* rule[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int k = step * 16 + lane.t * 2 + e % 2 + e / 2 * 8, p = s.by_inner.quotient(k);
        const bool exists = k < s.bottleneck;
        factor[e] = exists ? raw.left2[i * s.inner + k - p * s.inner] : 0.f;
        rule[e] = raw.rule2 + (i * N + (exists ? p : 0)) * N + P::v_chunk(f, lane.g);
    }
#pragma unroll
    for (int pair = 0; pair < P::count; ++pair)
        c2[((pair * s.steps() + step) * P::v_fragments + f) * 32 + lane.index] =
            make_uint2(pack_bf16(rule[0][2 * pair] * factor[0], rule[1][2 * pair] * factor[1]),
                       pack_bf16(rule[2][2 * pair] * factor[2], rule[3][2 * pair] * factor[3]));
}

// Both, by all warps of the block.
template <int N>
COMPACTER_DEVICE void form_middle(uint2* c1, uint2* c2, const RawFactors& raw, const PairSizes& s) {
    using P = Pairs<N>;
    const int warps = blockDim.x / 32, columns = 2 * s.steps();
    for (int job = threadIdx.x / 32; job < columns + s.steps() * P::v_fragments; job += warps) {
        if (job < columns)
            form_columns<N>(c1, job, raw, s);
        else
            form_rows<N>(c2, (job - columns) / P::v_fragments, (job - columns) % P::v_fragments, raw, s);
    }
}

}  // namespace compacter::cuda
