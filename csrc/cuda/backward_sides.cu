// Backward of an adapter with n = 12 in bf16 whose sizes are known. All products are matrix products, and all sums over
// tokens stay in registers, as in backward.cu. But there are too many sums for that division of the work: dC1 and dC2
// have 144 rows (p,i) each. So the two sides of the backward, which have the same form, are done by different warps:
//
//               side of x             side of g
//     in        x                     g
//     Z         Z   = x s1            dV2 = g t2^T           project
//     parts     y   = Z C1 + b1       dh  = dV2 C2           fold, one part for each pair of chunks
//     middle    dy  = dh act'(y)      h   = act(y)           meet, where both sides and all pairs meet
//     U         dZ  = dy C1^T         V2  = h C2^T           unfold
//     sums      ds1 = x^T dZ          dt2 = g^T V2           wide_gradients
//               dC1 = Z^T dy          dC2 = dV2^T h          folded_gradients
//               db1 = sum of dy       db2 = sum of g
//     out       dx = dZ s1^T (+ g)                           expand
//
// C1 and C2 are those of matrices.h. A warp has one side of one pair of chunks. It needs no other part of C than the
// 24 rows of its chunks, which stay in registers. The rows of all products are the 16 tokens of a tile, except for sums
// over tokens, which have the tokens along k.
//
// The twelve i of a chunk are one and a half eights. A pair has three eights: i < 8 of its first chunk, i < 8 of its
// second chunk, and i >= 8 of both. Tensor cores truncate, so each tile has fresh accumulators, which are then added to
// the sums.
#include "activations.h"
#include "matrices.h"
#include "sides.h"
#include "sums_of_sides.h"

namespace compacter::cuda {
namespace {

// The rows of C of a warp's pair as right operands: an eight of rows by eight columns c.
template <class S>
using Folded = uint32_t[3][S::eights];

// 16 tokens by the 24 numbers of a pair as left operands: i < 8 of both chunks, rounded; what rounding took; and i >= 8
// of both chunks, rounded and what rounding took. Of two neighbouring words, the first is row g and the second row g + 8.
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

template <class S>
struct Pass : SidePart<S> {
    using Part = SidePart<S>;
    using Part::b, Part::warp, Part::side, Part::pair, Part::rows_at, Part::columns_at;

    COMPACTER_DEVICE explicit Pass(const Backward& b) : Part(b) {}

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
            rule[r] = floats_at(side ? S::rule2 : S::rule) + i * S::matrix + chunk * of_row + lane.g / S::inner * of_column;
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
            const uint4 first = both_parts(low[0], high[0], low[1], high[1]), last = both_parts(low[2], high[2], 0.f, 0.f);
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
#pragma unroll 1
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

    // What the pair gives to y or dh. y has the rest of C1 too, since the slope of a ReLU at y near 0 depends on its sign.
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

    // dy and h of half the tokens and eight c, from the parts of all pairs.
    COMPACTER_DEVICE void meet(float (&bias_sum)[2]) const {
        const int lane = lane_anew(), e = warp % S::eights, half = warp / S::eights;
        const float2* from = parts(0) + e * 64 + half * 32;
        const float2 bias = reinterpret_cast<const float2*>(floats_at(S::bias))[e * 4 + lane % 4];
        float y[2] = {bias.x, bias.y}, dh[2] = {};
#pragma unroll
        for (int j = 0; j < S::pairs; ++j) {
            const float2 of_y = from[j * S::eights * 64], of_dh = from[(S::pairs + j) * S::eights * 64];
            y[0] += of_y.x;
            y[1] += of_y.y;
            dh[0] += of_dh.x;
            dh[1] += of_dh.y;
        }
        with_activation(b.factors.activation, [&](auto function) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const ValueAndSlope a = function(y[j]);
                y[j] = a.value;
                dh[j] *= a.slope;
            }
        });
        bias_sum[0] += dh[0];
        bias_sum[1] += dh[1];
        const int at = S::middle + (half * 8 + lane / 4) * S::middle_row + e * 16 + lane % 4 * 4;
        const PairParts dy(dh[0], dh[1]), h(y[0], y[1]);
        word_at(at) = dy.rounded;
        word_at(at + S::middle_bytes) = dy.rest;
        word_at(at + 2 * S::middle_bytes) = h.rounded;
        word_at(at + 3 * S::middle_bytes) = h.rest;
    }

    // dC1 or dC2 of the pair, transposed: 16 columns c by 8 rows (p,i).
    COMPACTER_DEVICE void folded_gradients(const Operand& z, SumsOfSide<S>& sums) const {
        const int lane = lane_anew();
        const unsigned char* middle = shared_memory() + S::middle + side * 2 * S::middle_bytes +
                                      (lane % 8 + lane / 16 * 8) * S::middle_row + lane / 8 % 2 * 16;
        uint32_t rounded[3][2], rest[3][2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int r = 0; r < 3; ++r) {
                rounded[r][h] = transpose_matrix(r < 2 ? z.first[2 * r + h] : z.last[h]);
                rest[r][h] = transpose_matrix(r < 2 ? z.rest[2 * r + h] : z.last[2 + h]);
            }
#pragma unroll
        for (int step = 0; step < S::steps; ++step) {
            Four a;
            load_matrices_transposed(a, middle + step * 32);
#pragma unroll
            for (int r = 0; r < 3; ++r) {
                float fresh[4] = {};
                mma_16x8x16(fresh, a, rounded[r]);
                mma_16x8x16(fresh, a, rest[r]);
                add(sums.folded[step][r], fresh);
            }
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

    // ds1 or dt2 of the pair, 16 columns u by 8 i. Behind the i >= 8, columns 4 and 5 have the sums of `in` itself.
    COMPACTER_DEVICE void wide_gradients(const unsigned char* in, const float (&u)[3][4], SumsOfSide<S>& sums) const {
        const int lane = lane_anew(), column = lane / 4;
        constexpr uint32_t ones = 0x3f803f80u;
        uint32_t first[2][2], last[2][2];  // right operands of each chunk, rounded once
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int chunk = 0; chunk < 2; ++chunk) first[chunk][h] = transpose_matrix(pack_bf16(u[chunk][2 * h], u[chunk][2 * h + 1]));
            const uint32_t both = transpose_matrix(pack_bf16(u[2][2 * h], u[2][2 * h + 1]));
            const uint32_t of_second = __shfl_xor_sync(0xffffffff, both, 16);  // i >= 8 of the second chunk
            last[0][h] = column < 4 ? both : column == 4 ? ones : 0u;
            last[1][h] = column < 4 ? of_second : column == 5 ? ones : 0u;
        }
        in += columns_at(lane);
#pragma unroll
        for (int block = 0; block < S::blocks; ++block) {
            float fresh[2][4] = {};
#pragma unroll
            for (int chunk = 0; chunk < 2; ++chunk) {
                Four a;
                load_matrices_transposed(a, in + chunk * S::chunk * 2 + block * 32);
                mma_16x8x16(fresh[0], a, first[chunk]);
                mma_16x8x16(fresh[1], a, last[chunk]);
            }
            add(sums.wide[block][0], fresh[0]);
            add(sums.wide[block][1], fresh[1]);
        }
    }

    // The left operands of one chunk of dZ against s1: i < 8, what rounding took from these, and i >= 8 with both parts.
    struct OfChunk {
        uint32_t first[2], rest[2], last[2];
    };

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
        const int lane = lane_anew(), row = token_of_row(lane / 4), count = this->valid(tile);
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

template <class S>
__global__ void __launch_bounds__(S::threads, 1) backward(const Backward b) {
    const Pass<S> pass(b);
    const int tiles = static_cast<int>((b.tokens + S::tokens - 1) / S::tokens), step = gridDim.x;
    int tile = blockIdx.x;
    const auto load = [&](int tile, int stage) {
        if (tile < tiles) pass.load(tile, stage);
        commit_copies();
    };
    load(tile, 0);
    stage_parameters<S>(b.factors);
    __syncthreads();
    load(tile + step, 1);
    Folded<S> c;
    pass.form_expanding();
    pass.form_folded(c);
    __syncthreads();

    SumsOfSide<S> sums = {};
    int stage = 0;
    for (; tile < tiles; tile += step) {
        wait_copies<S::stages - 2>();
        __syncwarp();
        const unsigned char* in = pass.rows(stage, pass.side);
        const Operand z = pass.project(in);
        pass.fold(z, c);
        __syncthreads();
        pass.meet(sums.bias);
        __syncthreads();
        pass.folded_gradients(z, sums);
        load(tile + (S::stages - 1) * step, stage ? stage - 1 : S::stages - 1);
        float u[3][4] = {};
        pass.unfold(c, u);
        pass.wide_gradients(in, u, sums);
        if (b.grad_x) pass.expand(tile, pass.rows(stage, 1), pass.share(u));
        stage = stage + 1 == S::stages ? 0 : stage + 1;
    }
    let_next_kernel_start();
    __syncthreads();
    sums.store(pass, b.partials + blockIdx.x * b.row);
}

}  // namespace

void sides_backward_kernel(const Backward& b, const Launch& l) {
    with_sides(b.sizes, [&](auto shape) { launch(backward<decltype(shape)>, l, b); });
}

}  // namespace compacter::cuda
