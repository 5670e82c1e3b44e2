// The first kernel of a backward of the family. It reads x and g once, writes dx once, recomputes the rest, and sums the
// gradients of the small factors for each adapter. The formulas are those of backward_general.cu, with the weights w of
// adapters that are mixed:
//     V2_e and dV2_e are multiplied by w_e     dw_e = <V2_e, dV2_e> + <g, b2_e>, both before that
// For the gradients of the wide factors it leaves V2 and dZ of each row to family_weights.cu.
#include "small.h"

namespace compacter::cuda {
namespace {

template <class T>
struct Pass {
    static constexpr int Q = Padded::quad;
    const FamilyBackward& b;
    const Family& family = b.family;
    const Sizes& s = b.family.middle;
    Block block{};
    int* ids = reinterpret_cast<int*>(shared_memory() + b.places.ids);
    float* weights = floats_at(b.places.mix);
    Parts dz_parts = parts_at(b.dz_parts, b.part_stride, b.family.columns);
    bool with_bias = b.family.mixed && b.grad_mix && b.family.bias2.array.data;  // <g, b2> is needed

    // Z and dV2 of all slots, and <g, b2>.
    COMPACTER_DEVICE void contract_both(int adapter, bool staged) const {
        const auto x = rows_of_x(static_cast<const T*>(b.x), ids, family);
        const auto g = rows_of_out(static_cast<const T*>(b.grad_out), ids, family);
        const Images& images = b.places.images;
        const unsigned char* image = image_of(family, images, adapter);
        const Slab &left = b.places.left, &right2 = b.places.right2;
        const auto number = [&](int offset, int token, int p, int c) {
            const int slot = s.by_m.quotient(c);
            return offset / 4 + ((slot * s.tokens + token) * s.m + c - slot * s.m) * s.n + p;
        };
        for_each_slab(left, s.in, image + images.left, images.left_slab, staged, [&](int first, int count, const Parts& factor) {
            contract_slab<T>(x, family.rows_in, factor, left.terms, first, count, [&](int row, int c) {
                const int token = family.by_n_in.quotient(row);
                return number(b.numbers.z, token, row - token * family.n_in, c);
            });
        });
        for_each_slab(right2, s.out, image + images.right2, images.right2_slab, staged, [&](int first, int count, const Parts& factor) {
            contract_slab<T>(g, family.rows_out, factor, right2.terms, first, count, [&](int row, int c) {
                const int token = family.by_n_out.quotient(row), q = row - token * family.n_out;
                if (c < family.columns) return number(b.numbers.dv2, token, q, c);
                const int slot = family.by_n_out.quotient(c - family.columns);
                if (c - family.columns - slot * family.n_out != q) return -1;
                return b.of_bias / 4 + (token * family.slots + slot) * family.n_out + q;
            });
        });
        block.sync();
    }

    // What the second kernel needs of a row: number c of slot and row, of n for each token.
    COMPACTER_DEVICE void keep(float* all, const Tile& tile, int token, int p, int n, int slot, int c, float value) const {
        if (all && token < tile.count) all[((int64_t{tile.first} + token) * n + p) * family.columns + slot * s.m + c] = value;
    }

    // From Z and dV2 to V2 and dZ.
    COMPACTER_DEVICE void middle(const Tile& tile) const {
        for (int slot = 0; slot < family.slots; ++slot) {
            const SharedFactors factors = of_slot(b.places.factors, slot * b.places.factors_bytes);
            const SharedSums sums = of_slot(b.sums, slot * b.sums_bytes);
            Numbers numbers = b.numbers;
            numbers.z += slot * family.numbers() * 4;
            numbers.dv2 += slot * family.numbers() * 4;
            if (family.dense) of_dense(tile, slot, factors, sums, numbers);
            else of_sums(tile, slot, factors, sums, numbers);
        }
    }

    COMPACTER_DEVICE void of_sums(const Tile& tile, int slot, const SharedFactors& factors, const SharedSums& sums,
                                  Numbers numbers) const {
        const float* dv2 = floats_at(numbers.dv2);
        if (family.mixed) {
            numbers.dv2 = b.mixed_dv2;
            for (int e = block.rank; e < family.numbers(); e += block.size)
                floats_at(b.mixed_dv2)[e] = dv2[e] * weight(e / (s.m * s.n), slot);
            block.sync();
        }
        const Between<Padded> between{s, factors, sums, numbers, family.activation, b.partials.first != nullptr};
        between.back(
            [&](int token, int of_q, int c, const Quad<Q>& four) {
                if (family.mixed) store_quad<Q>(floats_at(b.mixed_v2) + (token * s.m + c) * s.n + of_q * Q, four);
#pragma unroll
                for (int j = 0; j < Q; ++j)
                    if (of_q * Q + j < family.n_out)
                        keep(b.v2, tile, token, of_q * Q + j, family.n_out, slot, c, four.at[j] * weight(token, slot));
            },
            [&](int token, int of_p, int c, const Quad<Q>& four) {
#pragma unroll
                for (int j = 0; j < Q; ++j) {
                    const int p = of_p * Q + j;
                    if (p >= family.n_in) continue;
                    keep(b.dz, tile, token, p, family.n_in, slot, c, four.at[j]);
                    store_parts<T>(dz_parts, slot * s.m + c, token * family.n_in + p, four.at[j]);
                }
            });
        if (!b.grad_mix) return;
        gradient_of_mix(tile, slot, [&](int token, int e) {
            return floats_at(b.mixed_v2)[token * s.m * s.n + e] * dv2[token * s.m * s.n + e];
        });
        block.sync();
    }

    COMPACTER_DEVICE void of_dense(const Tile& tile, int slot, const SharedFactors& factors, const SharedSums& sums,
                                   const Numbers& numbers) const {
        float *z = floats_at(numbers.z), *dv2 = floats_at(numbers.dv2);
        for (int e = block.rank; e < s.tokens * s.m; e += block.size) {
            const int token = s.by_m.quotient(e), c = e - token * s.m;
            const ValueAndSlope h = activate(family.activation, z[e] + floats_at(factors.bias)[c]);
            const float dz = dv2[e] * weight(token, slot) * h.slope;
            keep(b.v2, tile, token, 0, 1, slot, c, h.value * weight(token, slot));
            keep(b.dz, tile, token, 0, 1, slot, c, dz);
            store_parts<T>(dz_parts, slot * s.m + c, token, dz);
            z[e] = dz;
            dv2[e] *= h.value;
        }
        block.sync();
        if (b.partials.first)
            for (int c = block.rank; c < s.m; c += block.size) {
                float sum = 0.f;
                for (int token = 0; token < s.tokens; ++token) sum += z[token * s.m + c];
                floats_at(sums.bias)[c] += sum;
            }
        if (b.grad_mix) gradient_of_mix(tile, slot, [&](int token, int e) { return dv2[token * s.m + e]; });
        block.sync();
    }

    COMPACTER_DEVICE float weight(int token, int slot) const { return weights[token * family.slots + slot]; }

    // dw of a slot: the sum of product(token, e) over all e, and of <g, b2>. A warp has a token.
    template <class Product>
    COMPACTER_DEVICE void gradient_of_mix(const Tile& tile, int slot, const Product& product) const {
        const int lane = threadIdx.x % 32, count = s.m * s.n;
        for (int token = threadIdx.x / 32; token < tile.count; token += blockDim.x / 32) {
            float sum = 0.f;
            for (int e = lane; e < count; e += 32) sum += product(token, e);
            if (with_bias)
                for (int q = lane; q < family.n_out; q += 32)
                    sum += floats_at(b.of_bias)[(token * family.slots + slot) * family.n_out + q];
#pragma unroll
            for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(0xffffffff, sum, flip);
            if (lane == 0) b.grad_mix[int64_t{ids[token]} * family.slots + slot] = sum;
        }
    }

    // dx; without an adapter, g if the residual is x.
    COMPACTER_DEVICE void expand(const Tile& tile, bool staged) const {
        const auto out = rows_of_x(static_cast<T*>(b.grad_x), ids, family);
        const bool computes = tile.adapter < family.tiling.adapters, poison = tile.adapter > family.tiling.adapters;
        const auto residual = rows_of_x(static_cast<const T*>(b.residual_is_x ? b.grad_out : nullptr), ids, family);
        const auto slab = [&](int first, int count, const Parts& factor) {
            expand_slab(dz_parts, family.rows_in, computes ? family.columns : 0, factor, first, count, residual, out, poison);
        };
        if (!computes) return slab(0, segments(s.in), Parts{});
        const Images& images = b.places.images;
        const unsigned char* from = image_of(family, images, tile.adapter) + images.left;
        for_each_slab(b.places.left, s.in, from, images.left_slab, staged, slab);
    }
};

template <class T>
__global__ void __launch_bounds__(256, 1) backward(const FamilyBackward b) {
    const Pass<T> pass{b};
    const Family& family = b.family;
    const Tiles tiles{family.tiling};
    clear(b.places.clear, b.places.clear_end);
    const int share = tiles.share(gridDim.x), begin = blockIdx.x * share, all = tiles.count();
    int staged = -1;
    for (int at = begin; at < begin + share && at < all; ++at) {
        const Tile tile = tiles.at(at);
        const bool computes = tile.adapter < family.tiling.adapters, same = tile.adapter == staged;
        __syncthreads();
        if (computes && !same) {
            if (staged >= 0 && b.partials.first) {
                store_small(family, b.sums, b.sums_bytes, b.partials, staged);
                __syncthreads();
            }
            clear(b.sums.rule, b.sums.rule + family.slots * b.sums_bytes);
            stage_small(family, b.places, tile.adapter);
        }
        stage_tokens(pass.ids, tiles, tile);
        __syncthreads();
        if (computes) {
            stage_mix(pass.weights, pass.ids, family);
            pass.contract_both(tile.adapter, same);
            pass.middle(tile);
            staged = tile.adapter;
        }
        if (b.grad_x) pass.expand(tile, true);
    }
    if (staged < 0 || !b.partials.first) return;
    __syncthreads();
    store_small(family, b.sums, b.sums_bytes, b.partials, staged);
}

}  // namespace

template <>
void family_backward_kernel<COMPACTER_ELEMENT>(const FamilyBackward& b, const Launch& l) {
    launch(backward<COMPACTER_ELEMENT>, l, b);
}

}  // namespace compacter::cuda
