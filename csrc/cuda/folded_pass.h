// The folded backward of one tile of a group of warps: every product is a matrix product, and all sums over tokens stay
// in registers.
//
//   Z = x s1    y = Z C1 + b1    h = act(y)               recomputed
//   dV2 = g t2^T    dh = dV2 C2    dy = dh act'(y)        C1, C2: matrices.h
//   dZ = dy C1^T    dx = dZ s1^T (+ g)
//   V2 = h C2^T
//   ds1 = x^T dZ    dt2 = g^T V2    db1, db2 = sums of dy, g    dC1 = Z^T dy    dC2 = dV2^T h       sums.h
//
// A group of warps has eight tokens at a time, and each of its warps some pairs of their chunks. pairs.h has a picture of
// the fragments, and of the sums of one product as the left operand of the next. products.h has the products without
// sums over tokens. A sum over tokens has the tokens along k, so that its operands are transposed, by ldmatrix or
// movmatrix:
//
//     ds1 = x^T dZ    16 columns u by 8 i       k 0-7 the tokens of chunk 2j, k 8-15 those of chunk 2j + 1
//     dC1 = Z^T dy    16 rows (p,i) by 8 (q,v)  k 0-7 the tokens with Z rounded, k 8-15 with what rounding took
//
// Tensor cores truncate, so each tile has fresh accumulators, which are then added to the sums.
#pragma once

#include "activations.h"
#include "products.h"
#include "totals.h"

namespace compacter::cuda {

COMPACTER_DEVICE void set_to_zero(float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = 0.f;
}

template <class S>
struct FoldedPass : Part<S> {
    using Part<S>::b, Part<S>::sync;
    static constexpr int own = S::own, share = S::share, steps = S::steps;

    COMPACTER_DEVICE explicit FoldedPass(const Backward& b) : Part<S>(b) {}

    // What the warps of a group exchange, a vector of each lane: Z and dV2 of each pair, then h and dy of each step.
    COMPACTER_DEVICE uint4* exchange() const {
        return reinterpret_cast<uint4*>(shared_memory() + S::exchange + this->group.index * S::exchange_bytes) + lane_anew();
    }

    // y and dh of the warp's share of the bottleneck, from Z and dV2.
    COMPACTER_DEVICE void to_bottleneck(const Operands<S>& z, const Operands<S>& v, Eights<S>& y, Eights<S>& dh) const {
        const float* bias = floats_at(S::bias) + this->first_eight() * 8 + lane_anew() % 4 * 2;
#pragma unroll
        for (int e = 0; e < share; ++e)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                y[e][j] = j < 2 ? bias[e * 8 + j] : 0.f;
                dh[e][j] = 0.f;
            }
        constexpr int of_y = S::n == 4 ? 1 : 2;  // y has both parts of C1: less would flip the sign of a y near 0, and so relu'
        const auto vector = [](const Four& a) { return make_uint4(a[0], a[1], a[2], a[3]); };
        if constexpr (S::group > 1) {
            uint4* shared = exchange();
#pragma unroll
            for (int s = 0; s < own; ++s) {
                shared[this->pair(s) * 32] = vector(z[s]);
                shared[(S::pairs + this->pair(s)) * 32] = vector(v[s]);
            }
            sync();
            fold<of_y>(*this, y, [&](int j) { return shared[j * 32]; }, S::folded);
            fold<1>(*this, dh, [&](int j) { return shared[(S::pairs + j) * 32]; }, S::folded2);
        } else {
            fold<of_y>(*this, y, [&](int j) { return vector(z[j]); }, S::folded);
            fold<1>(*this, dh, [&](int j) { return vector(v[j]); }, S::folded2);
        }
    }

    // h and dy, in place of y and dh. They are the sums of rows g and g + 8.
    COMPACTER_DEVICE void activate_all(Eights<S>& y, Eights<S>& dh, Sums<S>& sums) const {
        with_activation(b.factors.activation, [&](auto function) {
#pragma unroll
            for (int e = 0; e < share; ++e)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const ValueAndSlope a = function(y[e][j] + y[e][j + 2]);
                    y[e][j] = a.value;
                    dh[e][j] = (dh[e][j] + dh[e][j + 2]) * a.slope;
                }
        });
#pragma unroll
        for (int e = 0; e < share; ++e)
#pragma unroll
            for (int j = 0; j < 2; ++j) sums.at[S::at_bias + e][j] += dh[e][j];
    }

    // dZ and V2 of the warp's chunks, from dy and h, and what these give to dC1 and dC2.
    COMPACTER_DEVICE void from_bottleneck(const Operands<S>& z, const Operands<S>& v, const Eights<S>& h, const Eights<S>& dy,
                                          Chunks<S>& dz, Chunks<S>& v2, Sums<S>& sums) const {
        constexpr int own_steps = (share + 1) / 2;
        uint4 of_h[own_steps], of_dy[own_steps];
        uint4* shared = S::group > 1 ? exchange() + 2 * S::pairs * 32 : nullptr;
#pragma unroll
        for (int step = 0; step < own_steps; ++step) {
            const int e = 2 * step;
            const bool two = e + 1 < share;
            const auto operand = [&](const Eights<S>& a) {
                return both_parts(a[e][0], a[e][1], two ? a[e + two][0] : 0.f, two ? a[e + two][1] : 0.f);
            };
            of_h[step] = operand(h);
            of_dy[step] = operand(dy);
            if constexpr (S::group > 1) {
                const int at = this->first_eight() / 2 + step;
                shared[at * 32] = of_h[step];
                shared[(steps + at) * 32] = of_dy[step];
            }
        }
        if constexpr (S::group > 1) sync();
        Four zt[S::row_tiles], vt[S::row_tiles];
#pragma unroll
        for (int tile = 0; tile < S::row_tiles; ++tile) {
            transpose<S>(z, tile, zt[tile]);
            transpose<S>(v, tile, vt[tile]);
        }
#pragma unroll
        for (int step = 0; step < steps; ++step) {
            uint4 a_h, a_dy;
            if constexpr (S::group > 1) {
                a_h = shared[step * 32];
                a_dy = shared[(steps + step) * 32];
            } else {
                a_h = of_h[step];
                a_dy = of_dy[step];
            }
            unfold(*this, dz, a_dy, step, S::folded);
            unfold(*this, v2, a_h, step, S::folded2);
#pragma unroll
            for (int e = 2 * step; e < 2 * step + 2 && e < S::eights; ++e) {
                const uint32_t ht = transpose_matrix(e % 2 ? a_h.z : a_h.x), dyt = transpose_matrix(e % 2 ? a_dy.z : a_dy.x);
#pragma unroll
                for (int tile = 0; tile < S::row_tiles; ++tile) {
                    float fresh[4] = {}, fresh2[4] = {};
                    mma_16x8x8(fresh, {zt[tile][0], zt[tile][1]}, dyt);
                    mma_16x8x8(fresh2, {vt[tile][0], vt[tile][1]}, ht);
                    mma_16x8x8(fresh, {zt[tile][2], zt[tile][3]}, dyt);
                    mma_16x8x8(fresh2, {vt[tile][2], vt[tile][3]}, ht);
                    if constexpr (S::n == 4) {  // with what rounding took from dy and h: n = 4 sums fewer terms
                        mma_16x8x8(fresh, {zt[tile][0], zt[tile][1]}, transpose_matrix(e % 2 ? a_dy.w : a_dy.y));
                        mma_16x8x8(fresh2, {vt[tile][0], vt[tile][1]}, transpose_matrix(e % 2 ? a_h.w : a_h.y));
                    }
                    sums.add(S::at_folded + tile * S::eights + e, fresh);
                    sums.add(S::at_folded2 + tile * S::eights + e, fresh2);
                }
            }
        }
    }

    // The sums of the wide gradients, from x, dZ and g, V2, and of g itself; and dx, in the place of x. 16 columns u by
    // eight tokens of g are a left operand of its sums, and what the sums dx^T = s1^T dZ^T begin with.
    COMPACTER_DEVICE void wide_gradients(unsigned char* x, const unsigned char* g, const Operands<S>& dz,
                                         const uint32_t (&dzt)[own][2], const uint32_t (&v2t)[own][2], Sums<S>& sums) const {
        constexpr int per = S::n == 4 ? 1 : 4 / own;  // blocks of 16 columns in one accumulator of bias2
        constexpr int of_load = S::n == 4 ? 1 : 2;    // blocks of 16 columns in one load of s1
        constexpr int together = 3;                   // between two branches, or the compiler lacks registers
        const int transposed = this->transposed(lane_anew());
        const uint32_t low = b.residual_is_x ? 1u << 16 : 0u, high = b.residual_is_x ? 0xffff0000u : 0u;
        const unsigned char* factor = left_rows<S>();
        float left[4] = {}, right[4] = {}, of_g[4] = {};
#pragma unroll
        for (int begin = 0; begin < S::blocks * own; begin += together) {
            Four gt[together];
#pragma unroll
            for (int at = begin; at < begin + together && at < S::blocks * own; ++at) {
                const int block = at / own, s = at % own, column = lane_anew() / 4;
                const int offset = transposed + s * 4 * S::chunk + block * 32;
                const bool last = block == S::blocks - 1, here = S::n == 8 || (column < 4) == (block % 2 == 0);
                Four xt, &of_block = gt[at - begin];
                load_matrices_transposed(xt, x + offset);
                load_matrices_transposed(of_block, g + offset);
                mma_16x8x16(left, xt, {here ? dzt[s][0] : 0u, here ? dzt[s][1] : 0u});
                mma_16x8x16(right, of_block, v2t[s]);
                if (S::n == 8) {
                    const int c = block % per * 2 * own + s * 2;
                    mma_16x8x16(of_g, of_block, {column == c ? 0x3f803f80u : 0u, column == c + 1 ? 0x3f803f80u : 0u});  // ones
                }
                if (s < own - 1) continue;
                sums.add(S::at_right2 + block, right);
                set_to_zero(right);
                if (block % S::parts == S::parts - 1 || last) {
                    sums.add(block / S::parts, left);
                    set_to_zero(left);
                }
                if (S::n == 8 && (block % per == per - 1 || last)) {
                    sums.add(S::at_bias2 + block / per, of_g);
                    set_to_zero(of_g);
                }
            }
            __syncwarp();  // all lanes have read x
            if (!b.grad_x) continue;
            Four f;
#pragma unroll
            for (int at = begin; at < begin + together && at < S::blocks * own; ++at) {
                const int block = at / own, s = at % own, k = block % of_load * 2;
                if (at == begin || (s == 0 && k == 0)) load_matrices_transposed(f, factor + block / of_load * of_load * 32);
                const int next = S::n == 4 ? 2 : k;  // what rounding took from s1; for n = 8 s1 again, against that of dZ
                Four dx;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float sum[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const uint32_t pair = gt[at - begin][h * 2 + e / 2];
                        sum[e] = __uint_as_float(e % 2 ? pair & high : pair * low);
                    }
                    mma_16x8x8(sum, {f[k], f[k + 1]}, dz[s][h]);
                    mma_16x8x8(sum, {f[next], f[next + 1]}, dz[s][2 + h]);
                    dx[h * 2] = pack_bf16(sum[0], sum[1]);
                    dx[h * 2 + 1] = pack_bf16(sum[2], sum[3]);
                }
                store_matrices_transposed(x + transposed + s * 4 * S::chunk + block * 32, dx);
            }
        }
    }

    COMPACTER_DEVICE void tile(unsigned char* x, const unsigned char* g, Sums<S>& sums) const {
        Operands<S> operand, v;
        Chunks<S> dz = {}, v2 = {};
        {
            Eights<S> y, dh;
            project(*this, operand, v, x, g);
            to_bottleneck(operand, v, y, dh);
            activate_all(y, dh, sums);
            from_bottleneck(operand, v, y, dh, dz, v2, sums);
        }
        uint32_t dzt[own][2], v2t[own][2];  // right operands of the sums, rounded once: [pair][chunk]
        const int column = lane_anew() % 4 * 2;
        const bool upper = S::n == 4 && column >= 4;
#pragma unroll
        for (int s = 0; s < own; ++s)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t parts[2];
                split(whole<S>(dz[s][h][0] + dz[s][h][2]), whole<S>(dz[s][h][1] + dz[s][h][3]), parts);
                const uint32_t of_v2 = pack_bf16(whole<S>(v2[s][h][0] + v2[s][h][2]), whole<S>(v2[s][h][1] + v2[s][h][3]));
                const int q = this->pair(s) * 2 + h;
                const uint32_t one_of_q = (q == column - 4 ? 0x3f80u : 0u) | (q == column - 3 ? 0x3f800000u : 0u);
                operand[s][h] = upper ? parts[1] : parts[0];
                operand[s][2 + h] = S::n == 4 ? operand[s][h] : parts[1];
                dzt[s][h] = transpose_matrix(parts[0]);
                v2t[s][h] = transpose_matrix(upper ? one_of_q : of_v2);
            }
        wide_gradients(x, g, operand, dzt, v2t, sums);
    }

    // The block's row of partials, number row(). The sums of a group take the place of its tiles.
    template <class Row>
    COMPACTER_DEVICE void finish(const Sums<S>& sums, const Row& row) const {
        const int groups = threads_anew() / (32 * S::group);
        const Totals<S> totals{shared_memory() + S::ring(groups), groups, S::of_group(b.stages)};
        sync();
        store_row(sums, totals, b, this->group, b.partials + row() * b.row);
    }
};

}  // namespace compacter::cuda
