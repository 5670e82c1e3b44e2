// The weights of the wide backward: s1 and t2 in the lines of each warp, C1 and C2 (folded.h) as left operands.
#pragma once

#include "folded.h"
#include "stage.h"
#include "wide.h"

namespace compacter::cuda {

// The small parameters in fp32 in shared memory. Side 0 is that of x, side 1 that of g.
template <class S>
struct Small {
    COMPACTER_DEVICE float* rules(int side) const { return floats_at(S::small) + side * S::n * S::matrix; }
    COMPACTER_DEVICE float* factors(int side) const { return rules(2) + side * S::n * S::row; }
    COMPACTER_DEVICE float* biases() const { return factors(2); }

    COMPACTER_DEVICE float factor(int side, int i, int v) const { return factors(side)[i * S::row + v]; }
    // A1_i[p,q], or A2_i[q,p]: p is a chunk of x or g, q of the bottleneck.
    COMPACTER_DEVICE float rule(int side, int i, int p, int q) const {
        return rules(side)[i * S::matrix + (side ? q * S::n + p : p * S::n + q)];
    }
};

// All parameters, as a thread loads them. No load waits for another one.
template <class S>
struct AskedFactors {
    static constexpr int threads = 32 * S::warps, matrix = S::n * S::n, rules = S::n * matrix / threads;
    static_assert(2 * S::d == threads && rules * threads == S::n * matrix);

    Asked rule[2][rules], narrow, bias;  // of this thread: of the rules, of t1 or s2, of b1
    float wide[2][2][8];                 // s1, t2 of each half line

    COMPACTER_DEVICE AskedFactors(const Factors& f, int warp) {
        const int i = threadIdx.x % 32 / 4, column = warp * S::columns + threadIdx.x % 4 * 8;
#pragma unroll
        for (int j = 0; j < rules; ++j) {
            rule[0][j] = Asked(f.rule, threadIdx.x + j * threads);
            rule[1][j] = Asked(f.rule2, threadIdx.x + j * threads);
        }
        narrow = Asked(threadIdx.x < S::d ? f.right : f.left2, threadIdx.x % S::d);
        if (f.bias.data) bias = Asked(f.bias, threadIdx.x % S::d);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            read_eight(f.left, i * S::chunk + column + half * 32, wide[0][half]);
            read_eight(f.right2, i * S::chunk + column + half * 32, wide[1][half]);
        }
    }

    // The small parameters go to shared memory in fp32.
    COMPACTER_DEVICE void store(const Small<S>& small, bool has_bias) const {
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int j = 0; j < rules; ++j) {
                const int at = threadIdx.x + j * threads;
                small.rules(side)[at / matrix * S::matrix + at % matrix] = rule[side][j].value();
            }
        const int at = threadIdx.x % S::d;
        small.factors(threadIdx.x >= S::d)[at / S::inner * S::row + at % S::inner] = narrow.value();
        if (threadIdx.x < S::d) small.biases()[at] = has_bias ? bias.value() : 0.f;
    }
};

// The lines of s1 or t2 of the warp's columns. The eight columns of lane t of a half line, pairs j = 0 to 3, are in
// eights j of the half line, at place t. So ldmatrix gives a lane the numbers for its own eight neighbours of x, g, dx.
template <class S>
COMPACTER_DEVICE void form_lines(const WidePart<S>& part, int side, const float (&wide)[2][8], float scale) {
    const int lane = lane_anew(), i = lane / 4, t = lane % 4;
    unsigned char* lines = part.own() + S::factors + side * S::factor + t * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const PairParts parts(wide[half][2 * j] * scale, wide[half][2 * j + 1] * scale);
            *reinterpret_cast<uint32_t*>(lines + in_lines(i, half * 4 + j)) = parts.rounded;
            *reinterpret_cast<uint32_t*>(lines + in_lines(S::n + i, half * 4 + j)) = parts.rest;
        }
}

// The columns of C1 and C2 of the warp's chunk q, transposed, for y and dh: [side][two p][lane] in its shared memory.
template <class S>
COMPACTER_DEVICE void form_columns(const WidePart<S>& part, const Small<S>& small) {
    const PairLane lane{lane_anew()};
    const int i = lane.t * 2;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float rule[S::n][2], factor[2][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int p = 0; p < S::n; ++p) rule[p][e] = small.rule(side, i + e, p, part.warp);
#pragma unroll
            for (int eight = 0; eight < 2; ++eight) factor[eight][e] = small.factor(side, i + e, lane.g + eight * 8);
        }
#pragma unroll
        for (int step = 0; step < S::pairs; ++step) {
            uint4 a;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&r)[2] = rule[step * 2 + e / 2], (&f)[2] = factor[e % 2];
                word(a, e) = pack_bf16(r[0] * f[0], r[1] * f[1]);
            }
            part.columns()[(side * S::pairs + step) * 32 + lane.index] = a;
        }
    }
}

// The rows of two chunks p, of C1 for dZ or of C2 for V2: a left operand for each chunk q.
template <class S>
COMPACTER_DEVICE void form_rows(const WidePart<S>& part, const Small<S>& small, Four (&rows)[S::n]) {
    const PairLane lane{lane_anew()};
    const int side = part.side(), i = lane.g;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int p = part.pair() * 2 + e % 2, v = lane.t * 2 + e / 2 * 8;
#pragma unroll
        for (int q = 0; q < S::n; ++q) {
            const float rule = small.rule(side, i, p, q);
            rows[q][e] = pack_bf16(rule * small.factor(side, i, v), rule * small.factor(side, i, v + 1));
        }
    }
}

}  // namespace compacter::cuda
