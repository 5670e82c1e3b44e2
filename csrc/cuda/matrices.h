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

// s1_i[u] and scale t2_i[u], in two parts each.
template <class S>
COMPACTER_DEVICE void stage_wide(const Factors& f) {
    constexpr int ahead = 2;
    for (int first = threadIdx.x; first < S::width / 2; first += ahead * blockDim.x) {
        Asked asked[ahead][4];
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = first + j * blockDim.x, there = e < S::width / 2 ? e * 2 : 0;
            asked[j][0] = Asked(f.left, there);
            asked[j][1] = Asked(f.left, there + 1);
            asked[j][2] = Asked(f.right2, there);
            asked[j][3] = Asked(f.right2, there + 1);
        }
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = first + j * blockDim.x;
            if (e >= S::width / 2) break;
            const int i = e / (S::chunk / 2), at = i * S::factor_row + e % (S::chunk / 2) * 4;
            uint32_t left[2], right2[2];
            split(asked[j][0].value(), asked[j][1].value(), left);
            split(asked[j][2].value() * f.scale, asked[j][3].value() * f.scale, right2);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                word_at(S::left + at + part * S::n * S::factor_row) = left[part];
                word_at(S::right2 + at + part * S::n * S::factor_row) = right2[part];
            }
        }
    }
}

// C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v] and C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]. A warp writes a row at once.
template <class S>
COMPACTER_DEVICE void fold(const RawFactors& raw) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int c = threadIdx.x % 32 * 2; c < S::d; c += 64) {
        const int q[2] = {c / S::inner, (c + 1) / S::inner}, v[2] = {c % S::inner, (c + 1) % S::inner};
#pragma unroll 4
        for (int row = warp; row < S::n * S::n; row += warps) {
            const int p = row / S::n, i = row % S::n;
            const float *rule = raw.rule + i * S::n * S::n, *rule2 = raw.rule2 + i * S::n * S::n;
            const float *right = raw.right + i * S::inner, *left2 = raw.left2 + i * S::inner;
            uint32_t one[S::parts], two[S::parts];
            split(rule[p * S::n + q[0]] * right[v[0]], rule[p * S::n + q[1]] * right[v[1]], one);
            split(rule2[q[0] * S::n + p] * left2[v[0]], rule2[q[1] * S::n + p] * left2[v[1]], two);
#pragma unroll
            for (int part = 0; part < S::parts; ++part) {
                const int at = (part * S::n * S::n + row) * S::folded_row + c * 2;
                word_at(S::folded + at) = one[part];
                word_at(S::folded2 + at) = two[part];
            }
        }
    }
}

// The small factors in fp32.
template <class S>
COMPACTER_DEVICE RawFactors raw_factors() {
    PairSizes sizes{};
    sizes.n = S::n;
    sizes.bottleneck = S::d;
    return RawFactors(shared_memory() + S::raw, sizes);
}

template <class S>
COMPACTER_DEVICE void prepare(const Factors& f) {
    PairSizes sizes{};
    sizes.n = S::n;
    sizes.bottleneck = S::d;
    const RawFactors raw = raw_factors<S>();
    stage_raw(raw, floats_at(S::bias), f, sizes);
    stage_wide<S>(f);
    __syncthreads();
    fold<S>(raw);
    __syncthreads();
}

}  // namespace compacter::cuda
