// Backward of a wide adapter in bf16 whose sizes are known. The formulas are those of backward.cu, but all warps of a
// block share each tile: a warp has a share of the columns of every chunk (wide.h), and a chunk of the bottleneck.
//
// Four tokens make a tile, so that the next one can be loaded meanwhile. Between the projections, the tokens are the
// columns of a product, not its rows. The eight columns are the four tokens, rounded, and then what rounding took:
//
//                                              left operand           right operand            sums
//     Z^T   = s1 x^T     dV2^T  = t2 g^T       both parts of s1, t2   x, g: a pair of chunks   8 i by chunk, token
//     y^T   = C1^T Z^T   dh^T   = C2^T dV2^T   C1, C2: a chunk q      Z, dV2                   16 (q,v) by part, token
//     dZ^T  = C1 dy^T    V2^T   = C2 h^T       C1, C2: two chunks p   dy, h                    16 (p,i) by part, token
//     ds1  += x^T dZ     dt2   += g^T V2       x, g transposed        dZ, V2                   16 columns u by 8 i
//     dx    = dZ s1^T (+ g)                    dZ: both parts         s1: both parts           chunk, token by 8 u
//     dC1^T += dy^T Z    dC2^T += h^T dV2      dy, h: a chunk q       Z, dV2                   16 (q,v) by 8 (p,i)
//
// What the warps exchange are rows of 16 bytes, which ldmatrix reads as they are or transposed. Side 0 is that of x
// and Z, dy, dZ, side 1 that of g and dV2, h, V2. Tensor cores truncate, so each tile has fresh accumulators, which are
// then added to the sums.
#include "activations.h"
#include "wide_sums.h"

namespace compacter::cuda {
namespace {

template <class S>
struct Pass : WidePart<S> {
    using WidePart<S>::b, WidePart<S>::warp, WidePart<S>::own;

    COMPACTER_DEVICE explicit Pass(const Backward& b) : WidePart<S>(b) {}

    // The sums of two tokens over both parts, which lanes t and t ^ 2 have: of row g for t < 2, else of row g + 8. The
    // tokens are 2 (t % 2) and the next one.
    COMPACTER_DEVICE static void join(const float (&sum)[4], float (&joined)[2]) {
        const bool second = lane_anew() % 4 >= 2;
#pragma unroll
        for (int e = 0; e < 2; ++e)
            joined[e] = (second ? sum[2 + e] : sum[e]) + __shfl_xor_sync(0xffffffff, second ? sum[e] : sum[2 + e], 2);
    }

    // Writes these two tokens of a row [part][token].
    COMPACTER_DEVICE static void put(int rows, int row, const float (&value)[2]) {
        uint32_t parts[2];
        split(value[0], value[1], parts);
        uint32_t* to = reinterpret_cast<uint32_t*>(row_at(rows, row)) + lane_anew() % 2;
        to[0] = parts[0];
        to[2] = parts[1];
    }

    // Z and dV2 over the columns of the warp, and then, of a side and pair of chunks, over those of all warps.
    COMPACTER_DEVICE void project(const unsigned char* tile) const {
        const int lane = lane_anew(), at = in_lines(lane / 4, lane % 4), of_factor = in_lines(lane % 16, lane / 16);
        auto* partial = reinterpret_cast<float2*>(shared_memory() + S::partial) + lane;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const unsigned char *factor = own() + S::factors + side * S::factor, *rows = tile + side * S::side;
            float sum[S::pairs][4] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Four f[2];
#pragma unroll
                for (int k = 0; k < 2; ++k) load_matrices(f[k], factor + (of_factor ^ (half * 64 + k * 32)));
#pragma unroll
                for (int j = 0; j < S::pairs; ++j) {
                    const uint4 a = *reinterpret_cast<const uint4*>(rows + j * 8 * S::line + (at ^ half * 64));
                    mma_16x8x16(sum[j], f[0], {a.x, a.y});
                    mma_16x8x16(sum[j], f[1], {a.z, a.w});
                }
            }
#pragma unroll
            for (int j = 0; j < S::pairs; ++j)
                partial[((side * S::pairs + j) * S::warps + warp) * 32] =
                    make_float2(sum[j][0] + sum[j][2], sum[j][1] + sum[j][3]);
        }
        __syncthreads();
        float sum[2] = {};
#pragma unroll
        for (int other = 0; other < S::warps; ++other) {
            const float2 part = partial[(warp * S::warps + other) * 32];
            sum[0] += part.x;
            sum[1] += part.y;
        }
        const int chunk = this->pair() * 2 + lane % 4 / 2;
        put(S::z, (this->side() * S::n + chunk) * S::n + lane / 4, sum);
        __syncthreads();
    }

    // h and dy of the warp's chunk of the bottleneck. rest: what rounding took from C1. Without it, some y would have
    // the other sign, which a ReLU shows.
    COMPACTER_DEVICE void bottleneck(const Four (&rest)[S::pairs], WideSums<S>& sums) const {
        const int lane = lane_anew(), v = lane / 4 + lane % 4 / 2 * 8;
        const int row = lane / 16 * S::n + lane % 8, c = warp * S::inner + lane / 8 % 2 * 8;
        float y[4] = {}, y_rest[4] = {}, dh[4] = {};
        Four z[2], dv2[2];  // of two pairs of chunks each
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_matrices_transposed(z[half], row_at(S::z, half * 32 + lane));
            load_matrices_transposed(dv2[half], row_at(S::z, (2 + half) * 32 + lane));
        }
#pragma unroll
        for (int j = 0; j < S::pairs; ++j) {
            Four c1, c2;
            load_matrices_transposed(c1, folded_at<S>(0, j * 2 * S::n + row, c));
            load_matrices_transposed(c2, folded_at<S>(1, j * 2 * S::n + row, c));
            const int half = j / 2, at = j % 2 * 2;
            mma_16x8x16(y, c1, {z[half][at], z[half][at + 1]});
            mma_16x8x16(y_rest, rest[j], {z[half][at], z[half][at + 1]});
            mma_16x8x16(dh, c2, {dv2[half][at], dv2[half][at + 1]});
        }
        add(y, y_rest);
        float h[2], dy[2];
        join(y, h);
        join(dh, dy);
        const float bias = Small<S>().biases()[warp * S::inner + v];
        with_activation(b.factors.activation, [&](auto function) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const ValueAndSlope a = function(h[e] + bias);
                h[e] = a.value;
                dy[e] *= a.slope;
            }
        });
        sums.bias += dy[0] + dy[1];
        put(S::narrow, warp * S::inner + v, dy);
        put(S::narrow, S::d + warp * S::inner + v, h);
        __syncthreads();
    }

    // dZ or V2 of two chunks: [part][pair][i], each row i a pair of chunks by four tokens.
    COMPACTER_DEVICE void mix() const {
        const int lane = lane_anew(), side = this->side(), row = this->pair() * 2 * S::n + lane % 16;
        float sum[2][4] = {};
#pragma unroll
        for (int q = 0; q < S::n; q += 2) {
            Four of_bottleneck, c[2];
            load_matrices_transposed(of_bottleneck, row_at(S::narrow, side * S::d + q * S::inner + lane));
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                load_matrices(c[e], folded_at<S>(side, row, (q + e) * S::inner + lane / 16 * 8));
                mma_16x8x16(sum[e], c[e], {of_bottleneck[e * 2], of_bottleneck[e * 2 + 1]});
            }
        }
        add(sum[0], sum[1]);
        float joined[2];
        join(sum[0], joined);
        uint32_t parts[2];
        split(joined[0], joined[1], parts);
        auto* to = reinterpret_cast<uint32_t*>(row_at(S::mixed, (side * 2 * S::pairs + this->pair()) * S::n)) + lane;
        to[0] = parts[0];
        to[S::pairs * 32] = parts[1];
        __syncthreads();
    }

    // The sums of the wide gradients, from x, dZ and g, V2, and of g itself.
    COMPACTER_DEVICE void wide_gradients(const unsigned char* tile, WideSums<S>& sums) const {
        const int lane = lane_anew();
        Four dz, rest, v2;
        load_matrices(dz, row_at(S::mixed, lane));
        load_matrices(rest, row_at(S::mixed, 32 + lane));
        load_matrices(v2, row_at(S::mixed, 64 + lane));
        const auto ones = [&](int chunk) { return lane / 4 == chunk + lane % 4 / 2 ? 0x3f803f80u : 0u; };
#pragma unroll
        for (int block = 0; block < S::blocks; ++block) {
            float left[4] = {}, right[4] = {}, of_g[4] = {};
#pragma unroll
            for (int j = 0; j < S::pairs; j += 2) {
                const unsigned char* x = tile + j * 8 * S::line + (this->block_at(lane) ^ block * 32);
                Four xt, gt;
                load_matrices_transposed(xt, x);
                load_matrices_transposed(gt, x + S::side);
                mma_16x8x16(left, xt, {dz[j], dz[j + 1]});
                mma_16x8x16(left, xt, {rest[j], rest[j + 1]});
                mma_16x8x16(right, gt, {v2[j], v2[j + 1]});
                mma_16x8x16(of_g, gt, {ones(j * 2), ones(j * 2 + 2)});
            }
            add(sums.left[block], left);
            add(sums.right2[block], right);
            add(sums.bias2[block], of_g);
        }
    }

    // dx = dZ s1^T (+ g). A lane has eight neighbouring columns of a row in each half line: column 2t + e of product m
    // is 8t + 2m + e. Two of its rows are 8 lines apart.
    COMPACTER_DEVICE void expand(const unsigned char* g, int tile) const {
        const int lane = lane_anew(), row = lane / 4, t = lane % 4, at = in_lines(row, t), token = row % S::tokens;
        unsigned char* to = static_cast<unsigned char*>(b.grad_x) + this->first(tile, token) + t * 16;
        to += row / S::tokens * S::chunk * 2;
        const bool real = this->exists(tile, token);
        const unsigned char* factor = own() + S::factors;
        Four s1[2][2], dz[2];  // of parts and half lines; of 16 rows
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int part = 0; part < 2; ++part)
                load_matrices_transposed(s1[part][e], factor + (in_lines(part * S::n + lane % 8, lane / 8) ^ e * 64));
            load_matrices_transposed(dz[e], row_at(S::mixed, lane / 16 * 32 + e * 16 + lane % 16));
        }
#pragma unroll
        for (int pair = 0; pair < S::pairs; pair += 2)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint4 out[2] = {};  // of rows g and g + 8
                if (b.residual_is_x)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        out[e] = *reinterpret_cast<const uint4*>(g + (pair + e) * 8 * S::line + (at ^ half * 64));
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    float sum[4] = {low_of(word(out[0], m)), high_of(word(out[0], m)), low_of(word(out[1], m)),
                                    high_of(word(out[1], m))};
                    const Four& a = dz[pair / 2];
                    mma_16x8x8(sum, {a[0], a[1]}, s1[0][half][m]);
                    mma_16x8x8(sum, {a[2], a[3]}, s1[0][half][m]);
                    mma_16x8x8(sum, {a[0], a[1]}, s1[1][half][m]);
                    word(out[0], m) = pack_bf16(sum[0], sum[1]);
                    word(out[1], m) = pack_bf16(sum[2], sum[3]);
                }
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (real) *reinterpret_cast<uint4*>(to + (pair + e) * 4 * S::chunk + half * 64) = out[e];
            }
    }

    // What the tile gives to dC1 and dC2. Along k are the part and token. With each part once more against the other
    // part, this is the product of the whole numbers.
    COMPACTER_DEVICE void narrow_gradients(WideSums<S>& sums) const {
        const int lane = lane_anew();
        Four rows;  // of dy, of h
        load_matrices(rows, row_at(S::narrow, lane / 16 * S::d + warp * S::inner + lane % 16));
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const uint32_t a[2] = {rows[side * 2], rows[side * 2 + 1]};
            const uint32_t other[2] = {__shfl_xor_sync(0xffffffff, a[0], 2), __shfl_xor_sync(0xffffffff, a[1], 2)};
#pragma unroll
            for (int p = 0; p < S::n; p += 4) {
                Four z;
                load_matrices(z, row_at(S::z, (side * S::n + p) * S::n + lane));
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float fresh[4] = {};
                    mma_16x8x8(fresh, a, z[e]);
                    mma_16x8x8(fresh, other, z[e]);
                    add(sums.folded[side][p + e], fresh);
                }
            }
        }
    }
};

template <class S>
__global__ void __launch_bounds__(32 * S::warps, 1) backward(const Backward b) {
    const Pass<S> pass(b);
    const AskedFactors<S> parameters(b.factors, pass.warp);
    const int tiles = static_cast<int>((b.tokens + S::tokens - 1) / S::tokens), step = gridDim.x;
    int tile = blockIdx.x;
    for (int stage = 0; stage < S::stages; ++stage) {
        if (tile + stage * step < tiles) {
            pass.load(b.x, pass.rows(stage), tile + stage * step);
            pass.load(b.grad_out, pass.rows(stage) + S::side, tile + stage * step);
        }
        commit_copies();
    }
    parameters.store(Small<S>(), b.factors.bias.data);
    form_lines(pass, 0, parameters.wide[0], 1.f);
    form_lines(pass, 1, parameters.wide[1], b.factors.scale);
    __syncthreads();
    Four rest[S::pairs];
    form_folded(Small<S>(), pass.warp);  // other warps read it after two barriers of the first tile
    form_rest(Small<S>(), pass.warp, rest);
    WideSums<S> sums = {};
    for (int stage = 0; tile < tiles; tile += step, stage ^= 1) {
        wait_copies<1>();
        __syncwarp();
        unsigned char *x = pass.rows(stage), *g = x + S::side;
        const int next = tile + S::stages * step;
        pass.project(x);
        pass.bottleneck(rest, sums);
        pass.mix();
        pass.wide_gradients(x, sums);
        __syncwarp();
        if (next < tiles) pass.load(b.x, x, next);
        if (b.grad_x) pass.expand(g, tile);
        __syncwarp();
        if (next < tiles) pass.load(b.grad_out, g, next);
        commit_copies();
        pass.narrow_gradients(sums);
    }
    let_next_kernel_start();
    sums.store(b, pass.warp, b.partials + blockIdx.x * b.row);
}

}  // namespace

void wide_backward_kernel(const Backward& b, const Launch& l) {
    with_wide(b.sizes, [&](auto shape) { launch(backward<decltype(shape)>, l, b); });
}

}  // namespace compacter::cuda
