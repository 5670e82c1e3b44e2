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
#include "ring.h"
#include "sums.h"

namespace compacter::cuda {
namespace {

using Four = uint32_t[4];

COMPACTER_DEVICE void clear(float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = 0.f;
}

template <class S>
struct Pass {
    static constexpr int own = S::own, share = S::share, eights = S::eights;
    const Backward& b;
    Group group{S::group, 0};

    COMPACTER_DEVICE int first_column() const { return group.rank * own * 2 * S::chunk * 2; }  // of the warp's chunks, in bytes

    // Where a lane points for ldmatrix and stmatrix: in a tile, in C1 as it is, and in C1 transposed.
    COMPACTER_DEVICE int in_tile(int lane) const { return block_offset(lane, S::row, S::chunk * 2) + first_column(); }
    COMPACTER_DEVICE int row_i(int lane) const {  // of one i; n = 4: rounded, then what rounding took
        return S::n == 4 ? lane % 4 * S::folded_row + lane % 8 / 4 * S::folded_part : lane % 8 * S::folded_row;
    }
    COMPACTER_DEVICE int in_fold(int lane) const {
        return lane / 8 * S::n * S::folded_row + row_i(lane) + group.rank * share * 16;
    }
    COMPACTER_DEVICE int in_unfold(int lane) const {
        return (group.rank * own * 2 + lane / 16) * S::n * S::folded_row + row_i(lane) + lane / 8 % 2 * 16;
    }

    COMPACTER_DEVICE explicit Pass(const Backward& b) : b(b) {}

    COMPACTER_DEVICE unsigned char* tile_at(int stage) const {
        return shared_memory() + S::ring(group.count) + group.index * S::of_group(b.stages) + stage * S::tile;
    }
    COMPACTER_DEVICE void sync() const {
        if constexpr (S::group == 1) __syncwarp();
        else group.sync();
    }

    // body(token, bytes from its start) for the vectors of this lane in the warp's chunks.
    template <class Body>
    COMPACTER_DEVICE void for_each_vector(const Body& body) const {
        constexpr int vectors = own * 2 * S::chunk / 8;
        const int lane = lane_anew();
#pragma unroll
        for (int token = 0; token < S::tokens; ++token)
#pragma unroll
            for (int first = 0; first < vectors; first += 32)
                if (first + 32 <= vectors || first + lane < vectors) body(token, first_column() + (first + lane) * 16);
    }

    COMPACTER_DEVICE int valid(int tile) const {
        const int64_t remaining = b.tokens - int64_t{tile} * S::tokens;
        return remaining < S::tokens ? static_cast<int>(remaining) : S::tokens;
    }

    COMPACTER_DEVICE void load(int tile, int stage) const {
        const int64_t first = int64_t{tile} * S::tokens * S::width * 2;
        const auto *x = static_cast<const unsigned char*>(b.x) + first, *g = static_cast<const unsigned char*>(b.grad_out) + first;
        unsigned char* to = tile_at(stage);
        const int count = valid(tile);
        const auto copy = [&](auto all) {  // all: no token is missing
            for_each_vector([&](int token, int at) {
                const bool real = decltype(all)::value || token < count;
                const int from = (real ? token * S::width * 2 : 0) + at;
                copy_async(to + token * S::row + at, x + from, real);
                copy_async(to + (S::tokens + token) * S::row + at, g + from, real);
            });
        };
        if (count == S::tokens) copy(std::true_type{});
        else copy(std::false_type{});
    }

    COMPACTER_DEVICE void store(const unsigned char* rows, int tile) const {
        auto* to = static_cast<unsigned char*>(b.grad_x) + int64_t{tile} * S::tokens * S::width * 2;
        const int count = valid(tile);
        for_each_vector([&](int token, int at) {
            if (token < count)
                store_streaming(reinterpret_cast<uint4*>(to + token * S::width * 2 + at),
                                *reinterpret_cast<const uint4*>(rows + token * S::row + at));
        });
    }

    // For n = 4, columns c and c + 4 of a product have the two parts of a number. Their sum is in both columns.
    COMPACTER_DEVICE static float whole(float part) {
        return S::n == 4 ? part + __shfl_xor_sync(0xffffffff, part, 2) : part;
    }

    // Z = x s1 and dV2 = g t2^T of the warp's pairs, as left operands.
    COMPACTER_DEVICE void project(Four (&z)[own], Four (&v)[own], const unsigned char* x, const unsigned char* g) const {
        const int lane = lane_anew(), in_tile = this->in_tile(lane);
        const int lane_row = S::n == 4 ? lane % 8 : lane % 8 + lane / 16 * 8, column = S::n == 4 ? lane / 8 * 16 : lane / 8 % 2 * 16;
        const unsigned char* right = shared_memory() + lane_row * S::factor_row + column;
        constexpr int step = S::n == 4 ? 2 : 1;
        float sum[2][own][2][4] = {};
#pragma unroll 4
        for (int block = 0; block < S::blocks; block += step)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                Four f, a;
                load_matrices(f, right + (side ? S::right2 : S::left) + block * 32);
#pragma unroll
                for (int j = 0; j < step; ++j) {
                    if (block + j >= S::blocks) break;
#pragma unroll
                    for (int s = 0; s < own; ++s) {
                        load_matrices(a, (side ? g : x) + in_tile + s * 4 * S::chunk + (block + j) * 32);
                        mma_16x8x16(sum[side][s][j], a, {f[2 * j], f[2 * j + 1]});
                        if (step == 1) mma_16x8x16(sum[side][s][1], a, {f[2], f[3]});
                    }
                }
            }
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int s = 0; s < own; ++s) {
                float d[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) d[e] = whole(sum[side][s][0][e] + sum[side][s][1][e]);
                const uint4 parts = both_parts(d[0], d[1], d[2], d[3]);
                Four& to = side ? v[s] : z[s];
                to[0] = parts.x;
                to[1] = parts.y;
                to[2] = parts.z;
                to[3] = parts.w;
            }
    }

    // Z = x s1 of the warp's pairs, or dV2 = g t2^T.
    COMPACTER_DEVICE void project(float (&z)[own][4], const unsigned char* rows, int factor) const {
        const int lane = lane_anew(), in_tile = this->in_tile(lane);
        const int lane_row = S::n == 4 ? lane % 8 : lane % 8 + lane / 16 * 8, column = S::n == 4 ? lane / 8 * 16 : lane / 8 % 2 * 16;
        const unsigned char* right = shared_memory() + factor + lane_row * S::factor_row + column;
        constexpr int step = S::n == 4 ? 2 : 1;
        float part[own][2][4] = {};
#pragma unroll 4
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
        const unsigned char* right = shared_memory() + folded + in_fold(lane_anew());
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
        const unsigned char* right = shared_memory() + folded + in_unfold(lane_anew());
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
            sums.at[S::at_bias + e][0] += dh[e][0];
            sums.at[S::at_bias + e][1] += dh[e][1];
        }
    }

    COMPACTER_DEVICE void tile(const unsigned char* x, const unsigned char* g, Sums<S>& sums) const {
        const PairLane lane{lane_anew()};
        Four z[own], v[own];
        float y[share][4], dh[share][4] = {};
        const float* bias = RawFactors(floats_at(S::raw), known<S>(b.pair)).bias + group.rank * share * 8 + lane.t * 2;
#pragma unroll
        for (int e = 0; e < share; ++e) {
            y[e][0] = bias[e * 8];
            y[e][1] = bias[e * 8 + 1];
            y[e][2] = y[e][3] = 0.f;
        }
        unsigned char* exchange = shared_memory() + S::exchange + group.index * S::exchange_bytes + lane.index * 16;
        const auto put = [&](int at, const Four& a) { *reinterpret_cast<uint4*>(exchange + at * 512) = make_uint4(a[0], a[1], a[2], a[3]); };
        const auto get = [&](int at, Four& a) {
            const uint4 from = *reinterpret_cast<const uint4*>(exchange + at * 512);
            a[0] = from.x; a[1] = from.y; a[2] = from.z; a[3] = from.w;
        };
        project(z, v, x, g);
        if constexpr (S::group > 1) {
#pragma unroll
            for (int s = 0; s < own; ++s) {
                put(group.rank * own + s, z[s]);
                put(S::pairs + group.rank * own + s, v[s]);
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
            split(y[e][0], y[e][1], h[e]);
            split(dh[e][0], dh[e][1], dy[e]);
        }
        unsigned char* steps = exchange + 2 * S::pairs * 512;
        if constexpr (S::group > 1) {
#pragma unroll
            for (int e = 0; e < share; ++e) {
                const int at = group.rank * share + e, offset = at / 2 * 512 + at % 2 * 8;
                *reinterpret_cast<uint2*>(steps + offset) = make_uint2(h[e][0], h[e][1]);
                *reinterpret_cast<uint2*>(steps + S::steps * 512 + offset) = make_uint2(dy[e][0], dy[e][1]);
            }
            sync();
        }
        Four zt[S::row_tiles], vt[S::row_tiles];
#pragma unroll
        for (int tile = 0; tile < S::row_tiles; ++tile) {
            transpose(z, tile, zt[tile]);
            transpose(v, tile, vt[tile]);
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
                for (int tile = 0; tile < S::row_tiles; ++tile) {
                    float fresh[4] = {}, fresh2[4] = {};
                    mma_16x8x16(fresh, zt[tile], {dyt, dyt});
                    mma_16x8x16(fresh2, vt[tile], {ht, ht});
                    sums.add(S::at_folded + tile * eights + step * 2 + e, fresh);
                    sums.add(S::at_folded2 + tile * eights + step * 2 + e, fresh2);
                }
            }
        }
        wide(x, g, dz, v2, sums);
    }

    // Z as left operand transposed: 16 rows (p,i), k 0-7 rounded, k 8-15 the rest.
    COMPACTER_DEVICE void transpose(const Four (&z)[own], int tile, Four& a) const {
        const bool upper = lane_anew() % 4 >= 2;
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if constexpr (S::n == 4) {
                    const Four& pair = z[tile * 2 + half];  // four columns of each of its chunks
                    a[part * 2 + half] = transpose_matrix(upper ? pair[2 + part] : pair[part]);
                } else {
                    a[part * 2 + half] = transpose_matrix(z[tile][half * 2 + part]);
                }
    }

    // dx, and the sums of the wide gradients.
    COMPACTER_DEVICE void wide(const unsigned char* x, const unsigned char* g, const float (&dz)[own][2][4],
                               const float (&v2)[own][2][4], Sums<S>& sums) const {
        const PairLane lane{lane_anew()};
        const int in_tile = this->in_tile(lane.index);
        Four operand[own];                        // dZ as left operand, against the parts of s1
        uint32_t dzt[own][2][2], v2t[own][2];     // transposed, as right operands: dZ [rounded, rest][chunk], V2 [chunk]
        const bool upper = S::n == 4 && lane.t >= 2;
#pragma unroll
        for (int s = 0; s < own; ++s)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t z[2];
                split(whole(dz[s][h][0] + dz[s][h][2]), whole(dz[s][h][1] + dz[s][h][3]), z);
                const uint32_t v = pack_bf16(whole(v2[s][h][0] + v2[s][h][2]), whole(v2[s][h][1] + v2[s][h][3]));
                const int q = (group.rank * own + s) * 2 + h, c = lane.t * 2 - 4;
                const uint32_t one_of_q = (q == c ? 0x3f80u : 0u) | (q == c + 1 ? 0x3f800000u : 0u);
                operand[s][h] = upper ? z[1] : z[0];
                operand[s][2 + h] = S::n == 4 ? operand[s][h] : z[1];
                v2t[s][h] = transpose_matrix(upper ? one_of_q : v);
#pragma unroll
                for (int part = 0; part < 2; ++part) dzt[s][part][h] = transpose_matrix(z[part]);
            }
        const uint32_t one = !b.residual_is_x ? 0u : lane.g == lane.t * 2 ? 0x3f80u : lane.g == lane.t * 2 + 1 ? 0x3f800000u : 0u;
        const int factor_lane = S::n == 4 ? (lane.index % 4 + lane.index / 8 % 2 * 4) * S::factor_row + lane.index / 16 * 16
                                          : lane.index % 8 * S::factor_row + lane.index / 16 * 16;
        const unsigned char* factor = shared_memory() + S::left + factor_lane;
        constexpr int per = S::n == 4 ? 1 : 4 / own;  // blocks of 16 columns in one accumulator of bias2
        // Transposed, as left operands: columns u to u + 7, then u + 8 to 15, of chunk 2j, then of chunk 2j + 1.
        const int transposed = lane.index % 8 * S::row + lane.index / 16 * S::chunk * 2 + lane.index / 8 % 2 * 16 + first_column();
        const auto offset = [&](int at) { return at % own * 4 * S::chunk + at / own * 32; };
        float left[4] = {}, right[4] = {}, fresh_bias[4] = {};
#pragma unroll
        for (int at = 0; at < S::blocks * own; ++at) {
            const int block = at / own, s = at % own;
            Four xt, gt;
            load_matrices_transposed(xt, x + transposed + offset(at));
            load_matrices_transposed(gt, g + transposed + offset(at));
            const int g_lane = lane_anew() / 4;
            const bool mine = S::n == 8 || (g_lane < 4) == (block % 2 == 0);  // two blocks are side by side for n = 4
#pragma unroll
            for (int part = 0; part < 2; ++part)
                mma_16x8x16(left, xt, {mine ? dzt[s][part][0] : 0u, mine ? dzt[s][part][1] : 0u});
            mma_16x8x16(right, gt, v2t[s]);
            if (S::n == 8) {
                const int c = block % per * 2 * own + s * 2;
                mma_16x8x16(fresh_bias, gt, {g_lane == c ? 0x3f803f80u : 0u, g_lane == c + 1 ? 0x3f803f80u : 0u});
            }
            if (s < own - 1) continue;
            const bool last = block == S::blocks - 1;
            if (block % S::parts == S::parts - 1 || last) {
                sums.add(block / S::parts, left);
                clear(left);
            }
            sums.add(S::at_right2 + block, right);
            clear(right);
            if (S::n == 8 && (block % per == per - 1 || last)) {
                sums.add(S::at_bias2 + block / per, fresh_bias);
                clear(fresh_bias);
            }
        }
        __syncwarp();  // all lanes have read x, before dx takes its place
#pragma unroll 4
        for (int block = 0; block < S::blocks; ++block) {
            Four f;
            load_matrices_transposed(f, factor + block * 32);
#pragma unroll
            for (int s = 0; s < own; ++s) {
                Four residual;
                const int at = in_tile + s * 4 * S::chunk + block * 32;
                load_matrices(residual, g + at);
                float out[2][4] = {};
                mma_16x8x8(out[0], {residual[0], residual[1]}, one);
                mma_16x8x8(out[1], {residual[2], residual[3]}, one);
                mma_16x8x16(out[0], operand[s], {f[0], f[1]});
                mma_16x8x16(out[1], operand[s], {f[2], f[3]});
                store_matrices(const_cast<unsigned char*>(x) + at,
                               {pack_bf16(out[0][0], out[0][1]), pack_bf16(out[0][2], out[0][3]), pack_bf16(out[1][0], out[1][1]),
                                pack_bf16(out[1][2], out[1][3])});
            }
        }
    }

    // Lets the groups do something one after another: a warp waits for that of its rank in the group before.
    template <class Body>
    COMPACTER_DEVICE void in_turn(int at_once, const Body& body) const {
        const int warp = threadIdx.x / 32;
        constexpr int names = 8;  // from this one on, two warps each
        if (group.index >= at_once) sync_threads(names + warp - at_once * S::group, 64);
        body();
        if (group.index + at_once < group.count) sync_threads(names + warp, 64);
    }

    // The sums of the block, in the place of the first group's tiles, and from them its row of partials.
    COMPACTER_DEVICE void finish(const Sums<S>& sums) const {
        auto* first = reinterpret_cast<float4*>(shared_memory() + S::ring(group.count));
        sync();
        in_turn(1, [&] { sums.add_to(first + group.rank * S::places * 32 + threadIdx.x % 32, group.index == 0); });
        __syncthreads();
        store_row(Totals<S>{first}, b, b.partials + blockIdx.x * b.row);
    }
};

template <class S>
__global__ void __launch_bounds__(256, 1) backward(const Backward b) {
    const Pass<S> pass(b);
    const int tiles = static_cast<int>((b.tokens + S::tokens - 1) / S::tokens), step = gridDim.x * pass.group.count;
    int tile = blockIdx.x + gridDim.x * pass.group.index;
    const auto load_first = [&] {
        for (int stage = 0; stage < b.stages; ++stage) {
            if (tile + stage * step < tiles) pass.load(tile + stage * step, stage);
            commit_copies();
        }
    };
    if (S::group > 1) load_first();
    else pass.in_turn(2, load_first);  // so that the tile of the first warp is there first
    prepare<S>(b.factors, b.pair);
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
