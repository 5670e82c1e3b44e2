// The factors of one side of an adapter, and its rule folded with its narrow factor, in shared memory.
//
//     x:  Z = x s1          y  = Z C1,    C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v]      dZ = dy C1^T
//     g:  dV2 = g t2^T      dh = dV2 C2,  C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]      V2 = h C2^T
//
// All are plain matrices of bf16, row by row. ldmatrix reads them as right operands of a product, transposed or not,
// so that each serves both directions. A wide factor has two parts: its n rows i rounded, then what rounding took.
#pragma once

#include "kernels.h"
#include "numbers.h"
#include "shapes.h"
#include "stage.h"

namespace compacter::cuda {

COMPACTER_DEVICE uint32_t& word_at(int offset) { return *reinterpret_cast<uint32_t*>(shared_memory() + offset); }

// What rounding a pair to bf16 took from it. An Inf leaves a NaN.
COMPACTER_DEVICE uint32_t rest_of_pair(float low, float high, uint32_t rounded) {
    return pack_bf16(low - low_of(rounded), high - high_of(rounded));
}

// `count` parameters as fp32.
template <int Count>
COMPACTER_DEVICE void stage_floats(int to, const Array& from) {
    for (int e = threadIdx.x; e < Count; e += blockDim.x) floats_at(to)[e] = from.data ? read(from, e) : 0.f;
}

// s_i[u] in two parts.
template <class S>
COMPACTER_DEVICE void stage_wide(int to, const Array& factor, float scale) {
    constexpr int ahead = 4;
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
            const float low = asked[j][0].value() * scale, high = asked[j][1].value() * scale;
            const uint32_t rounded = pack_bf16(low, high);
            word_at(at) = rounded;
            word_at(at + S::n * S::factor_row) = rest_of_pair(low, high, rounded);
        }
    }
}

// C[(p,i),(q,v)] = A_i[p,q] t_i[v], or with Transposed rules A_i[q,p]
template <class S, bool Transposed>
COMPACTER_DEVICE void fold(int to, int rule, int factor) {
    for (int e = threadIdx.x; e < S::n * S::n * S::d / 2; e += blockDim.x) {
        const int c = e % (S::d / 2) * 2, row = e / (S::d / 2), p = row / S::n, i = row % S::n;
        float product[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int q = (c + j) / S::inner, v = (c + j) % S::inner;
            product[j] = floats_at(rule)[(i * S::n + (Transposed ? q : p)) * S::n + (Transposed ? p : q)] *
                         floats_at(factor)[i * S::inner + v];
        }
        word_at(to + row * S::folded_row + c * 2) = pack_bf16(product[0], product[1]);
    }
}

template <class S>
COMPACTER_DEVICE void prepare(const Factors& f) {
    stage_floats<S::n * S::n * S::n>(S::rule, f.rule);
    stage_floats<S::n * S::n * S::n>(S::rule2, f.rule2);
    stage_floats<S::d>(S::right, f.right);
    stage_floats<S::d>(S::left2, f.left2);
    stage_floats<S::d>(S::bias, f.bias);
    stage_wide<S>(S::left, f.left, 1.f);
    stage_wide<S>(S::right2, f.right2, f.scale);
    __syncthreads();
    fold<S, false>(S::folded, S::rule, S::right);
    fold<S, true>(S::folded2, S::rule2, S::left2);
    __syncthreads();
}

}  // namespace compacter::cuda
