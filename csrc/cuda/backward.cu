// Backward of an adapter in bf16 whose sizes are known: every product is a matrix product, and all sums over tokens
// stay in registers.
//
//   Z = x s1    y = Z C1 + b1    h = act(y)               recomputed
//   dV2 = g t2^T    dh = dV2 C2    dy = dh act'(y)        C1, C2: folded.h
//   dZ = dy C1^T    dx = dZ s1^T (+ g)
//   V2 = h C2^T
//   ds1 = x^T dZ    dt2 = g^T V2    db1, db2 = sums of dy, g    dC1 = Z^T dy    dC2 = dV2^T h       sums.h
//
// A group of warps has eight tokens at a time. The 16 rows of a product with x or g are those tokens' chunks 2j and
// 2j+1. An accumulator has the layout of a left operand, so that it becomes one once it is rounded:
//
//      Z of a pair:   rows 0-7  chunk 2j,  i 0-7        left operand:  rows 0-7   rounded      k 0-7   chunk 2j
//                     rows 8-15 chunk 2j+1                             rows 8-15  its rest     k 8-15  chunk 2j+1
//
// Rows 8 to 15 of the next product thus carry what rounding took, and its result is the sum of both halves of the rows.
// Tensor cores truncate, so each tile has fresh accumulators, which are then added to the sums.
#include "activations.h"
#include "sums.h"

namespace compacter::cuda {
namespace {

using Four = uint32_t[4];

// An accumulator of a pair of chunks as left operand of the next product.
COMPACTER_DEVICE void to_operand(const float (&sum)[4], Four& a) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        a[2 * h] = pack_bf16(sum[2 * h], sum[2 * h + 1]);
        a[2 * h + 1] = rest_of_pair(sum[2 * h], sum[2 * h + 1], a[2 * h]);
    }
}

COMPACTER_DEVICE void add(float (&sum)[4], const float (&fresh)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += fresh[e];
}

template <class S>
struct Pass {
    static constexpr int own = S::own, share = S::share, eights = S::eights;
    const Backward& b;
    Lane lane;
    int groups = blockDim.x / 32 / S::group, warp = threadIdx.x / 32, group = warp / S::group, rank = warp % S::group;
    int first_column = rank * own * 2 * S::chunk * 2;  // of the warp's chunks, in bytes

    // Where this lane's row begins for ldmatrix and stmatrix: chunks 2j and 2j+1 in columns u to u + 7, then u + 8 to 15.
    int in_tile = lane.index % 8 * S::row + lane.index / 8 % 2 * S::chunk * 2 + lane.index / 16 * 16 + first_column;
    int i = lane.index % (S::n == 4 ? 4 : 8);
    int in_fold = (lane.index / 8 * S::n + i) * S::folded_row;
    int in_unfold = (lane.index / 16 * S::n + i) * S::folded_row + lane.index / 8 % 2 * 16;

    COMPACTER_DEVICE explicit Pass(const Backward& b) : b(b) {}

    COMPACTER_DEVICE unsigned char* tile_at(int stage) const {
        return shared_memory() + S::ring(groups) + group * S::of_group(b.stages) + stage * S::tile;
    }
    COMPACTER_DEVICE void sync() const {
        if constexpr (S::group == 1) __syncwarp();
        else sync_warps(1 + group, 32 * S::group);
    }

    // body(offset in the tile, offset in the rows of the tensor, row) for the vectors of this lane.
    template <class Body>
    COMPACTER_DEVICE void for_each_vector(const Body& body) const {
        constexpr int per_row = own * 2 * S::chunk / 8, all = S::tokens * per_row;
#pragma unroll
        for (int first = 0; first < all; first += 32) {
            const int e = first + lane.index, row = e / per_row, column = first_column + e % per_row * 16;
            if (all % 32 == 0 || e < all) body(row * S::row + column, row * S::width * 2 + column, row);
        }
    }

    COMPACTER_DEVICE int valid(int64_t tile) const {
        const int64_t remaining = b.tokens - tile * S::tokens;
        return remaining < S::tokens ? static_cast<int>(remaining) : S::tokens;
    }

    COMPACTER_DEVICE void load(int64_t tile, int stage) const {
        unsigned char* to = tile_at(stage);
        const int rows = valid(tile);
        for (int of_g = 0; of_g < 2; ++of_g) {
            const auto* from = static_cast<const unsigned char*>(of_g ? b.grad_out : b.x) + tile * S::tokens * S::width * 2;
            for_each_vector([&](int at, int offset, int row) {
                copy_async(to + of_g * S::tokens * S::row + at, from + (row < rows ? offset : 0), row < rows);
            });
        }
    }

    COMPACTER_DEVICE void store(const unsigned char* rows, int64_t tile) const {
        auto* to = static_cast<unsigned char*>(b.grad_x) + tile * S::tokens * S::width * 2;
        const int count = valid(tile);
        for_each_vector([&](int at, int offset, int row) {
            if (row < count)
                store_streaming(reinterpret_cast<uint4*>(to + offset), *reinterpret_cast<const uint4*>(rows + at));
        });
    }

    // Z = x s1 of the warp's pairs, or dV2 = g t2^T. n = 4: columns 0-3 have the rounded factor, 4-7 its rest.
    COMPACTER_DEVICE void project(float (&z)[own][4], const unsigned char* rows, int factor) const {
        const int lane_row = S::n == 4 ? lane.index % 8 : lane.index % 8 + lane.index / 16 * 8;
        const int column = S::n == 4 ? lane.index / 8 * 16 : lane.index / 8 % 2 * 16;
        const unsigned char* right = shared_memory() + factor + lane_row * S::factor_row + column;
        constexpr int step = S::n == 4 ? 2 : 1;
        float part[own][2][4] = {};
#pragma unroll 2
        for (int block = 0; block < S::blocks; block += step) {
            Four f, x;
            load_matrices(f, right + block * 32);
#pragma unroll
            for (int j = 0; j < step; ++j) {
                if (block + j >= S::blocks) break;
#pragma unroll
                for (int s = 0; s < own; ++s) {
                    load_matrices(x, rows + in_tile + s * 4 * S::chunk + (block + j) * 32);
                    mma_16x8x16(part[s][j], x, {f[2 * j], f[2 * j + 1]});
                    if (step == 1) mma_16x8x16(part[s][1], x, {f[2], f[3]});
                }
            }
        }
#pragma unroll
        for (int s = 0; s < own; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) z[s][e] = part[s][0][e] + part[s][1][e];
    }

    // y += Z C of the warp's eights of the bottleneck, over all pairs of chunks.
    template <class Operand>
    COMPACTER_DEVICE void fold(float (&y)[share][4], const Operand& z, int folded) const {
        const unsigned char* right = shared_memory() + folded + in_fold + rank * share * 16;
#pragma unroll
        for (int j = 0; j < S::pairs; j += 2) {
            Four first, second;
            z(j, first);
            z(j + 1, second);
#pragma unroll
            for (int e = 0; e < share; ++e) {
                Four f;
                load_matrices_transposed(f, right + j * 2 * S::n * S::folded_row + e * 16);
                mma_16x8x16(y[e], first, {f[0], f[1]});
                mma_16x8x16(y[e], second, {f[2], f[3]});
            }
        }
    }

    // dZ += dy C^T of the warp's chunks, for 16 numbers of the bottleneck.
    COMPACTER_DEVICE void unfold(float (&dz)[own][2][4], const Four& dy, int step, int folded) const {
        const unsigned char* right = shared_memory() + folded + in_unfold + rank * own * 2 * S::n * S::folded_row;
#pragma unroll
        for (int s = 0; s < own; ++s) {
            Four f;
            load_matrices(f, right + s * 2 * S::n * S::folded_row + step * 32);
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (step * 2 + 1 < eights)
                    mma_16x8x16(dz[s][h], dy, {f[2 * h], f[2 * h + 1]});
                else
                    mma_16x8x8(dz[s][h], {dy[0], dy[1]}, f[2 * h]);
        }
    }

    // h and dy as rounded pairs and their rests, in place of y and dh.
    COMPACTER_DEVICE void activate_all(float (&y)[share][4], float (&dh)[share][4], Sums<S>& sums) const {
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
        for (int e = 0; e < share; ++e) {
            sums.bias[e][0] += dh[e][0];
            sums.bias[e][1] += dh[e][1];
        }
    }

    COMPACTER_DEVICE void tile(const unsigned char* x, const unsigned char* g, Sums<S>& sums) const {
        Four z[own], v[own];
        float y[share][4], dh[share][4] = {};
        const float* bias = floats_at(S::bias) + rank * share * 8 + lane.t * 2;
#pragma unroll
        for (int e = 0; e < share; ++e) {
            y[e][0] = bias[e * 8];
            y[e][1] = bias[e * 8 + 1];
            y[e][2] = y[e][3] = 0.f;
        }
        unsigned char* exchange = shared_memory() + S::exchange + group * S::exchange_bytes + lane.index * 16;
        const auto put = [&](int at, const Four& a) { *reinterpret_cast<uint4*>(exchange + at * 512) = make_uint4(a[0], a[1], a[2], a[3]); };
        const auto get = [&](int at, Four& a) {
            const uint4 from = *reinterpret_cast<const uint4*>(exchange + at * 512);
            a[0] = from.x; a[1] = from.y; a[2] = from.z; a[3] = from.w;
        };
        {
            float sum[own][4];
            project(sum, x, S::left);
#pragma unroll
            for (int s = 0; s < own; ++s) to_operand(sum[s], z[s]);
            project(sum, g, S::right2);
#pragma unroll
            for (int s = 0; s < own; ++s) to_operand(sum[s], v[s]);
        }
        if constexpr (S::group > 1) {
#pragma unroll
            for (int s = 0; s < own; ++s) {
                put(rank * own + s, z[s]);
                put(S::pairs + rank * own + s, v[s]);
            }
            sync();
            fold(y, [&](int j, Four& a) { get(j, a); }, S::folded);
            fold(dh, [&](int j, Four& a) { get(S::pairs + j, a); }, S::folded2);
        } else {
            const auto from = [](const Four (&of)[own]) {
                return [&of](int j, Four& a) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) a[e] = of[j][e];
                };
            };
            fold(y, from(z), S::folded);
            fold(dh, from(v), S::folded2);
        }
        activate_all(y, dh, sums);

        // h and dy of an eight of the bottleneck: a rounded pair and its rest.
        uint32_t h[S::group == 1 ? 2 * S::steps : share][2] = {}, dy[S::group == 1 ? 2 * S::steps : share][2] = {};
#pragma unroll
        for (int e = 0; e < share; ++e) {
            h[e][0] = pack_bf16(y[e][0], y[e][1]);
            h[e][1] = rest_of_pair(y[e][0], y[e][1], h[e][0]);
            dy[e][0] = pack_bf16(dh[e][0], dh[e][1]);
            dy[e][1] = rest_of_pair(dh[e][0], dh[e][1], dy[e][0]);
        }
        unsigned char* steps = exchange + 2 * S::pairs * 512;
        if constexpr (S::group > 1) {
#pragma unroll
            for (int e = 0; e < share; ++e) {
                const int at = rank * share + e, offset = at / 2 * 512 + at % 2 * 8;
                *reinterpret_cast<uint2*>(steps + offset) = make_uint2(h[e][0], h[e][1]);
                *reinterpret_cast<uint2*>(steps + S::steps * 512 + offset) = make_uint2(dy[e][0], dy[e][1]);
            }
            sync();
        }
        Four zt[own], vt[own];
#pragma unroll
        for (int s = 0; s < own; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) {  // rows 0-7: chunk 2j, rows 8-15: chunk 2j+1; k 0-7 rounded, k 8-15 the rest
                zt[s][e % 2 * 2 + e / 2] = transpose_matrix(z[s][e]);
                vt[s][e % 2 * 2 + e / 2] = transpose_matrix(v[s][e]);
            }
        float dz[own][2][4] = {}, v2[own][2][4] = {};
#pragma unroll
        for (int step = 0; step < S::steps; ++step) {
            Four of_h, of_dy;
            if constexpr (S::group > 1) {
                get(2 * S::pairs + step, of_h);
                get(2 * S::pairs + S::steps + step, of_dy);
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    of_h[e] = h[step * 2 + e / 2][e % 2];
                    of_dy[e] = dy[step * 2 + e / 2][e % 2];
                }
            }
            unfold(dz, of_dy, step, S::folded);
            unfold(v2, of_h, step, S::folded2);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (step * 2 + e >= eights) break;
                const uint32_t ht = transpose_matrix(of_h[e * 2]), dyt = transpose_matrix(of_dy[e * 2]);
#pragma unroll
                for (int s = 0; s < own; ++s) {
                    float fresh[4] = {}, fresh2[4] = {};
                    mma_16x8x16(fresh, zt[s], {dyt, dyt});
                    mma_16x8x16(fresh2, vt[s], {ht, ht});
                    add(sums.folded[s][step * 2 + e], fresh);
                    add(sums.folded2[s][step * 2 + e], fresh2);
                }
            }
        }
        wide(x, g, dz, v2, sums);
    }

    // dx, and the sums of the wide gradients.
    COMPACTER_DEVICE void wide(const unsigned char* x, const unsigned char* g, const float (&dz)[own][2][4],
                               const float (&v2)[own][2][4], Sums<S>& sums) const {
        Four operand[own];                        // dZ as left operand: k 0-7 rounded, k 8-15 the rest
        uint32_t dzt[own][2][2], v2t[own][2][2];  // transposed: [rounded, rest][chunk]
        const bool upper = S::n == 4 && lane.t >= 2;
#pragma unroll
        for (int s = 0; s < own; ++s)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float z0 = dz[s][h][0] + dz[s][h][2], z1 = dz[s][h][1] + dz[s][h][3];
                const float u0 = v2[s][h][0] + v2[s][h][2], u1 = v2[s][h][1] + v2[s][h][3];
                const uint32_t z = pack_bf16(z0, z1), z_rest = rest_of_pair(z0, z1, z);
                const uint32_t v = pack_bf16(u0, u1), v_rest = rest_of_pair(u0, u1, v);
                if (S::n == 4) {
                    const int q = (rank * own + s) * 2 + h, c = lane.t * 2 - 4;
                    const uint32_t one_of_q = (q == c ? 0x3f80u : 0u) | (q == c + 1 ? 0x3f800000u : 0u);
                    operand[s][h] = operand[s][2 + h] = upper ? z_rest : z;
                    dzt[s][0][h] = transpose_matrix(operand[s][h]);
                    v2t[s][0][h] = transpose_matrix(upper ? one_of_q : v);
                    v2t[s][1][h] = transpose_matrix(upper ? 0u : v_rest);
                } else {
                    operand[s][h] = z;
                    operand[s][2 + h] = z_rest;
                    dzt[s][0][h] = transpose_matrix(z);
                    dzt[s][1][h] = transpose_matrix(z_rest);
                    v2t[s][0][h] = transpose_matrix(v);
                    v2t[s][1][h] = transpose_matrix(v_rest);
                }
            }
        const uint32_t one = !b.residual_is_x ? 0u : lane.g == lane.t * 2 ? 0x3f80u : lane.g == lane.t * 2 + 1 ? 0x3f800000u : 0u;
        const int factor_lane = S::n == 4 ? (lane.index % 4 + lane.index / 8 % 2 * 4) * S::factor_row + lane.index / 16 * 16
                                          : lane.index % 8 * S::factor_row + lane.index / 8 % 2 * 16;
        const unsigned char* factor = shared_memory() + S::left + factor_lane;
        constexpr int per = S::n == 4 ? 1 : 4 / own;  // blocks of 16 columns in one accumulator of bias2
        float fresh_bias[4] = {};
#pragma unroll
        for (int block = 0; block < S::blocks; ++block) {
            Four f;
            load_matrices_transposed(f, factor + block * 32);
            float left[4] = {}, right[4] = {};
#pragma unroll
            for (int s = 0; s < own; ++s) {
                const int at = in_tile + s * 4 * S::chunk + block * 32;
                Four xt, gt, residual;
                load_matrices_transposed(xt, x + at);
                load_matrices_transposed(gt, g + at);
                load_matrices(residual, g + at);
                float out[2][4] = {};
                const Four x_left = {xt[0], xt[2], xt[1], xt[3]}, g_left = {gt[0], gt[2], gt[1], gt[3]};
                mma_16x8x8(out[0], {residual[0], residual[1]}, one);
                mma_16x8x8(out[1], {residual[2], residual[3]}, one);
                mma_16x8x16(left, x_left, dzt[s][0]);
                mma_16x8x16(right, g_left, v2t[s][0]);
                mma_16x8x16(right, g_left, v2t[s][1]);
                if (S::n == 4) {
                    mma_16x8x16(out[0], operand[s], {f[0], f[1]});
                    mma_16x8x16(out[1], operand[s], {f[2], f[3]});
                } else {
                    mma_16x8x16(left, x_left, dzt[s][1]);
                    const int c = block % per * 2 * own + s * 2;
                    mma_16x8x16(fresh_bias, g_left, {lane.g == c ? 0x3f803f80u : 0u, lane.g == c + 1 ? 0x3f803f80u : 0u});
                    mma_16x8x16(out[0], operand[s], {f[0], f[0]});
                    mma_16x8x16(out[1], operand[s], {f[1], f[1]});
                }
                store_matrices(const_cast<unsigned char*>(x) + at,
                               {pack_bf16(out[0][0], out[0][1]), pack_bf16(out[0][2], out[0][3]), pack_bf16(out[1][0], out[1][1]),
                                pack_bf16(out[1][2], out[1][3])});
            }
            add(sums.left[block], left);
            add(sums.right2[block], right);
            if (S::n == 8 && (block % per == per - 1 || block == S::blocks - 1)) {
                add(sums.bias2[S::n == 8 ? block / per : 0], fresh_bias);
#pragma unroll
                for (int e = 0; e < 4; ++e) fresh_bias[e] = 0.f;
            }
        }
    }

    // The warps add their sums one after another, in this order, and all write the block's row of partials.
    COMPACTER_DEVICE void finish(const Sums<S>& sums) const {
        sync();
        auto* first = reinterpret_cast<float4*>(shared_memory() + S::ring(groups));
        if (warp > 0) sync_warps(8 + warp, 64);
        sums.add_to(first + lane.index, rank, warp == 0, group == 0);
        if (warp + 1 < groups * S::group) sync_warps(9 + warp, 64);
        __syncthreads();
        const Totals<S> totals{first};
        float* row = b.partials + blockIdx.x * b.row;
        const int warps = blockDim.x / 32, thread = threadIdx.x, threads = blockDim.x;
        store_wide(totals, b, row, warp, warps);
        if (S::n == 8) store_bias2(totals, row + b.bias2, b.factors.scale, warp, warps);
        store_folded<S, false>(totals, row + b.rule, row + b.right, S::rule, S::right, thread, threads);
        store_folded<S, true>(totals, row + b.rule2, row + b.left2, S::rule2, S::left2, thread, threads);
        for (int c = thread; c < S::d; c += threads) row[b.bias + c] = totals.bias(c);
    }
};

template <class S>
__global__ void __launch_bounds__(256, 1) backward(const Backward b) {
    const Pass<S> pass(b);
    const int64_t tiles = (b.tokens + S::tokens - 1) / S::tokens, step = static_cast<int64_t>(gridDim.x) * pass.groups;
    int64_t tile = blockIdx.x + static_cast<int64_t>(gridDim.x) * pass.group;
    for (int stage = 0; stage < b.stages; ++stage) {
        if (tile + stage * step < tiles) pass.load(tile + stage * step, stage);
        commit_copies();
    }
    prepare<S>(b.factors);
    Sums<S> sums = {};
    int stage = 0;
    for (; tile < tiles; tile += step) {
        if (b.stages == 2) wait_copies<1>();
        else wait_copies<0>();
        __syncwarp();
        unsigned char* x = pass.tile_at(stage);
        pass.tile(x, x + S::tokens * S::row, sums);
        __syncwarp();
        if (b.grad_x) pass.store(x, tile);
        __syncwarp();
        if (tile + b.stages * step < tiles) pass.load(tile + b.stages * step, stage);
        commit_copies();
        stage = stage + 1 == b.stages ? 0 : stage + 1;
    }
    let_next_kernel_start();
    pass.finish(sums);
}

}  // namespace

void folded_backward_kernel(const Backward& b, const Launch& l) {
    with_shape(b.sizes, [&](auto shape) { launch(backward<decltype(shape)>, l, b); });
}

}  // namespace compacter::cuda
