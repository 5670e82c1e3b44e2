// The parameters of a backward in shared memory. C1, C2 and the wide factors are plain matrices of bf16, row by row.
//
//     x:  Z = x s1          y  = Z C1,    C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v]      dZ = dy C1^T
//     g:  dV2 = g t2^T      dh = dV2 C2,  C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]      V2 = h C2^T
//
// ldmatrix reads them as right operands of a product, transposed or not, so that each serves both directions. A wide
// factor has two parts: its n rows i rounded, then what rounding took. So has C1, and C2 for n = 4. The narrow
// parameters, from which C1 and C2 are formed and which the end of the kernel needs, are there in fp32.
#pragma once

#include "kernels.h"
#include "numbers.h"
#include "pairs.h"
#include "ring.h"
#include "shapes.h"
#include "stage.h"

namespace compacter::cuda {

COMPACTER_DEVICE uint32_t& word_at(int offset) { return *reinterpret_cast<uint32_t*>(shared_memory() + offset); }

// Eight numbers of an aligned array of any dtype, whose loads have started. Of an absent one they are 0.
struct AskedEight {
    DType dtype;
    uint4 raw[4] = {};

    AskedEight() = default;
    COMPACTER_DEVICE AskedEight(const Array& array, int at) : dtype(array.dtype) {
        const int vectors = !array.data ? 0 : dtype == DType::f64 ? 4 : dtype == DType::f32 ? 2 : 1;
        const auto* p = static_cast<const uint4*>(array.data) + at / 8 * vectors;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < vectors) raw[j] = load_constant(p + j);
    }

    COMPACTER_DEVICE void to_floats(float (&v)[8]) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint32_t pair = word(raw[0], j / 2), half = j % 2 ? pair >> 16 : pair & 0xffffu;
            if (dtype == DType::f32) v[j] = __uint_as_float(word(raw[j / 4], j % 4));
            else if (dtype == DType::bf16) v[j] = __uint_as_float(half << 16);
            else if (dtype == DType::f16) v[j] = from_f16(static_cast<uint16_t>(half));
            else v[j] = static_cast<float>(double_of(word(raw[j / 2], j % 2 * 2 + 1), word(raw[j / 2], j % 2 * 2)));
        }
    }
};

// Copies all parameters but bias2, of which the backward needs nothing.
template <class S>
COMPACTER_DEVICE void stage_parameters(const Factors& f) {
    constexpr int wide = 2 * S::width, rule = S::n * S::n * S::n, all = wide + 2 * rule + 3 * S::d, ahead = 2;
    for (int begin = threadIdx.x * 8; begin < all; begin += ahead * blockDim.x * 8) {
        AskedEight eights[ahead];
        int to[ahead];
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = begin + j * blockDim.x * 8;
            Array from = f.left;
            int start = 0, first = S::left;  // of the array, among all numbers; in shared memory
            int next = 0;
            const auto then = [&](const Array& array, int count, int there) {
                if (e >= next) {
                    from = array;
                    start = next;
                    first = there;
                }
                next += count;
            };
            then(f.left, S::width, S::left);
            then(f.right2, S::width, S::right2);
            then(f.rule, rule, S::rule);
            then(f.rule2, rule, S::rule2);
            then(f.right, S::d, S::narrow);
            then(f.left2, S::d, S::narrow2);
            then(f.bias, S::d, S::bias);
            const int at = e - start, row = at / S::chunk, matrix = e < wide + 2 * rule ? at / (S::n * S::n) : 0;
            to[j] = first + (e < wide ? row * S::factor_row + at % S::chunk * 2 : (at + matrix * S::rule_pad) * 4);
            if (e < all) eights[j] = AskedEight(from, at);
        }
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            const int e = begin + j * blockDim.x * 8;
            if (e >= all) break;
            float v[8];
            eights[j].to_floats(v);
            if (e < wide) {
                uint4 rounded, rest;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float scale = e < S::width ? 1.f : f.scale;
                    const PairParts parts(v[2 * k] * scale, v[2 * k + 1] * scale);
                    word(rounded, k) = parts.rounded;
                    word(rest, k) = parts.rest;
                }
                *reinterpret_cast<uint4*>(shared_memory() + to[j]) = rounded;
                *reinterpret_cast<uint4*>(shared_memory() + to[j] + S::n * S::factor_row) = rest;
            } else {
                reinterpret_cast<float4*>(floats_at(to[j]))[0] = make_float4(v[0], v[1], v[2], v[3]);
                reinterpret_cast<float4*>(floats_at(to[j]))[1] = make_float4(v[4], v[5], v[6], v[7]);
            }
        }
    }
}

// C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v] and C2[(q,i),(p,v)] = A2_i[p,q] s2_i[v]. A warp forms an eighth of them at once, rows
// of one i.
template <class S>
COMPACTER_DEVICE void form_folded() {
    constexpr int rows = S::n * S::n / 8;
    const int warp = warp_index(), warps = blockDim.x / 32;
#pragma unroll
    for (int c = threadIdx.x % 32 * 2; c < S::d; c += 64) {
        const int column = c / S::inner, v = c % S::inner;
        for (int part = warp; part < 8; part += warps) {
            const int i = part % S::n, first = part / S::n * rows;
            const float *rule = floats_at(S::rule) + i * S::matrix, *rule2 = floats_at(S::rule2) + i * S::matrix;
            const float2 narrow = reinterpret_cast<const float2*>(floats_at(S::narrow))[(i * S::inner + v) / 2];
            const float2 narrow2 = reinterpret_cast<const float2*>(floats_at(S::narrow2))[(i * S::inner + v) / 2];
            float a[rows], a2[rows];  // all are read before one row is written: the compiler keeps reads behind writes
#pragma unroll
            for (int j = 0; j < rows; ++j) {
                a[j] = rule[(first + j) * S::n + column];
                a2[j] = rule2[column * S::n + first + j];
            }
#pragma unroll
            for (int j = 0; j < rows; ++j) {
                const int at = ((first + j) * S::n + i) * S::folded_row + c * 2;
                const PairParts one(a[j] * narrow.x, a[j] * narrow.y), two(a2[j] * narrow2.x, a2[j] * narrow2.y);
                constexpr int rest = S::folded_part;
                word_at(S::folded + at) = one.rounded;
                word_at(S::folded2 + at) = two.rounded;
                word_at(S::folded + rest + at) = one.rest;
                if (S::parts == 2) word_at(S::folded2 + rest + at) = two.rest;
            }
        }
    }
}

}  // namespace compacter::cuda
