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

// Number e < 4 of a lane in a right operand is k = 2t + e % 2 + 8 (e / 2). body(fragment, number) gives
// the value; the warps of the block write `count` fragments.
template <bool Together, class Number>
COMPACTER_DEVICE void form_fragments(uint2* to, int count, const Number& number) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll 2
    for (int at = warp; at < count; at += warps) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = number(at, e);
        to[fragment_place<Together>(at, lane)] = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
    }
}

// C1 as right operands [step of h][step of Z][lane][two eights of y], C2 as [pair][step of h][fragment of V2][lane].
template <int N>
COMPACTER_DEVICE void form_middle(uint2* c1, uint2* c2, const RawFactors& raw, const PairSizes& s) {
    using P = Pairs<N>;
    const PairLane lane;
    form_fragments<true>(c1, 2 * s.steps() * P::steps, [&](int at, int e) {
        const int pair = at / 2, column = pair / P::steps * 16 + at % 2 * 8 + lane.g, q = s.by_inner.quotient(column), v = column - q * s.inner;
        const int step = pair % P::steps, p = step / P::z_tiles * 2 + e / 2;
        const int i = P::z_index(step % P::z_tiles, lane.t * 2 + e % 2);
        return column < s.bottleneck ? raw.rule[(i * N + p) * N + q] * raw.right[i * s.inner + v] : 0.f;
    });
    form_fragments<false>(c2, P::count * s.steps() * P::v_fragments, [&](int at, int e) {
        const int f = at % P::v_fragments, rest = at / P::v_fragments, pair = s.by_steps.quotient(rest);
        const int k = (rest - pair * s.steps()) * 16 + lane.t * 2 + e % 2 + e / 2 * 8;
        const int p = s.by_inner.quotient(k), v = k - p * s.inner;
        const int q = pair * 2 + P::v_chunk(f, lane.g), i = P::v_index(f, lane.g);
        return k < s.bottleneck ? raw.rule2[(i * N + p) * N + q] * raw.left2[i * s.inner + v] : 0.f;
    });
}

}  // namespace compacter::cuda
