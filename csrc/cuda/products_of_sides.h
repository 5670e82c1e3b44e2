// The products of backward_sides.cu whose sums end with the tile, and the weights for them.
//
// The twelve i of a chunk are one and a half eights. A pair has three eights: i < 8 of its first chunk, i < 8 of its
// second chunk, and i >= 8 of both. The rows of a product are the 16 tokens of the tile.
#pragma once

#include "matrices.h"
#include "sides.h"

namespace compacter::cuda {

// The rows of C of a warp's pair as right operands: an eight of rows by eight columns c.
template <class S>
using Folded = uint32_t[3][S::eights];

// 16 tokens by the 24 numbers of a pair as left operands: i < 8 of both chunks, rounded; what rounding took; and i >= 8
// of both chunks, rounded and what rounding took. Of two neighbouring words, the first is row g, the second row g + 8.
struct Operand {
    Four first, rest, last;

    COMPACTER_DEVICE explicit Operand(const float (&d)[3][4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            split(d[0] + 2 * h, first[h], rest[h]);
            split(d[1] + 2 * h, first[2 + h], rest[2 + h]);
            split(d[2] + 2 * h, last[h], last[2 + h]);
        }
    }

  private:
    COMPACTER_DEVICE static void split(const float* d, uint32_t& rounded, uint32_t& rest) {
        rounded = pack_bf16(d[0], d[1]);
        const bool finite = fmaxf(fabsf(d[0]), fabsf(d[1])) < 3.38e38f;  // Inf - Inf would be NaN
        rest = finite ? pack_bf16(d[0] - low_of(rounded), d[1] - high_of(rounded)) : 0u;
    }
};

// The left operands of one chunk of dZ against s1: i < 8, what rounding took from these, and i >= 8 with both parts.
struct OfChunk {
    uint32_t first[2], rest[2], last[2];
};

template <class S>
struct SideProducts : SidePart<S> {
    using Part = SidePart<S>;
    using Part::b, Part::warp, Part::side, Part::pair, Part::rows_at;

    COMPACTER_DEVICE explicit SideProducts(const Backward& b) : Part(b) {}

    COMPACTER_DEVICE static float2* parts(int warp) {
        return reinterpret_cast<float2*>(shared_memory() + S::parts) + warp * S::eights * 64 + lane_anew();
    }

    // s1 in the order of the columns of dx (see expand).
    COMPACTER_DEVICE static void form_expanding() {
        for (int e = threadIdx.x; e < S::width / 2; e += S::threads) {
            const int i = e / (S::chunk / 2), u = e % (S::chunk / 2) * 2;
            const int place = u / 32 * 32 + u % 8 / 2 * 8 + u % 32 / 8 * 2;
            word_at(S::expanding + i * S::factor_row + place * 2) = word_at(S::left + i * S::factor_row + u * 2);
        }
    }

    // What rounding took from C1: of an eight of columns, [lane][two eights of rows], then [lane] of the third.
    COMPACTER_DEVICE int rest_of_c1(int eight) const { return S::rest + (pair * S::eights + eight) * 384; }

    // The rows (p,i) of C1, or (q,i) of C2.
    COMPACTER_DEVICE void form_folded(Folded<S>& c) const {
        const PairLane lane;
        const int of_row = side ? 1 : S::n, of_column = side ? S::n : 1, v = lane.g % S::inner;
        const float *rule[3], *narrow[3];
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            const int chunk = pair * 2 + (r < 2 ? r : lane.t / 2), i = r < 2 ? lane.t * 2 : 8 + lane.t * 2 % 4;
            rule[r] = floats_at(side ? S::rule2 : S::rule) + i * S::matrix + chunk * of_row;
            rule[r] += lane.g / S::inner * of_column;
            narrow[r] = floats_at(side ? S::narrow2 : S::narrow) + i * S::inner + v;
        }
#pragma unroll
        for (int e = 0; e < S::eights; ++e) {
            float low[3], high[3];
#pragma unroll
            for (int r = 0; r < 3; ++r) {
                const float* a = rule[r] + e * (8 / S::inner) * of_column;
                low[r] = a[0] * narrow[r][0];
                high[r] = a[S::matrix] * narrow[r][S::inner];
            }
            const uint4 first = both_parts(low[0], high[0], low[1], high[1]);
            const uint4 last = both_parts(low[2], high[2], 0.f, 0.f);
            c[0][e] = first.x;
            c[1][e] = first.z;
            c[2][e] = last.x;
            if (side == 1) continue;
            reinterpret_cast<uint2*>(shared_memory() + rest_of_c1(e))[lane.index] = make_uint2(first.y, first.w);
            word_at(rest_of_c1(e) + 256 + lane.index * 4) = last.y;
        }
    }

    // Z or dV2 of the pair.
    COMPACTER_DEVICE Operand project(const unsigned char* in) const {
        const int lane = lane_anew();
        const unsigned char* factor = shared_memory() + (side ? S::right2 : S::left);
        const unsigned char* first = factor + (lane % 8 + lane / 16 * S::n) * S::factor_row + lane / 8 % 2 * 16;
        const unsigned char* last = factor + (8 + lane % 4 + lane % 8 / 4 * S::n) * S::factor_row + lane / 8 * 16;
        in += rows_at(lane);
        float sum[2][2][4] = {};  // of a chunk: i < 8, and i >= 8 with what rounding took from s1 beside it
#pragma unroll
        for (int segment = 0; segment < S::segments; ++segment) {
            Four of_last;
            load_matrices(of_last, last + segment * 64);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int block = segment * 2 + half;
                Four of_first, a;
                load_matrices(of_first, first + block * 32);
#pragma unroll
                for (int chunk = 0; chunk < 2; ++chunk) {
                    load_matrices(a, in + chunk * S::chunk * 2 + block * 32);
                    mma_16x8x16(sum[chunk][0], a, {of_first[0], of_first[1]});
                    mma_16x8x16(sum[chunk][1], a, {of_last[2 * half], of_last[2 * half + 1]});
                    mma_16x8x16(sum[chunk][0], a, {of_first[2], of_first[3]});
                }
            }
        }
        const bool upper = lane % 4 >= 2;
        float z[3][4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float own = upper ? sum[1][1][e] : sum[0][1][e], other = upper ? sum[0][1][e] : sum[1][1][e];
            z[0][e] = sum[0][0][e];
            z[1][e] = sum[1][0][e];
            z[2][e] = own + __shfl_xor_sync(0xffffffff, other, 2);
        }
        return Operand(z);
    }

    // What the pair gives to y or dh. y has the rest of C1 too, since the slope of a ReLU depends on the sign of y.
    COMPACTER_DEVICE void fold(const Operand& z, const Folded<S>& c) const {
        const int lane = lane_anew();
        float2* to = parts(warp);
        float sum[S::eights][4] = {};
        if (side == 0)
#pragma unroll
            for (int e = 0; e < S::eights; ++e) {
                const uint2 rest = reinterpret_cast<const uint2*>(shared_memory() + rest_of_c1(e))[lane];
                mma_16x8x16(sum[e], z.first, {rest.x, rest.y});
                mma_16x8x8(sum[e], {z.last[0], z.last[1]}, word_at(rest_of_c1(e) + 256 + lane * 4));
            }
#pragma unroll
        for (int e = 0; e < S::eights; ++e) {
            mma_16x8x16(sum[e], z.first, {c[0][e], c[1][e]});
            mma_16x8x16(sum[e], z.rest, {c[0][e], c[1][e]});
            mma_16x8x8(sum[e], {z.last[0], z.last[1]}, c[2][e]);
            mma_16x8x8(sum[e], {z.last[2], z.last[3]}, c[2][e]);
            to[e * 64] = make_float2(sum[e][0], sum[e][1]);
            to[e * 64 + 32] = make_float2(sum[e][2], sum[e][3]);
        }
    }

    // dZ or V2 of the pair: i < 8 of each chunk, i >= 8 of both.
    COMPACTER_DEVICE void unfold(const Folded<S>& c, float (&u)[3][4]) const {
        const int lane = lane_anew();
        const unsigned char* middle =
            shared_memory() + S::middle + side * 2 * S::middle_bytes + lane % 16 * S::middle_row + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < S::steps; ++step) {
            Four rounded, rest;
            load_matrices(rounded, middle + step * 32);
            load_matrices(rest, middle + S::middle_bytes + step * 32);
#pragma unroll
            for (int r = 0; r < 3; ++r) {
                const uint32_t right[2] = {transpose_matrix(c[r][2 * step]), transpose_matrix(c[r][2 * step + 1])};
                mma_16x8x16(u[r], rounded, right);
                mma_16x8x16(u[r], rest, right);
            }
        }
    }

    // Gives dZ of the second chunk to the warp on the side of g. Each returns its chunk.
    COMPACTER_DEVICE OfChunk share(const float (&u)[3][4]) const {
        auto* shared = shared_memory() + S::parts + (S::pairs + pair) * S::eights * 512;
        auto* four = reinterpret_cast<uint4*>(shared) + lane_anew();
        auto* two = reinterpret_cast<uint2*>(shared + 512) + lane_anew();
        if (side == 1) {
            sync_threads(1 + pair, 64);
            return {{four->x, four->y}, {four->z, four->w}, {two->x, two->y}};
        }
        const Operand dz(u);
        const bool lower = lane_anew() % 4 < 2;  // has i >= 8 of the first chunk
        uint32_t first[2], second[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t rest = __shfl_xor_sync(0xffffffff, dz.last[2 + h], 2);
            first[h] = lower ? dz.last[h] : rest;
            second[h] = lower ? rest : dz.last[h];
        }
        *four = make_uint4(dz.first[2], dz.first[3], dz.rest[2], dz.rest[3]);
        *two = make_uint2(second[0], second[1]);
        sync_threads(1 + pair, 64);
        return {{dz.first[0], dz.first[1]}, {dz.rest[0], dz.rest[1]}, {first[0], first[1]}};
    }

    // dx = dZ s1^T (+ g) of a chunk, to memory. Column c of product j of a segment of 32 columns is 8 (c / 2) + 2 j +
    // c % 2, so that a lane has eight neighbours.
    COMPACTER_DEVICE void expand(int tile, const unsigned char* g, const OfChunk& z) const {
        const int lane = lane_anew(), row = token_of_row(lane / 4), count = valid_tokens<S>(b, tile);
        const int factor_row = lane / 8 % 2 ? 8 + lane % 4 : lane % 8;
        const int at = this->first() + side * S::chunk * 2 + lane % 4 * 16;
        const unsigned char* factor = shared_memory() + S::expanding + factor_row * S::factor_row + lane / 16 * 16;
        auto* to = static_cast<unsigned char*>(b.grad_x) + (int64_t{tile} * S::tokens + row) * S::width * 2 + at;
        g += row * S::row + at;
#pragma unroll
        for (int segment = 0; segment < S::segments; ++segment) {
            uint4 out[2] = {};
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (b.residual_is_x) out[h] = *reinterpret_cast<const uint4*>(g + 8 * h * S::row + segment * 64);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                Four f;
                load_matrices_transposed(f, factor + segment * 64 + j * 16);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    float sum[4];
                    widen(bf16{}, word(out[0], j + k), sum[0], sum[1]);
                    widen(bf16{}, word(out[1], j + k), sum[2], sum[3]);
                    mma_16x8x8(sum, z.rest, f[2 * k]);
                    mma_16x8x16(sum, {z.first[0], z.first[1], z.last[0], z.last[1]}, {f[2 * k], f[2 * k + 1]});
                    word(out[0], j + k) = pack_bf16(sum[0], sum[1]);
                    word(out[1], j + k) = pack_bf16(sum[2], sum[3]);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (row + 8 * h < count) *reinterpret_cast<uint4*>(to + 8 * h * S::width * 2 + segment * 64) = out[h];
        }
    }
};

}  // namespace compacter::cuda
