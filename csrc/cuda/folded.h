// The middle of an adapter of rank 1, between Z and V2, as two matrix products. The mix with a rule
// and the small factor beside it are one matrix:
//
//     y[q,v]  = sum_{p,i} Z[p,i] C1[(p,i),(q,v)] + b1[q,v]    C1[(p,i),(q,v)] = A1_i[p,q] t1_i[v]
//     V2[q,i] = sum_{p,v} h[p,v] C2[(p,v),(q,i)]              C2[(p,v),(q,i)] = A2_i[p,q] s2_i[v]
//
// A block copies all parameters to shared memory, in fp32, and forms right operands of matrix products
// from there: C1, C2, s1, and t2 with b2. This needs no load that waits for another one.
#pragma once

#include "kernels.h"
#include "numbers.h"
#include "pairs.h"

namespace compacter::cuda {

// All parameters in fp32, in their own layouts, one after the other. The lengths are multiples of eight.
// Rows of s1, t2 and b2 and matrices of a rule are padded, so that the lanes read from different banks.
struct RawFactors {
    static constexpr int pad = 4, left_pad = 8;
    int matrix, in, out;  // floats from one matrix of a rule, row of s1, row of t2 or b2 to the next
    const float *rule, *left, *right, *bias, *rule2, *left2, *right2, *bias2;

    COMPACTER_BOTH RawFactors(const float* at, const PairSizes& s)
        : matrix(s.n * s.n + pad), in(s.in + left_pad), out(s.in + pad), rule(at), left(rule + s.n * matrix),
          right(left + s.n * in), bias(right + s.bottleneck), rule2(bias + s.bottleneck), left2(rule2 + s.n * matrix),
          right2(left2 + s.bottleneck), bias2(right2 + s.n * out) {}
    COMPACTER_BOTH static constexpr int floats(int n, int in, int bottleneck) {
        return 2 * n * (n * n + pad) + n * (in + left_pad) + 2 * n * (in + pad) + 3 * bottleneck;
    }
};

// Eight numbers of an aligned array of any dtype.
COMPACTER_DEVICE void read_eight(const Array& array, int at, float (&v)[8]) {
    if (!array.data) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = 0.f;
    } else if (array.dtype == DType::f32) {
        to_floats(load_eight(static_cast<const f32*>(array.data) + at, 8, true), v);
    } else if (array.dtype == DType::bf16) {
        to_floats(load_eight(static_cast<const bf16*>(array.data) + at, 8, true), v);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = read(array, at + j);
    }
}

// The threads of the block copy all parameters; an absent bias is 0.
template <int N>
COMPACTER_DEVICE void stage_raw(float* to, const Factors& f, const PairSizes& s) {
    constexpr int matrix = N * N, pad = RawFactors::pad;
    const int all = 2 * N * matrix + 3 * (s.width + s.bottleneck);
    for (int e = threadIdx.x * 8; e < all; e += blockDim.x * 8) {
        Array from = f.rule;
        int at = e, first = 0, padding = pad;  // in the array; where it begins in shared memory; after each row
        bool of_rule = true;
        int begin = N * matrix, begin_there = N * (matrix + pad);
        const auto follows = [&](const Array& array, int count, int rows, int its_padding) {
            if (e >= begin) {
                from = array;
                at = e - begin;
                first = begin_there;
                padding = its_padding;
                of_rule = count == N * matrix;
            }
            begin += count;
            begin_there += count + rows * its_padding;
        };
        follows(f.left, s.width, N, RawFactors::left_pad);
        follows(f.right, s.bottleneck, 0, 0);
        follows(f.bias, s.bottleneck, 0, 0);
        follows(f.rule2, N * matrix, N, pad);
        follows(f.left2, s.bottleneck, 0, 0);
        follows(f.right2, s.width, N, pad);
        follows(f.bias2, s.width, N, pad);
        float v[8];
        read_eight(from, at, v);
        float* there = to + first + at + (of_rule ? at / matrix : s.by_in.quotient(at)) * padding;
        reinterpret_cast<float4*>(there)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(there)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
}

// s1 as right operands [block of 16 columns][fragment][lane]: a warp forms one eight of i.
template <int N>
COMPACTER_DEVICE void form_left(uint2* to, int block, int tile, const RawFactors& raw) {
    using P = Pairs<N>;
    const PairLane lane;
    const auto* from = reinterpret_cast<const float2*>(raw.left + P::z_index(tile, lane.g) * raw.in + block * 16) + lane.t;
    const PairParts first(from[0].x, from[0].y), second(from[4].x, from[4].y);
    to += (block * P::left_fragments + tile * 2) * 32 + lane.index;
    const uint2 rounded = make_uint2(first.rounded, second.rounded), rest = make_uint2(first.rest, second.rest);
    if (tile < P::whole) {
        to[0] = rounded;
        to[32] = rest;
    } else {
        to[0] = lane.g < 4 ? rounded : rest;
    }
}

// t2 and b2 as right operands [block of 16 columns][operand][lane][two eights of columns]: a warp forms
// one eight of columns.
template <int N>
COMPACTER_DEVICE void form_right2(uint2* to, int block, int eight, float scale, const RawFactors& raw) {
    using P = Pairs<N>;
    const PairLane lane;
    const int r = lane.t * 2, u = block * 16 + eight * 8 + lane.g;
    const auto parts = [&](const float* array, int row) {
        return PairParts(array[row * raw.out + u] * scale, array[(row + 1) * raw.out + u] * scale);
    };
    to += (block * P::operands * 32 + lane.index) * 2 + eight;
    if constexpr (N == 4) {
        const PairParts bias = parts(raw.bias2, r % 4);
        to[0] = make_uint2(parts(raw.right2, r % 4).rounded, lane.t < 2 ? bias.rounded : bias.rest);
    } else if constexpr (N == 8) {
        to[0] = make_uint2(parts(raw.right2, r).rounded, parts(raw.bias2, r).rounded);
    } else {
        to[0] = make_uint2(parts(raw.right2, r).rounded, parts(raw.right2, 8 + r % 4).rounded);
        to[64] = make_uint2(parts(raw.bias2, r).rounded, lane.t < 2 ? parts(raw.bias2, 8 + r % 4).rounded : 0u);
    }
}

// C1 as right operands [step of h][step of Z][lane][two eights of y]: a warp forms eight columns of y.
template <int N>
COMPACTER_DEVICE void form_columns(uint2* c1, int eight, const RawFactors& raw, const PairSizes& s) {
    using P = Pairs<N>;
    constexpr int next = N * N + RawFactors::pad;  // from A_i to the next one
    const PairLane lane;
    const int column = eight * 8 + lane.g, q = s.by_inner.quotient(column), v = column - q * s.inner;
    const bool exists = column < s.bottleneck;
    uint2* to = c1 + (eight / 2 * P::steps * 32 + lane.index) * 2 + eight % 2;
#pragma unroll
    for (int tile = 0; tile < P::z_tiles; ++tile) {
        const int i = P::z_index(tile, lane.t * 2);
        const float t0 = exists ? raw.right[i * s.inner + v] : 0.f, t1 = exists ? raw.right[(i + 1) * s.inner + v] : 0.f;
        const float* rule = raw.rule + i * next + (exists ? q : 0);  // A_i[p,q] is rule[p * N]
#pragma unroll
        for (int pair = 0; pair < P::count; ++pair) {
            const float *even = rule + 2 * pair * N, *odd = even + N;
            to[(pair * P::z_tiles + tile) * 64] =
                make_uint2(pack_bf16(even[0] * t0, even[next] * t1), pack_bf16(odd[0] * t0, odd[next] * t1));
        }
    }
}

// C2 as right operands [pair][step of h][fragment of V2][lane]: a warp forms one fragment of all pairs.
template <int N>
COMPACTER_DEVICE void form_rows(uint2* c2, int step, int f, const RawFactors& raw, const PairSizes& s) {
    using P = Pairs<N>;
    const PairLane lane;
    const int i = P::v_index(f, lane.g);
    float factor[4];
    const float* rule[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int k = step * 16 + lane.t * 2 + e % 2 + e / 2 * 8, p = s.by_inner.quotient(k);
        const bool exists = k < s.bottleneck;
        factor[e] = exists ? raw.left2[i * s.inner + k - p * s.inner] : 0.f;
        rule[e] = raw.rule2 + i * raw.matrix + (exists ? p : 0) * N + P::v_chunk(f, lane.g);
    }
#pragma unroll
    for (int pair = 0; pair < P::count; ++pair)
        c2[((pair * s.steps() + step) * P::v_fragments + f) * 32 + lane.index] =
            make_uint2(pack_bf16(rule[0][2 * pair] * factor[0], rule[1][2 * pair] * factor[1]),
                       pack_bf16(rule[2][2 * pair] * factor[2], rule[3][2 * pair] * factor[3]));
}

}  // namespace compacter::cuda
