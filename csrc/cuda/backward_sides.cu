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
//     out       dx = dZ s1^T (+ g)                           share, expand: a chunk each
//
// C1 and C2 are those of matrices.h. A warp has one side of one pair of chunks. It needs no other part of C than the
// 24 rows of its chunks, which stay in registers. The rows of all products are the 16 tokens of a tile, except for sums
// over tokens, which have the tokens along k.
//
// The twelve i of a chunk are one and a half eights. A pair has three eights: i < 8 of its first chunk, i < 8 of its
// second chunk, and i >= 8 of both. Tensor cores truncate, so each tile has fresh accumulators, which are then added to
// the sums.
#include "activations.h"
#include "products_of_sides.h"
#include "sums_of_sides.h"

namespace compacter::cuda {
namespace {

template <class S>
struct Pass : SideProducts<S> {
    using Products = SideProducts<S>;
    using Products::b, Products::warp, Products::side, Products::columns_at, Products::parts;

    COMPACTER_DEVICE explicit Pass(const Backward& b) : Products(b) {}

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

    // ds1 or dt2 of the pair, 16 columns u by 8 i. Behind the i >= 8, columns 4 and 5 have the sums of `in` itself.
    COMPACTER_DEVICE void wide_gradients(const unsigned char* in, const float (&u)[3][4], SumsOfSide<S>& sums) const {
        const int lane = lane_anew(), column = lane / 4;
        constexpr uint32_t ones = 0x3f803f80u;
        uint32_t first[2][2], last[2][2];  // right operands of each chunk, rounded once
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int chunk = 0; chunk < 2; ++chunk)
                first[chunk][h] = transpose_matrix(pack_bf16(u[chunk][2 * h], u[chunk][2 * h + 1]));
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
        // In the place of the tile before, which no warp reads after the first barrier.
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
