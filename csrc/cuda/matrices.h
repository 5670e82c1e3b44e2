// The weights of a backward as plain matrices of bf16 in shared memory, row by row.
//
//     x:  Z = x s1          y  = Z C1,    C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v]      dZ = dy C1^T
//     g:  dV2 = g t2^T      dh = dV2 C2,  C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]      V2 = h C2^T
//
// ldmatrix reads them as right operands of a product, transposed or not, so that each serves both directions. A wide
// factor has two parts: its n rows i rounded, then what rounding took.
#pragma once

#include "folded.h"
#include "shapes.h"
#include "stage.h"

namespace compacter::cuda {

COMPACTER_DEVICE uint32_t& word_at(int offset) { return *reinterpret_cast<uint32_t*>(shared_memory() + offset); }

// s_i[u] in two parts.
template <class S>
COMPACTER_DEVICE void stage_wide(int to, const Array& factor, float scale) {
    constexpr int ahead = 2;
    for (int first = threadIdx.x; first < S::width / 2; first += ahead * blockDim.x) {
        Asked asked[ahead][2];
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = first + j * blockDim.x, there = e < S::width / 2 ? e * 2 : 0;
            asked[j][0] = Asked(factor, there);
            asked[j][1] = Asked(factor, there + 1);
        }
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = first + j * blockDim.x;
            if (e >= S::width / 2) break;
            const int i = e / (S::chunk / 2), at = to + i * S::factor_row + e % (S::chunk / 2) * 4;
            uint32_t part[2];
            split(asked[j][0].value() * scale, asked[j][1].value() * scale, part);
            word_at(at) = part[0];
            word_at(at + S::n * S::factor_row) = part[1];
        }
    }
}

// C[(p,i),(q,v)] = A_i[p,q] t_i[v]; with Transposed, A_i[q,p] takes the place of A_i[p,q].
template <class S, bool Transposed>
COMPACTER_DEVICE void fold(int to, const float* rule, const float* factor) {
    for (int e = threadIdx.x; e < S::n * S::n * S::d / 2; e += blockDim.x) {
        const int c = e % (S::d / 2) * 2, row = e / (S::d / 2), p = row / S::n, i = row % S::n;
        float product[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int q = (c + j) / S::inner, v = (c + j) % S::inner;
            product[j] = rule[(i * S::n + (Transposed ? q : p)) * S::n + (Transposed ? p : q)] * factor[i * S::inner + v];
        }
        word_at(to + row * S::folded_row + c * 2) = pack_bf16(product[0], product[1]);
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
    stage_wide<S>(S::left, f.left, 1.f);
    stage_wide<S>(S::right2, f.right2, f.scale);
    __syncthreads();
    fold<S, false>(S::folded, raw.rule, raw.right);
    fold<S, true>(S::folded2, raw.rule2, raw.left2);
    __syncthreads();
}

}  // namespace compacter::cuda
