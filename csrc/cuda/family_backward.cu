// The first kernel of a backward of the family. It reads x and g once, writes dx once, recomputes the rest, and sums the
// gradients of the small factors for each adapter. The formulas are those of backward_general.cu, with the weights w of
// adapters that are mixed:
//     V2_e and dV2_e are multiplied by w_e     dw_e = <V2_e, dV2_e> + <g, b2_e>, both before that
// For the gradients of the wide factors it leaves V2 and dZ of each row to family_weights.cu.
#include "family_folded.h"
#include "family_middle.h"

namespace compacter::cuda {
namespace {

template <class T>
struct Pass {
    using Four = Quad<4>;
    using Place = typename FamilyMiddle<true>::Place;
    const FamilyBackward& b;
    const Family& family = b.family;
    const Sizes& s = b.family.middle;
    const Numbers& numbers = b.numbers;
    FamilyMiddle<true> middle{b.family, b.places};
    FoldedMiddle<T, T::factor_parts> folded{b.family, b.places};

    COMPACTER_DEVICE int* ids() const { return reinterpret_cast<int*>(shared_memory() + b.places.ids); }
    COMPACTER_DEVICE Parts v2_parts() const { return parts_at(b.v2_parts, b.part_stride, family.columns); }
    COMPACTER_DEVICE Parts dz_parts() const { return parts_at(b.dz_parts, b.part_stride, family.columns); }

    // Z and dV2 of all slots, and <g, b2>. If the factors are there whole, and half of the warps
    // suffices for the rows, one half has Z, the other one the rest.
    COMPACTER_DEVICE void contract_both(int adapter) const {
        const auto x = rows_of_x(static_cast<const T*>(b.x), ids(), family);
        const auto g = rows_of_out(static_cast<const T*>(b.grad_out), ids(), family);
        const Images& images = b.places.images;
        const unsigned char* image = image_of(family, images, adapter);
        const Slab &left = b.places.left, &right2 = b.places.right2;
        const int warps = blockDim.x / 32, most_rows = max(family.rows_in, family.rows_out);
        const int half = left.whole && warps / 2 * 16 >= most_rows ? warps / 2 : 0;
        const auto store = [&](int to, bool adds, int c, int token, int chunk, float low, float high) {
            if (family.folded.rows) folded.store_contracted(to, c, token, chunk, low, high);
            else middle.store_contracted(to, adds, c, token, chunk, low, high);
        };
        const auto store_of_bias = [&](bool adds, int c, int token, int q, float value) {
            const int row = c - family.columns, slot = family.by_n_out.quotient(max(row, 0));
            if (row < 0 || c >= right2.terms || row - slot * family.n_out != q) return;
            float& to = floats_at(b.of_bias)[slot * family.stride + token * s.n + q];
            to = adds ? to + value : value;
        };
        for_each_slab<true>(left, s.in, image + images.left, images.left_slab, [&](int first, int count, const Parts& factor) {
            const WarpShare share(x.by_groups, 0, warps - half);
            contract_slab<T>(x, share, factor, left.rows, first, count,
                             [&](int c, int token, int chunk, float low, float high) {
                                 store(numbers.z, first, c, token, chunk, low, high);
                             });
        });
        for_each_slab<true>(right2, s.out, image + images.right2, images.right2_slab,
                            [&](int first, int count, const Parts& factor) {
                                const WarpShare share(g.by_groups, half, warps - half);
                                contract_slab<T>(g, share, factor, right2.rows, first, count,
                                                 [&](int c, int token, int chunk, float low, float high) {
                                                     store(numbers.dv2, first, c, token, chunk, low, high);
                                                     if (c + 1 < family.columns) return;
                                                     store_of_bias(first, c, token, chunk, low);
                                                     store_of_bias(first, c + 1, token, chunk, high);
                                                 });
                            });
        __syncthreads();
    }

    // From Z and dV2 to V2 and dZ, as parts.
    COMPACTER_DEVICE void compute(int tile) const {
        if (family.folded.rows) of_folded();
        else if (family.dense) of_dense();
        else if (!s.inner) of_one();
        else of_adapter();
        __syncthreads();
        keep(b.v2, v2_parts(), tile);
        keep(b.dz, dz_parts(), tile);
        if (b.grad_mix) gradient_of_mix();
    }

    COMPACTER_DEVICE void store_v2(const Place& at, const Four& four) const {
        middle.store_rows<T>(v2_parts(), at, family.n_out, scaled(four, middle.weight(at.slot, at.token)));
    }
    COMPACTER_DEVICE void store_dz(const Place& at, const Four& four) const {
        middle.store_rows<T>(dz_parts(), at, family.n_in, four);
    }

    COMPACTER_DEVICE void of_one() const {
        const int rule = b.places.factors.rule;
        middle.for_each_place([&](const Place& at) {
            store_v2(at, middle.mix(rule, numbers.z, at));
            store_dz(at, middle.mix_back(rule, numbers.dv2, at));
        });
        if (b.partials.first) middle.add_rule_gradient(b.sums.rule, b.sums_bytes, numbers.z, numbers.dv2, false);
    }

    COMPACTER_DEVICE void of_adapter() const {
        const SharedFactors& factors = b.places.factors;
        middle.for_each_place([&](const Place& at) {
            store_quad<4>(middle.at(numbers.v, at), middle.mix(factors.rule, numbers.z, at));
            const Four dz2 = middle.mix_back(factors.rule2, numbers.dv2, at);
            store_quad<4>(middle.at(numbers.dz2, at), scaled(dz2, middle.weight(at.slot, at.token)));
        });
        __syncthreads();
        middle.widen(numbers.v, [&](int row, int slot, int v, int quad, Four y) {
            Four dh{};
            const float* dz2 = middle.at(numbers.dz2, slot * s.m, quad);
            middle.add_product(dh, middle.factor(factors.left2, slot) + v, s.inner_stride, dz2, s.m);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const ValueAndSlope a = activate(family.activation, y.at[j]);
                y.at[j] = a.value;
                dh.at[j] *= a.slope;
            }
            store_quad<4>(middle.at(numbers.h, row, quad), y);
            store_quad<4>(middle.at(numbers.dy, row, quad), dh);
        });
        __syncthreads();
        if (b.partials.first) {
            middle.add_outer(b.sums.right, b.sums_bytes, numbers.v, s.m, numbers.dy, s.inner);
            middle.add_outer(b.sums.left2, b.sums_bytes, numbers.dz2, s.m, numbers.h, s.inner);
            middle.add_bias_gradient(b.sums.bias, b.sums_bytes, numbers.dy, s.inner, s.n);
            __syncthreads();
        }
        middle.for_each_place([&](const Place& at) {
            store_quad<4>(middle.at(numbers.z2, at), middle.reduce(factors.left2, numbers.h, at));
            store_quad<4>(middle.at(numbers.dv, at), middle.reduce(factors.right, numbers.dy, at));
        });
        __syncthreads();
        middle.for_each_place([&](const Place& at) {
            const Four v2 = middle.mix(factors.rule2, numbers.z2, at);
            if (b.grad_mix) store_quad<4>(middle.at(b.mixed_v2, at), v2);
            store_v2(at, v2);
            store_dz(at, middle.mix_back(factors.rule, numbers.dv, at));
        });
        if (!b.partials.first) return;
        middle.add_rule_gradient(b.sums.rule, b.sums_bytes, numbers.z, numbers.dv, false);
        middle.add_rule_gradient(b.sums.rule2, b.sums_bytes, numbers.z2, numbers.dv2, true);
    }

    COMPACTER_DEVICE void of_folded() const {
        folded.to_h_and_dy(numbers.z, numbers.dv2, numbers.h, numbers.dy, b.grad_mix ? b.of_mix : -1);
        __syncthreads();
        folded.back(numbers.h, b.places.folded.second, v2_parts());
        folded.back(numbers.dy, b.places.folded.first, dz_parts());
        if (!b.partials.first) return;
        const FoldedPlaces& sums = b.folded_sums;
        folded.add_sums(sums.first, sums.bias, b.sums_bytes, numbers.z, numbers.dy);
        folded.add_sums(sums.second, -1, b.sums_bytes, numbers.dv2, numbers.h);
    }

    COMPACTER_DEVICE void of_dense() const {
        middle.for_each_quad(family.columns, [&](int c, int quad) {
            const int slot = s.by_m.quotient(c);
            const float bias = middle.factor(b.places.factors.bias, slot)[c - slot * s.m];
            Four z = load_quad<4>(middle.at(numbers.z, c, quad)), dv2 = load_quad<4>(middle.at(numbers.dv2, c, quad)), v2;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const ValueAndSlope h = activate(family.activation, z.at[j] + bias);
                const float weight = middle.weight(slot, quad * 4 + j);
                v2.at[j] = h.value * weight;
                z.at[j] = dv2.at[j] * weight * h.slope;
                dv2.at[j] *= h.value;
            }
            store_parts<T>(v2_parts(), c, quad * 4, v2);
            store_parts<T>(dz_parts(), c, quad * 4, z);
            store_quad<4>(middle.at(numbers.z, c, quad), z);
            store_quad<4>(middle.at(numbers.dv2, c, quad), dv2);
        });
        if (!b.partials.first) return;
        __syncthreads();
        middle.add_bias_gradient(b.sums.bias, b.sums_bytes, numbers.z, s.m, 1);
    }

    COMPACTER_DEVICE void store_sums(int adapter) const {
        if (!b.partials.first) return;
        if (family.folded.rows) store_folded(family, b.folded_sums, b.sums_bytes, b.partials, adapter);
        else store_small(family, b.sums, b.sums_bytes, b.partials, adapter);
    }

    // What the second kernel needs of a tile.
    COMPACTER_DEVICE void keep(const Kept& kept, const Parts& from, int tile) const {
        if (!kept.first) return;
        const int vectors = kept.part / 8;
        auto* to = reinterpret_cast<uint4*>(kept.first + tile * kept.tile);
#pragma unroll
        for (int part = 0; part < T::factor_parts; ++part)
            for (int e = threadIdx.x; e < vectors; e += blockDim.x)
                store_global(to + part * vectors + e, reinterpret_cast<const uint4*>(from.first + part * from.part)[e]);
    }

    // dw = <V2, dV2> + <g, b2> of each slot and token.
    COMPACTER_DEVICE void gradient_of_mix() const {
        for (int e = threadIdx.x; e < family.slots * s.tokens; e += blockDim.x) {
            const int slot = e / s.tokens, token = e - slot * s.tokens;
            if (ids()[token] < 0) continue;
            float sum = 0.f;
            if (family.folded.rows) {
                for (int block = 0; block < family.folded.blocks(); ++block)
                    sum += floats_at(b.of_mix)[block * family.slots * s.tokens + e];
            } else {
                const int first = slot * s.m * family.stride + token * s.n;
                const float *dv2 = floats_at(numbers.dv2) + first, *v2 = floats_at(b.mixed_v2) + first;
                for (int c = 0; c < s.m; ++c)
                    for (int q = 0; q < s.n; ++q) {
                        const int at = c * family.stride + q;
                        sum += family.dense ? dv2[at] : v2[at] * dv2[at];
                    }
            }
            if (family.bias2.array.data)  // <g, b2>
                for (int q = 0; q < family.n_out; ++q) sum += floats_at(b.of_bias)[slot * family.stride + token * s.n + q];
            b.grad_mix[int64_t{ids()[token]} * family.slots + slot] = sum;
        }
    }

    // dx; without an adapter, g if the residual is x.
    COMPACTER_DEVICE void expand(int adapter) const {
        const auto out = rows_of_x(static_cast<T*>(b.grad_x), ids(), family);
        const auto residual = rows_of_x(static_cast<const T*>(b.residual_is_x ? b.grad_out : nullptr), ids(), family);
        const int adapters = family.tiling.adapters;
        if (adapter >= adapters) return copy_tile<T>(s.in, residual, out, adapter > adapters);
        const Images& images = b.places.images;
        const Slab& left = b.places.left;
        const unsigned char* from = image_of(family, images, adapter) + images.left;
        for_each_slab<true>(left, s.in, from, images.left_slab, [&](int first, int count, const Parts& factor) {
            if (out.whole()) expand_slab<true, T>(dz_parts(), left.rows, factor, first, count, residual, out);
            else expand_slab<false, T>(dz_parts(), left.rows, factor, first, count, residual, out);
        });
    }
};

template <class T>
__global__ void __launch_bounds__(threads_of_rows<T>(compiled_for), 1) backward(const FamilyBackward b) {
    const Pass<T> pass{b};
    const Family& family = b.family;
    const Tiles tiles{family.tiling};
    clear(b.places.clear, b.places.clear_end);
    const Range its = tiles.of_block();
    const int& end = pass.ids()[family.tiling.tokens];  // in shared memory, as no register is left for it
    if (threadIdx.x == 0) pass.ids()[family.tiling.tokens] = its.end;
    __syncthreads();
    const auto prefetch = [&](int tile) {
        if (tile >= end) return;
        prefetch_tile(tiles, tile, static_cast<const T*>(b.x), family.n_in * family.middle.in);
        prefetch_tile(tiles, tile, static_cast<const T*>(b.grad_out), family.n_out * family.middle.out);
    };
    prefetch(its.begin);
    int staged = -1;
    for (int at = its.begin; at < end; ++at) {
        const Tile tile = tiles.at(at);
        const bool computes = tile.adapter < family.tiling.adapters;
        __syncthreads();
        if (computes && tile.adapter != staged) {
            if (staged >= 0) {
                pass.store_sums(staged);
                __syncthreads();
            }
            clear(b.sums_begin, b.sums_begin + family.slots * b.sums_bytes);
            stage_image(family, b.places, tile.adapter);
        }
        stage_tokens(pass.ids(), tiles, tile);
        __syncthreads();
        prefetch(at + 1);
        if (computes) {
            stage_mix(floats_at(b.places.mix), pass.ids(), family);
            pass.contract_both(tile.adapter);
            pass.compute(at);
            staged = tile.adapter;
        }
        if (b.grad_x) pass.expand(tile.adapter);
    }
    if (staged < 0) return;
    __syncthreads();
    pass.store_sums(staged);
}

}  // namespace

template <>
void family_backward_kernel<COMPACTER_ELEMENT>(const FamilyBackward& b, const Launch& l) {
    launch(backward<COMPACTER_ELEMENT>, l, b);
}

}  // namespace compacter::cuda
