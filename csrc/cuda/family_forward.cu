// The forward of the family. A block has a contiguous range of the tiles, and so few adapters. It reads x once and writes
// the output once. A row without an adapter gets its residual, and one whose number is out of range NaN.
//
//     Z[p,c] = sum_u x[p,u] s_c[u]                                     contract_slab
//     V2 = middle(Z), times the row's weight if adapters are mixed      mix, through_bottleneck, or act(Z + b1)
//     out[q,u] = residual[q,u] + sum_c V2[q,c] t_c[u] + b2[q,u]        expand_slab
#include "small.h"

namespace compacter::cuda {
namespace {

template <class T>
struct Pass {
    static constexpr int Q = Padded::quad;
    const FamilyForward& f;
    const Family& family = f.family;
    const Sizes& s = f.family.middle;
    Block block{};
    int* ids = reinterpret_cast<int*>(shared_memory() + f.places.ids);
    float* weights = floats_at(f.places.mix);
    Parts v2 = parts_at(f.v_parts, f.part_stride, f.family.right_terms);

    // Z of all slots.
    COMPACTER_DEVICE void contract_x(int adapter, bool staged) const {
        const auto x = rows_of_x(static_cast<const T*>(f.x), ids, family);
        const Images& images = f.places.images;
        const unsigned char* from = image_of(family, images, adapter) + images.left;
        for_each_slab(f.places.left, s.in, from, images.left_slab, staged, [&](int first, int count, const Parts& factor) {
            contract_slab<T>(x, family.rows_in, factor, family.columns, first, count, [&](int row, int c) {
                const int token = family.by_n_in.quotient(row), slot = s.by_m.quotient(c);
                return f.z / 4 + ((slot * s.tokens + token) * s.m + c - slot * s.m) * s.n + row - token * family.n_in;
            });
        });
    }

    // V2 of all slots, and the ones that pick the bias.
    COMPACTER_DEVICE void middle() const {
        for (int slot = 0; slot < family.slots; ++slot) {
            const SharedFactors at = of_slot(f.places.factors, slot * f.places.factors_bytes);
            float *z = floats_at(f.z) + slot * family.numbers(), *v = floats_at(f.v);
            const auto store = [&](int token, int c, int q, float value) {
                store_parts<T>(v2, slot * s.m + c, token * family.n_out + q, value * weights[token * family.slots + slot]);
            };
            if (family.dense) {
                for (int e = block.rank; e < s.tokens * s.m; e += block.size) {
                    const int token = s.by_m.quotient(e), c = e - token * s.m;
                    store(token, c, 0, activate(family.activation, z[e] + floats_at(at.bias)[c]).value);
                }
                continue;
            }
            const auto store_four = [&](int token, int of_q, int c, const Quad<Q>& four) {
#pragma unroll
                for (int j = 0; j < Q; ++j)
                    if (of_q * Q + j < family.n_out) store(token, c, of_q * Q + j, four.at[j]);
            };
            if (!s.inner) {
                mix<Padded>(block, s, floats_at(at.rule), z, store_four);
                continue;
            }
            mix<Padded>(block, s, floats_at(at.rule), z, [&](int token, int of_q, int c, const Quad<Q>& four) {
                store_quad<Q>(v + (token * s.m + c) * s.n + of_q * Q, four);
            });
            block.sync();
            through_bottleneck<Padded>(block, s, at, family.activation, z, v, floats_at(f.h), store_four);
            block.sync();
        }
        const int rows = s.tokens * family.n_out;
        for (int e = block.rank; e < rows * (family.right_terms - family.columns); e += block.size) {
            const int c = e / rows, row = e - c * rows, slot = family.by_n_out.quotient(c), token = family.by_n_out.quotient(row);
            const bool picked = c - slot * family.n_out == row - token * family.n_out;
            store_parts<T>(v2, family.columns + c, row, picked ? weights[token * family.slots + slot] : 0.f);
        }
        block.sync();
    }

    // The output; without an adapter, the residual.
    COMPACTER_DEVICE void expand(const Tile& tile, bool staged) const {
        const auto out = rows_of_out(static_cast<T*>(f.out), ids, family);
        const bool computes = tile.adapter < family.tiling.adapters, poison = tile.adapter > family.tiling.adapters;
        const auto residual = rows_of_out(static_cast<const T*>(f.residual), ids, family);
        const auto slab = [&](int first, int count, const Parts& factor) {
            expand_slab<T, forward_right_parts<T>>(v2, family.rows_out, computes ? family.right_terms : 0, factor, first, count, residual, out, poison);
        };
        if (!computes) return slab(0, segments(s.out), Parts{});
        const Images& images = f.places.images;
        const unsigned char* from = image_of(family, images, tile.adapter) + images.right2;
        for_each_slab(f.places.right2, s.out, from, images.right2_slab, staged, slab);
    }
};

template <class T>
__global__ void __launch_bounds__(256, 1) forward(const FamilyForward f) {
    const Pass<T> pass{f};
    const Tiles tiles{f.family.tiling};
    clear(f.places.clear, f.places.clear_end);
    const int share = tiles.share(gridDim.x), begin = blockIdx.x * share, all = tiles.count();
    const auto prefetch = [&](int tile) {
        if (tile < begin + share) prefetch_tile(tiles, tile, static_cast<const T*>(f.x), f.family.n_in * f.family.middle.in);
    };
    prefetch(begin);
    int staged = -1;
    for (int at = begin; at < begin + share && at < all; ++at) {
        const Tile tile = tiles.at(at);
        const bool computes = tile.adapter < f.family.tiling.adapters, same = tile.adapter == staged;
        __syncthreads();
        stage_tokens(pass.ids, tiles, tile);
        if (computes && !same) stage_small(f.family, f.places, tile.adapter);
        __syncthreads();
        prefetch(at + 1);
        if (computes) {
            stage_mix(pass.weights, pass.ids, f.family);
            pass.contract_x(tile.adapter, same);
            __syncthreads();
            pass.middle();
            staged = tile.adapter;
        }
        pass.expand(tile, same);
    }
}

}  // namespace

template <>
void family_forward_kernel<COMPACTER_ELEMENT>(const FamilyForward& f, const Launch& l) {
    launch(forward<COMPACTER_ELEMENT>, l, f);
}

}  // namespace compacter::cuda
