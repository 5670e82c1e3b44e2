// The weights of the wide backward: s1 and t2 in the lines of each warp, C1 and C2 (matrices.h) as plain matrices.
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

// Where eight columns of C1 or C2 begin, from c on, in a row (p,i).
template <class S>
COMPACTER_DEVICE unsigned char* folded_at(int side, int row, int c) {
    return shared_memory() + S::folded + side * S::folded_side + row * S::folded_row + c * 2;
}

// C1[(p,i),(q,v)] and C2 alike, rounded, for a chunk q. A lane has row i of each p, and of it two pairs v.
template <class S>
COMPACTER_DEVICE void form_folded(const Small<S>& small, int q) {
    const int lane = lane_anew(), i = lane / 4, v = lane % 4 * 2;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float factor[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) factor[e] = small.factor(side, i, v + e % 2 + e / 2 * 8);
#pragma unroll
        for (int p = 0; p < S::n; ++p) {
            const float rule = small.rule(side, i, p, q);
            auto* to = reinterpret_cast<uint32_t*>(folded_at<S>(side, p * S::n + i, q * S::inner + v));
            to[0] = pack_bf16(rule * factor[0], rule * factor[1]);
            to[4] = pack_bf16(rule * factor[2], rule * factor[3]);
        }
    }
}

// What rounding took from C1, as left operands of y.
template <class S>
COMPACTER_DEVICE void form_rest(const Small<S>& small, int q, Four (&rest)[S::pairs]) {
    const PairLane lane{lane_anew()};
    const int i = lane.t * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int v = lane.g + e % 2 * 8;
        const float factor[2] = {small.factor(0, i, v), small.factor(0, i + 1, v)};
#pragma unroll
        for (int j = 0; j < S::pairs; ++j) {
            const int p = j * 2 + e / 2;
            rest[j][e] = PairParts(small.rule(0, i, p, q) * factor[0], small.rule(0, i + 1, p, q) * factor[1]).rest;
        }
    }
}

}  // namespace compacter::cuda
