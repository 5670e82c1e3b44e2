// The lane layout: a quantity c of the 16 tokens of a block is 16 consecutive floats, L[c][token].
//
// Two small products over such arrays compute everything between x and the output:
//     lane_gemm    O[a] = init(a) + sum_c coef(a, c) I[c]                   for each token
//     lane_outer   G[a][b] += sum_group sum_token L[group, a] R[group, b]   a weight's gradient
#pragma once

#include "kernels.h"
#include "simd.h"

namespace compacter::COMPACTER_ISA {

constexpr int lanes = static_cast<int>(cpu::block_tokens);
constexpr int lane_vectors = lanes / W;

// Strides count floats in coefficients, and rows of 16 floats in lane arrays.
struct Coefficients {
    const float* data;
    int64_t out_stride, in_stride;
};
struct LaneRows {
    float* data;
    int64_t stride;

    float* row(int64_t c) const { return data + c * stride * lanes; }
};

COMPACTER_INLINE void lane_gemm(LaneRows out, int64_t n_out, LaneRows in, int64_t n_in, Coefficients coef,
                                const float* init = nullptr) {
    constexpr int P = many_registers || lane_vectors < 2 ? lane_vectors : 2;  // vectors of tokens at once
    constexpr int largest = P == 1 ? 8 : 4;
    for (int l = 0; l < lanes; l += P * W)
        tiles<largest, largest / 2, 1>(0, n_out, [&](auto size, int64_t a) COMPACTER_INLINE_LAMBDA {
            constexpr int A = decltype(size)::value;
            Vec sum[A][P];
            const float* weight = coef.data + a * coef.out_stride;
            COMPACTER_UNROLL(8)
            for (int j = 0; j < A; ++j)
                COMPACTER_UNROLL(4)
                for (int s = 0; s < P; ++s) sum[j][s] = init ? splat(init[a + j]) : Vec{};
            const float* source = in.data + l;
            for (int64_t c = 0; c < n_in; ++c, source += in.stride * lanes, weight += coef.in_stride) {
                Vec value[P];
                COMPACTER_UNROLL(4)
                for (int s = 0; s < P; ++s) value[s] = load(source + s * W);
                COMPACTER_UNROLL(8)
                for (int j = 0; j < A; ++j)
                    COMPACTER_UNROLL(4)
                    for (int s = 0; s < P; ++s) sum[j][s] += splat(weight[j * coef.out_stride]) * value[s];
            }
            COMPACTER_UNROLL(8)
            for (int j = 0; j < A; ++j)
                COMPACTER_UNROLL(4)
                for (int s = 0; s < P; ++s) store(out.row(a + j) + l + s * W, sum[j][s]);
        });
}

// The rows of `left` and `right` are consecutive in a group. Group strides count rows.
struct OuterShape {
    int64_t groups, left_stride, left_rows, right_stride, right_rows;
};

inline void lane_outer(float* gradient, int64_t row_stride, const float* left, const float* right, int64_t left_row,
                       int64_t right_row, OuterShape shape) {
    constexpr int A = many_registers ? 4 : 2;
    tiles<A, 1>(0, shape.left_rows, [&](auto size, int64_t a) COMPACTER_INLINE_LAMBDA {
        for (int64_t b = 0; b < shape.right_rows; b += 4) {
            constexpr int R = decltype(size)::value;
            const int64_t columns = shape.right_rows - b < 4 ? shape.right_rows - b : 4;
            Vec sum[R][4] = {};
            for (int64_t group = 0; group < shape.groups; ++group) {
                const float* l = left + (group * shape.left_stride + a * left_row) * lanes;
                const float* r = right + (group * shape.right_stride + b * right_row) * lanes;
                COMPACTER_UNROLL(4)
                for (int s = 0; s < lanes; s += W) {
                    Vec value[4];
                    COMPACTER_UNROLL(4)
                    for (int k = 0; k < 4; ++k) value[k] = load(r + (k < columns ? k * right_row * lanes : 0) + s);
                    COMPACTER_UNROLL(4)
                    for (int j = 0; j < R; ++j) {
                        const Vec row = load(l + j * left_row * lanes + s);
                        COMPACTER_UNROLL(4)
                        for (int k = 0; k < 4; ++k) sum[j][k] += row * value[k];
                    }
                }
            }
            COMPACTER_UNROLL(4)
            for (int j = 0; j < R; ++j) {
                const Quad total = add_quarters(fold4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]));
                float* g = gradient + (a + j) * row_stride + b;
                if (columns == 4) {
                    store4(g, load4(g) + total);
                } else {
                    for (int64_t k = 0; k < columns; ++k) g[k] += total[k];
                }
            }
        }
    });
}

}  // namespace compacter::COMPACTER_ISA
