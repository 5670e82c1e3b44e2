// The weights of the wide backward: s1 and t2 in the lines of each warp, C1 and C2 (folded.h) as left operands.
#pragma once

#include "folded.h"
#include "stage.h"
#include "wide.h"

namespace compacter::cuda {

// The small parameters, in fp32 in shared memory (stage.h), and C1 and C2. Side 0 is that of x, side 1 that of g.
template <class S>
struct Small {
    const Backward& b;
    static constexpr int matrix = S::n * S::n + 4, row = S::inner | 1;  // floats to the next matrix of a rule, factor

    COMPACTER_DEVICE explicit Small(const Backward& b) : b(b) {}

    COMPACTER_DEVICE float bias(int q, int v) const { return floats_at(b.shared.bias)[v * S::n + q]; }
    COMPACTER_DEVICE float factor(int side, int i, int v) const {
        return floats_at(side ? b.shared.left2 : b.shared.right)[i * row + v];
    }
    // A1_i[p,q], or A2_i[q,p]: p is a chunk of x or g, q of the bottleneck.
    COMPACTER_DEVICE float rule(int side, int i, int p, int q) const {
        const int at = i * matrix + (side ? q * S::n + p : p * S::n + q);
        return floats_at(side ? b.shared.rule2 : b.shared.rule)[at];
    }
    COMPACTER_DEVICE float folded(int side, int p, int i, int q, int v) const {
        return rule(side, i, p, q) * factor(side, i, v);
    }
};

// The lines of s1 or t2 of the warp's columns. The eight columns of lane t of a half line, pairs j = 0 to 3, are in
// eights j of the half line, at place t. So ldmatrix gives a lane the numbers for its own eight neighbours of x, g, dx.
template <class S>
COMPACTER_DEVICE void form_lines(const WidePart<S>& part, int side, const Array& factor, float scale) {
    const int lane = lane_anew(), i = lane / 4, t = lane % 4;
    unsigned char* lines = part.own() + S::factors + side * S::factor + t * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float v[8];
        read_eight(factor, i * S::chunk + part.warp * S::columns + half * 32 + t * 8, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const PairParts parts(v[2 * j] * scale, v[2 * j + 1] * scale);
            *reinterpret_cast<uint32_t*>(lines + in_lines(i, half * 4 + j)) = parts.rounded;
            *reinterpret_cast<uint32_t*>(lines + in_lines(S::n + i, half * 4 + j)) = parts.rest;
        }
    }
}

// The columns of C1 and C2 of the warp's chunk q, transposed, for y and dh: [side][two p][lane] in its shared memory.
template <class S>
COMPACTER_DEVICE void form_columns(const WidePart<S>& part, const Small<S>& small) {
    const PairLane lane{lane_anew()};
    const int i = lane.t * 2, q = part.warp;
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int step = 0; step < S::pairs; ++step) {
            uint4 a;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int p = step * 2 + e / 2, v = lane.g + e % 2 * 8;
                word(a, e) = pack_bf16(small.folded(side, p, i, q, v), small.folded(side, p, i + 1, q, v));
            }
            part.columns()[(side * S::pairs + step) * 32 + lane.index] = a;
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
        for (int q = 0; q < S::n; ++q)
            rows[q][e] = pack_bf16(small.folded(side, p, i, q, v), small.folded(side, p, i, q, v + 1));
    }
}

}  // namespace compacter::cuda
