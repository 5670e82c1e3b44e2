// The products of the forward for pairs of chunks, of one tile of a group of warps.
//
//     Z[p,i]   = sum_u x[p,u] s1_i[u]                              contract
//     h[q,v]   = act(sum_{p,i} Z[p,i] C1[(p,i),(q,v)] + b1[q,v])   bottleneck
//     V2[q,i]  = sum_{p,v} h[p,v] C2[(p,v),(q,i)]                  mix
//     out[q,u] = residual[q,u] + sum_i V2[q,i] t2_i[u] + b2[q,u]   expand
//
// Each sum is a matrix product, and the sums of one are the left operand of the next (pairs.h):
//
//                 left operand           right operand     sums
//     contract    x, pairs of chunks     s1                Z, pairs of chunks
//     bottleneck  Z, tokens              C1                y, tokens
//     mix         h, tokens              C2                V2, tokens
//     expand      V2, pairs of chunks    t2 and b2         out, pairs of chunks, where the residual was
//
// A warp has all columns of its own chunks, but y needs Z of all chunks and V2 needs all h. So the warps
// of a group exchange Z and h through shared memory. `scale` multiplies t2 and b2. The rows of b2 follow
// those of t2 in the right operand: they meet a 1 in the rows of chunk q. C1 and C2 are in folded.h.
#pragma once

#include "activations.h"
#include "folded.h"
#include "ring.h"
#include "stage.h"

namespace compacter::cuda {

// A pair of bf16 with a 1 where c or c + 1 is q.
COMPACTER_DEVICE uint32_t one_at(int q, int c) { return (q == c ? 0x3f80u : 0u) | (q == c + 1 ? 0x3f800000u : 0u); }

template <int N>
struct PairPass {
    using P = Pairs<N>;
    static constexpr int pairs = P::of_warp;
    const PairForward& f;
    const PairSizes& s;
    PairLane lane;
    Group group;
    TilePart<N> part;
    uint4 *z, *h;  // exchanged as left operands: [step][lane]
    float4* sums;  // exchanged if warps share the columns of a chunk: [step of Z][share][lane]

    COMPACTER_DEVICE explicit PairPass(const PairForward& f)
        : f(f), s(f.sizes), group(P::owners, s.log_shares), part(s, group.rank) {
        z = reinterpret_cast<uint4*>(shared_memory() + f.exchange + group.index * f.exchange_bytes) + lane.index;
        h = z + P::steps * 32;
        sums = reinterpret_cast<float4*>(h + s.steps() * 32);
    }
    COMPACTER_DEVICE uint2* fragments(int offset) const { return reinterpret_cast<uint2*>(shared_memory() + offset); }

    // Brings the weights into the form of right operands.
    COMPACTER_DEVICE void prepare(const Factors& factors) const {
        stage_raw<N>(floats_at(f.raw), factors, s);
        __syncthreads();
        const RawFactors raw(floats_at(f.raw), s);
        for (int e = threadIdx.x; e < s.steps() * 16; e += blockDim.x)
            floats_at(f.bias)[e] = e < s.bottleneck ? raw.bias[e] : 0.f;
        // Every second kind of job begins with the last warp, so that few jobs spread over the warps.
        const int blocks = s.in / 16, warps = blockDim.x / 32, warp = threadIdx.x / 32, from_last = warps - 1 - warp;
        for (int job = warp; job < 2 * s.steps(); job += warps) form_columns<N>(fragments(f.c1), job, raw, s);
        for (int job = from_last; job < P::v_fragments * s.steps(); job += warps)
            form_rows<N>(fragments(f.c2), job / P::v_fragments, job % P::v_fragments, raw, s);
        for (int job = warp; job < P::z_tiles * blocks; job += warps)
            form_left<N>(fragments(f.left), job / P::z_tiles, job % P::z_tiles, raw);
        for (int job = from_last; job < 2 * blocks; job += warps)
            form_right2<N>(fragments(f.right2), job / 2, job % 2, f.factors.scale, raw);
        __syncthreads();
    }

    // Z of this warp's chunks over its columns.
    COMPACTER_DEVICE void contract(const unsigned char* x) const {
        constexpr int chains = P::left_fragments;
        float sum[pairs][chains][4] = {};
        const uint2* factor = fragments(f.left) + part.first_block * P::left_fragments * 32 + lane.index;
        const unsigned char* at = x + part.first + block_offset(lane.index, s.row, s.in * 2);
#pragma unroll 4
        for (int block = 0; block < part.blocks; ++block, at += 32, factor += P::left_fragments * 32) {
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair) {
                uint32_t a[4];
                load_matrices(a, at + pair * 4 * s.in);
#pragma unroll
                for (int j = 0; j < P::left_fragments; ++j) multiply(sum[pair][j], a, factor[j * 32].x, factor[j * 32].y);
            }
        }
#pragma unroll
        for (int pair = 0; pair < pairs; ++pair)
#pragma unroll
            for (int tile = 0; tile < P::z_tiles; ++tile) {
                float(&d)[4] = sum[pair][tile * 2];
                if (tile * 2 + 1 < chains)
#pragma unroll
                    for (int e = 0; e < 4; ++e) d[e] += sum[pair][tile * 2 + 1 < chains ? tile * 2 + 1 : 0][e];
                const int step = (part.owner * pairs + pair) * P::z_tiles + tile;
                if (s.shares() == 1)
                    z[step * 32] = both_parts(d[0], d[1], d[2], d[3]);
                else
                    sums[(step * s.shares() + part.share) * 32] = make_float4(d[0], d[1], d[2], d[3]);
            }
        group.sync();
        if (s.shares() == 1) return;
        for (int step = group.rank; step < P::steps; step += group.warps) {
            float4 sum = sums[step * s.shares() * 32];
            for (int share = 1; share < s.shares(); ++share) {
                const float4 other = sums[(step * s.shares() + share) * 32];
                sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
            }
            z[step * 32] = both_parts(sum.x, sum.y, sum.z, sum.w);
        }
        group.sync();
    }

    // h, in steps of 16 numbers of the bottleneck.
    COMPACTER_DEVICE void bottleneck() const {
        for (int at = group.rank; at < s.steps(); at += group.warps) {
            float y[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 bias = reinterpret_cast<const float2*>(floats_at(f.bias))[at * 8 + half * 4 + lane.t];
                y[half][0] = bias.x;
                y[half][1] = bias.y;
                y[half][2] = y[half][3] = 0.f;
            }
            const auto* c1 = reinterpret_cast<const uint4*>(fragments(f.c1)) + at * P::steps * 32 + lane.index;
#pragma unroll
            for (int step = 0; step < P::steps; ++step) {
                const uint4 a = z[step * 32], b = c1[step * 32];
                multiply(y[0], a, b.x, b.y);
                multiply(y[1], a, b.z, b.w);
            }
            float sum[4] = {y[0][0] + y[0][2], y[0][1] + y[0][3], y[1][0] + y[1][2], y[1][1] + y[1][3]};
            with_activation(f.factors.activation, [&](auto function) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[e] = function(sum[e]).value;
            });
            if (at * 16 + 8 >= s.bottleneck) sum[2] = sum[3] = 0.f;
            h[at * 32] = both_parts(sum[0], sum[1], sum[2], sum[3]);
        }
        group.sync();
    }

    // The left operands of the expansion: V2 of the warp's chunks, its rest, and the ones that pick the bias.
    struct Expanded {
        uint32_t a[pairs][N / 4][4];
    };
    COMPACTER_DEVICE Expanded mix() const {
        constexpr int count = P::v_fragments;
        float v[pairs][count][4] = {};
        const int pair_stride = s.steps() * count * 32;
        const uint2* c2 = fragments(f.c2) + part.owner * pairs * pair_stride + lane.index;
#pragma unroll 2
        for (int step = 0; step < s.steps(); ++step, c2 += count * 32) {
            const uint4 four = h[step * 32];
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair)
#pragma unroll
                for (int j = 0; j < count; ++j) {
                    const uint2 b = c2[pair * pair_stride + j * 32];
                    multiply(v[pair][j], four, b.x, b.y);
                }
        }
        Expanded found;
#pragma unroll
        for (int pair = 0; pair < pairs; ++pair) {
            const auto sum = [&](int j, int e) { return v[pair][j][e] + v[pair][j][e + 2]; };
            const uint4 both = both_parts(sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1));
            const uint32_t part_of[2][2] = {{both.x, both.y}, {both.z, both.w}};
            auto& a = found.a[pair];
            const bool upper = lane.t >= 2;  // lanes of the columns 4 to 7
#pragma unroll
            for (int chunk = 0; chunk < 2; ++chunk) {
                const int q = (part.owner * pairs + pair) * 2 + chunk;
                if constexpr (N == 4) {
                    a[0][chunk] = upper ? part_of[chunk][1] : part_of[chunk][0];
                    a[0][2 + chunk] = one_at(q, lane.t * 2 % 4);
                } else if constexpr (N == 8) {
                    a[0][chunk] = part_of[chunk][0];
                    a[0][2 + chunk] = one_at(q, lane.t * 2);
                    a[1][chunk] = part_of[chunk][1];
                } else {
                    const uint4 last = both_parts(sum(count - 1, 0), sum(count - 1, 1), 0.f, 0.f);
#pragma unroll
                    for (int low = 0; low < 2; ++low) {
                        a[low][chunk] = part_of[chunk][low];
                        a[low][2 + chunk] = upper == (chunk == 1) ? (low ? last.y : last.x) : 0u;
                    }
                    a[2][chunk] = one_at(q, lane.t * 2);
                    a[2][2 + chunk] = one_at(q, 8 + lane.t * 2);
                }
            }
        }
        return found;
    }

    // The output of the warp's part, in the place of the residual.
    COMPACTER_DEVICE void expand(unsigned char* tile, const Expanded& v) const {
        const auto* factor = reinterpret_cast<const uint4*>(fragments(f.right2)) + lane.index;
        factor += part.first_block * P::operands * 32;
        unsigned char* at = tile + part.first + block_offset(lane.index, s.row, s.in * 2);
        uint32_t next[pairs][4];
#pragma unroll
        for (int pair = 0; pair < pairs; ++pair) load_matrices(next[pair], at + pair * 4 * s.in);
#pragma unroll 2
        for (int block = 0; block < part.blocks; ++block, at += 32, factor += P::operands * 32) {
            uint4 b[P::operands];  // of two products, eight columns each
#pragma unroll
            for (int j = 0; j < P::operands; ++j) b[j] = factor[j * 32];
            float left[pairs][4], right[pairs][4];  // the first eight columns, the next eight
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair) {
                const uint32_t(&x)[4] = next[pair];
                widen(bf16{}, x[0], left[pair][0], left[pair][1]);
                widen(bf16{}, x[1], left[pair][2], left[pair][3]);
                widen(bf16{}, x[2], right[pair][0], right[pair][1]);
                widen(bf16{}, x[3], right[pair][2], right[pair][3]);
            }
#pragma unroll
            for (int term = 0; term < N / 4; ++term)
#pragma unroll
                for (int pair = 0; pair < pairs; ++pair) {
                    const uint32_t(&a)[4] = v.a[pair][term];
                    const uint4& of_term = b[term / 2];
                    if (N == 8 && term == 1) {  // the rest of V2 has no bias beside it
                        mma_16x8x8(left[pair], {a[0], a[1]}, of_term.x);
                        mma_16x8x8(right[pair], {a[0], a[1]}, of_term.z);
                    } else {
                        multiply(left[pair], a, of_term.x, of_term.y);
                        multiply(right[pair], a, of_term.z, of_term.w);
                    }
                }
            if (block + 1 < part.blocks)
#pragma unroll
                for (int pair = 0; pair < pairs; ++pair) load_matrices(next[pair], at + 32 + pair * 4 * s.in);
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair) {
                const float(&l)[4] = left[pair], (&r)[4] = right[pair];
                store_matrices(at + pair * 4 * s.in,
                               {pack_bf16(l[0], l[1]), pack_bf16(l[2], l[3]), pack_bf16(r[0], r[1]), pack_bf16(r[2], r[3])});
            }
        }
    }
};

}  // namespace compacter::cuda
