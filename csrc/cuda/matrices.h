// The weights of a backward as plain matrices of bf16 in shared memory, row by row.
//
//     x:  Z = x s1          y  = Z C1,    C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v]      dZ = dy C1^T
//     g:  dV2 = g t2^T      dh = dV2 C2,  C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]      V2 = h C2^T
//
// ldmatrix reads them as right operands of a product, transposed or not, so that each serves both directions. A wide
// factor has two parts: its n rows i rounded, then what rounding took. So have C1 and C2 for n = 4.
#pragma once

#include "folded.h"
#include "shapes.h"
#include "stage.h"

namespace compacter::cuda {

COMPACTER_DEVICE uint32_t& word_at(int offset) { return *reinterpret_cast<uint32_t*>(shared_memory() + offset); }

// The sizes that the parameters are staged with (folded.h), as far as they are known.
template <class S>
COMPACTER_DEVICE PairSizes known(const PairSizes& given) {
    PairSizes s = given;
    s.n = S::n;
    s.width = S::width;
    s.in = S::chunk;
    s.bottleneck = S::d;
    s.inner = S::inner;
    return s;
}

// s1_i[u] and scale t2_i[u], in two parts each.
template <class S>
COMPACTER_DEVICE void form_wide(const RawFactors& raw, float scale) {
#pragma unroll 2
    for (int e = threadIdx.x; e < S::width / 2; e += blockDim.x) {
        const int i = e / (S::chunk / 2), u = e % (S::chunk / 2) * 2, at = i * S::factor_row + u * 2;
        const float *s = raw.left + i * raw.in + u, *t = raw.right2 + i * raw.out + u;
        const PairParts left(s[0], s[1]), right2(t[0] * scale, t[1] * scale);
        constexpr int rest = S::n * S::factor_row;
        word_at(S::left + at) = left.rounded;
        word_at(S::left + rest + at) = left.rest;
        word_at(S::right2 + at) = right2.rounded;
        word_at(S::right2 + rest + at) = right2.rest;
    }
}

// C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v] and C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]. A warp writes a row at once.
template <class S>
COMPACTER_DEVICE void form_folded(const RawFactors& raw) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int c = threadIdx.x % 32 * 2; c < S::d; c += 64) {
        const int q[2] = {c / S::inner, (c + 1) / S::inner}, v[2] = {c % S::inner, (c + 1) % S::inner};
#pragma unroll 4
        for (int row = warp; row < S::n * S::n; row += warps) {
            const int p = row / S::n, i = row % S::n;
            const float *rule = raw.rule + i * raw.matrix, *rule2 = raw.rule2 + i * raw.matrix;
            const float *right = raw.right + i * S::inner, *left2 = raw.left2 + i * S::inner;
            const PairParts one(rule[p * S::n + q[0]] * right[v[0]], rule[p * S::n + q[1]] * right[v[1]]);
            const PairParts two(rule2[q[0] * S::n + p] * left2[v[0]], rule2[q[1] * S::n + p] * left2[v[1]]);
            const int at = row * S::folded_row + c * 2;
            constexpr int rest = S::folded_part;
            word_at(S::folded + at) = one.rounded;
            word_at(S::folded2 + at) = two.rounded;
            if (S::parts == 2) {
                word_at(S::folded + rest + at) = one.rest;
                word_at(S::folded2 + rest + at) = two.rest;
            }
        }
    }
}

template <class S>
COMPACTER_DEVICE void prepare(const Factors& f, const PairSizes& given) {
    const PairSizes s = known<S>(given);
    stage_raw<S::n>(floats_at(S::raw), f, s);
    __syncthreads();
    const RawFactors raw(floats_at(S::raw), s);
    form_wide<S>(raw, f.scale);
    form_folded<S>(raw);
    __syncthreads();
}

}  // namespace compacter::cuda
