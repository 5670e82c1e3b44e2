// The second kernel of a backward of the family: the gradients of the wide factors, as products over the rows of each
// adapter. It reads x and g once more. A block has some columns of x or g, and a contiguous range of the tiles.
//
//     ds_c[u] = sum_{row} x[row,u] dZ[row,c]    dt_c[u] = sum_{row} g[row,u] V2[row,c]    db2[q,u] = sum_tok w g[q,u]
#include "gradients.h"
#include "small.h"
#include "tile.h"

namespace compacter::cuda {
namespace {

// Copies columns `first` to `first` + width - 1 of the rows of a tile, whole segments padded with zeros.
template <class T>
COMPACTER_DEVICE void copy_columns(unsigned char* to, int stride, int count, const TileRows<const T>& rows, int first, int width) {
    const int eights = segments(width) * segment / 8;
    for (int e = threadIdx.x; e < count * eights; e += blockDim.x) {
        const int row = e / eights, column = (e - row * eights) * 8;
        const T* const from = rows.at(row);
        const int left = from ? rows.width - first - column : 0;
        unsigned char* at = to + row * stride + column * static_cast<int>(sizeof(T));
        if (rows.vectors) {
#pragma unroll
            for (int v = 0; v < Eight<T>::vectors; ++v)
                copy_async(at + 16 * v, left > 0 ? reinterpret_cast<const uint4*>(from + first + column) + v : nullptr, left > 0);
        } else {
            const Eight<T> numbers = load_eight(from ? from + first + column : rows.all, left, false);
#pragma unroll
            for (int v = 0; v < Eight<T>::vectors; ++v) reinterpret_cast<uint4*>(at)[v] = numbers.raw[v];
        }
    }
}

template <class T>
struct Pass {
    const FamilyWeights& w;
    const Family& family = w.family;
    const Sizes& s = w.family.middle;
    int slabs_left = w.wants_left ? w.slabs_in : 0;
    int unit = blockIdx.x % (slabs_left + (w.wants_right ? w.slabs_out : 0));
    int program = blockIdx.x / (slabs_left + (w.wants_right ? w.slabs_out : 0));
    bool right = unit >= slabs_left;
    int n = right ? family.n_out : family.n_in, rows = right ? family.rows_out : family.rows_in;
    int terms = right ? family.right_terms : family.columns, all = right ? s.out : s.in;
    int first = (right ? unit - slabs_left : unit) * w.slab, width = all - first < w.slab ? all - first : w.slab;
    int* ids = reinterpret_cast<int*>(shared_memory() + w.ids);
    float* weights = floats_at(w.mix);
    Parts parts = parts_at(w.parts, w.part_stride, terms);

    // V2 with the ones that pick the bias, or dZ.
    COMPACTER_DEVICE void load_numbers(const Tile& tile) const {
        const float* from = (right ? w.v2 : w.dz) + int64_t{tile.first} * n * family.columns;
        for (int e = threadIdx.x; e < rows * terms; e += blockDim.x) {
            const int row = e / terms, c = e - row * terms;
            float value = 0.f;
            if (row < tile.count * n) {
                if (c < family.columns) {
                    value = from[int64_t{row} * family.columns + c];
                } else {
                    const int token = row / n, slot = (c - family.columns) / n;
                    value = c - family.columns - slot * n == row - token * n ? weights[token * family.slots + slot] : 0.f;
                }
            }
            store_parts<T>(parts, c, row, value);
        }
    }

    COMPACTER_DEVICE void add(const Tile& tile) const {
        const auto x = right ? rows_of_out(static_cast<const T*>(w.grad_out), ids, family)
                             : rows_of_x(static_cast<const T*>(w.x), ids, family);
        unsigned char* to = shared_memory() + w.rows;
        copy_columns<T>(to, w.row_stride, rows, x, first, width);
        commit_copies();
        load_numbers(tile);
        wait_copies<0>();
        __syncthreads();
        for (int job = threadIdx.x / 32; job < (width + 15) / 16; job += blockDim.x / 32)
            add_gradient<T, 10>(SharedRows<T>{to, w.row_stride}, job * 16, rows, parts,
                                vectors_at(w.sums) + job * sum_vectors(terms), terms);
    }

    COMPACTER_DEVICE void clear_sums() const { clear(w.sums, w.sums + (width + 15) / 16 * sum_vectors(terms) * 16); }

    // Writes the sums, each in the order of its tensor: left, then right2, then bias2.
    COMPACTER_DEVICE void store(int adapter) const {
        const int of_left = s.m * s.in, of_right = s.m * s.out;
        for_each_sum(vectors_at(w.sums), width, terms, [&](int column, int c, float sum) {
            const int u = first + column;
            if (c >= family.columns) {
                const int row = c - family.columns, slot = family.by_n_out.quotient(row), q = row - slot * family.n_out;
                float* to = w.partials.of(family, program, family.mixed ? slot : adapter) + of_left + of_right;
                to[family.bias2.at(0, q, 0, u)] = sum * family.scale;
                return;
            }
            const int slot = s.by_m.quotient(c), of_slot = c - slot * s.m, i = of_slot / s.rank, rho = of_slot - i * s.rank;
            float* to = w.partials.of(family, program, family.mixed ? slot : adapter);
            if (right) to[of_left + family.right2.at(0, i, rho, u)] = sum * family.scale;
            else to[family.left.at(0, i, rho, u)] = sum;
        });
    }
};

template <class T>
__global__ void __launch_bounds__(256, 2) weights(const FamilyWeights w) {
    const Pass<T> pass{w};
    const Tiles tiles{w.family.tiling};
    const int share = tiles.share(w.partials.programs), begin = pass.program * share, all = tiles.count();
    int staged = -1;
    for (int at = begin; at < begin + share && at < all; ++at) {
        const Tile tile = tiles.at(at);
        if (tile.adapter >= w.family.tiling.adapters) continue;
        __syncthreads();
        if (tile.adapter != staged) {
            if (staged >= 0) {
                pass.store(staged);
                __syncthreads();
            }
            pass.clear_sums();
            staged = tile.adapter;
        }
        stage_tokens(pass.ids, tiles, tile);
        __syncthreads();
        stage_mix(pass.weights, pass.ids, w.family);
        __syncthreads();
        pass.add(tile);
    }
    let_next_kernel_start();
    if (staged < 0) return;
    __syncthreads();
    pass.store(staged);
}

}  // namespace

template <>
void family_weights_kernel<COMPACTER_ELEMENT>(const FamilyWeights& w, const Launch& l) {
    launch(weights<COMPACTER_ELEMENT>, l, w);
}

}  // namespace compacter::cuda
