// The forward of the family. A block has a contiguous range of the tiles, and so few adapters. It reads x once and writes
// the output once. A row without an adapter gets its residual, and one whose number is out of range NaN.
//
//     Z[p,c] = sum_u x[p,u] s_c[u]                                     contract_slab
//     V2 = middle(Z), times the row's weight if adapters are mixed     to_v2, formulas in bottleneck.h, or act(Z + b1)
//     out[q,u] = residual[q,u] + sum_c V2[q,c] t_c[u] + b2[q,u]        expand_slab
#include "family_folded.h"
#include "family_middle.h"

namespace compacter::cuda {
namespace {

template <class T>
struct Pass {
    const FamilyForward& f;
    const Family& family = f.family;
    const Sizes& s = f.family.middle;
    FamilyMiddle<T::parts == 3> middle{f.family, f.places};
    FoldedMiddle<T, forward_right_parts<T>> folded{f.family, f.places};

    COMPACTER_DEVICE int* ids() const { return reinterpret_cast<int*>(shared_memory() + f.places.ids); }
    COMPACTER_DEVICE Parts v2() const { return parts_at(f.v_parts, f.part_stride, family.right_terms); }

    // Z of all slots.
    COMPACTER_DEVICE void contract_x(int adapter) const {
        const auto x = rows_of_x(static_cast<const T*>(f.x), ids(), family);
        const Images& images = f.places.images;
        const Slab& left = f.places.left;
        const unsigned char* from = image_of(family, images, adapter) + images.left;
        for_each_slab<false>(left, s.in, from, images.left_slab, [&](int first, int count, const Parts& factor) {
            const auto store = [&](int c, int token, int chunk, float low, float high) {
                if (family.folded.rows) folded.store_contracted(f.z, c, token, chunk, low, high);
                else middle.store_contracted(f.z, first, c, token, chunk, low, high);
            };
            constexpr int ahead = T::parts == 1 ? 2 : 1;  // as the registers allow
            contract_slab<T, ahead>(x, WarpShare(x.by_groups), factor, left.rows, first, count, store);
        });
    }

    // V2 of all slots, and the ones that pick the bias, which change from tile to tile if adapters are mixed.
    COMPACTER_DEVICE void to_v2() const {
        if (family.mixed) ones();
        if (family.folded.rows) {
            folded.to_h(f.z, f.h);
            __syncthreads();
            folded.back(f.h, f.places.folded.second, v2());
            return;
        }
        if (family.dense) {
            middle.for_each_quad(family.columns, [&](int c, int quad) {
                const int slot = s.by_m.quotient(c);
                Quad<4> v = load_quad<4>(middle.at(f.z, c, quad));
                const float bias = middle.factor(f.places.factors.bias, slot)[c - slot * s.m];
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    v.at[j] = activate(family.activation, v.at[j] + bias).value * middle.weight(slot, quad * 4 + j);
                store_parts<T>(v2(), c, quad * 4, v);
            });
            return;
        }
        using Place = typename FamilyMiddle<T::parts == 3>::Place;
        const auto store = [&](const Place& at, const Quad<4>& four) {
            middle.template store_rows<T>(v2(), at, family.n_out, scaled(four, middle.weight(at.slot, at.token)));
        };
        const SharedFactors& factors = f.places.factors;
        if (!s.inner) return middle.for_each_place([&](const Place& at) { store(at, middle.mix(factors.rule, f.z, at)); });
        middle.for_each_place([&](const Place& at) { store_quad<4>(middle.at(f.v, at), middle.mix(factors.rule, f.z, at)); });
        __syncthreads();
        middle.widen(f.v, [&](int row, int, int, int quad, Quad<4> y) {
#pragma unroll
            for (int j = 0; j < 4; ++j) y.at[j] = activate(family.activation, y.at[j]).value;
            store_quad<4>(middle.at(f.h, row, quad), y);
        });
        __syncthreads();
        middle.for_each_place([&](const Place& at) { store_quad<4>(middle.at(f.z, at), middle.reduce(factors.left2, f.h, at)); });
        __syncthreads();
        middle.for_each_place([&](const Place& at) { store(at, middle.mix(factors.rule2, f.z, at)); });
    }
    COMPACTER_DEVICE void ones() const {
        if (family.right_terms == family.columns) return;
        store_ones<T>(v2(), family.columns, family,
                      [&](int slot, int token) { return family.mixed ? middle.weight(slot, token) : 1.f; });
    }

    // The output; without an adapter, the residual.
    COMPACTER_DEVICE void expand(int adapter) const {
        const auto out = rows_of_out(static_cast<T*>(f.out), ids(), family);
        const auto residual = rows_of_out(static_cast<const T*>(f.residual), ids(), family);
        const int adapters = family.tiling.adapters;
        if (adapter >= adapters) return copy_tile<T>(s.out, residual, out, adapter > adapters);
        const Images& images = f.places.images;
        const Slab& right2 = f.places.right2;
        const unsigned char* from = image_of(family, images, adapter) + images.right2;
        for_each_slab<false>(right2, s.out, from, images.right2_slab, [&](int first, int count, const Parts& factor) {
            constexpr int parts = forward_right_parts<T>;
            if (out.whole()) expand_slab<true, T, parts>(v2(), right2.rows, factor, first, count, residual, out);
            else expand_slab<false, T, parts>(v2(), right2.rows, factor, first, count, residual, out);
        });
    }
};

template <class T>
__global__ void __launch_bounds__(256, blocks_of_forward(compiled_for)) forward(const FamilyForward f) {
    const Pass<T> pass{f};
    const Tiles tiles{f.family.tiling};
    clear(f.places.clear, f.places.clear_end);
    const Range its = tiles.of_block();
    const int& end = pass.ids()[f.family.tiling.tokens];  // in shared memory, as no register is left for it
    if (threadIdx.x == 0) pass.ids()[f.family.tiling.tokens] = its.end;
    __syncthreads();
    const auto prefetch = [&](int tile) {
        if (tile < end) prefetch_tile(tiles, tile, static_cast<const T*>(f.x), f.family.n_in * f.family.middle.in);
    };
    prefetch(its.begin);
    if (!f.family.mixed) pass.ones();
    int staged = -1;
    for (int at = its.begin; at < end; ++at) {
        const Tile tile = tiles.at(at);
        const bool computes = tile.adapter < f.family.tiling.adapters;
        __syncthreads();
        stage_tokens(pass.ids(), tiles, tile);
        if (computes && tile.adapter != staged) stage_image(f.family, f.places, tile.adapter);
        __syncthreads();
        prefetch(at + 1);
        if (computes) {
            stage_mix(floats_at(f.places.mix), pass.ids(), f.family);
            pass.contract_x(tile.adapter);
            __syncthreads();
            pass.to_v2();
            __syncthreads();
            staged = tile.adapter;
        }
        pass.expand(tile.adapter);
    }
}

}  // namespace

template <>
void family_forward_kernel<COMPACTER_ELEMENT>(const FamilyForward& f, const Launch& l) {
    launch(forward<COMPACTER_ELEMENT>, l, f);
}

}  // namespace compacter::cuda
