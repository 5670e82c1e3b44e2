// The second kernel of a backward of the family: the gradients of the wide factors, as products over the rows of each
// adapter. It reads x and g once more. A block has some columns u of x or g, some numbers c, and a contiguous range of the
// tiles, of which one is copied while another is multiplied. Each warp has 16 u, whose sums stay in its registers.
//
//     ds_c[u] = sum_{row} x[row,u] dZ[row,c]    dt_c[u] = sum_{row} g[row,u] V2[row,c]    db2[q,u] = sum_tok w g[q,u]
#include "gradients.h"
#include "small.h"
#include "tile.h"

namespace compacter::cuda {
namespace {

constexpr int most_eights = most_terms_of_weights / 8;

// Copies columns `first` to `first` + width - 1 of the rows of a tile, in whole segments padded with zeros. A thread has the same
// eight columns of many rows.
template <class T>
COMPACTER_DEVICE void copy_columns(unsigned char* to, int stride, int count, const TileRows<const T>& rows, int first, int width) {
    const int eights = segments(width) * segment / 8, lane = threadIdx.x / eights, step = blockDim.x / eights;
    const int column = (threadIdx.x - lane * eights) * 8;
    if (lane >= step) return;
    to += column * static_cast<int>(sizeof(T));
    for (int row = lane; row < count; row += step) {
        const T* const from = rows.at(row);
        const int left = from ? rows.width - first - column : 0;
        unsigned char* at = to + row * stride;
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
    int of_left = w.wants_left ? w.slabs_in : 0, units = of_left + (w.wants_right ? w.slabs_out : 0);
    int program = blockIdx.x / units, unit = blockIdx.x - program * units;
    bool right = unit >= of_left;
    int n = right ? family.n_out : family.n_in, rows = right ? family.rows_out : family.rows_in;
    int all_u = right ? s.out : s.in, all_c = right ? family.right_terms : family.columns;
    int slabs_u = (all_u + w.slab - 1) / w.slab, at_c = (right ? unit - of_left : unit) / slabs_u;
    int first_u = ((right ? unit - of_left : unit) - at_c * slabs_u) * w.slab, width = min(w.slab, all_u - first_u);
    int most_c = right ? w.right_terms : w.left_terms, first_c = at_c * most_c, terms = min(most_c, all_c - first_c);
    int kept = max(min(family.columns - first_c, terms), 0);  // of these numbers c, the others are rows of the bias
    int u = threadIdx.x / 32 * 16;                             // of the warp, in the columns of the block
    float sum[most_eights][4] = {};

    COMPACTER_DEVICE int* ids(int stage) const { return reinterpret_cast<int*>(shared_memory() + w.ids + stage * w.stage_bytes); }
    COMPACTER_DEVICE Parts parts(int stage) const {
        return parts_at(w.parts + stage * w.stage_bytes, w.part_stride, most_c);
    }

    // Starts to copy the rows of a tile, whose tokens are there, and what the first kernel has kept of it.
    COMPACTER_DEVICE void load(int tile, int stage) const {
        const auto x = right ? rows_of_out(static_cast<const T*>(w.grad_out), ids(stage), family)
                             : rows_of_x(static_cast<const T*>(w.x), ids(stage), family);
        copy_columns<T>(shared_memory() + w.rows + stage * w.stage_bytes, w.row_stride, rows, x, first_u, width);
        const Kept& from = right ? w.v2 : w.dz;
        const Parts to = parts(stage);
        const uint16_t* const numbers = from.first + tile * from.tile + first_c * from.stride;
#pragma unroll
        for (int part = 0; part < T::factor_parts; ++part)
            for (int e = threadIdx.x * 8; e < kept * from.stride; e += blockDim.x * 8)
                copy_async(to.first + part * to.part + e, numbers + part * from.part + e, true);
        if (family.mixed) ones(stage);
    }

    // The numbers c of this block that pick the bias.
    COMPACTER_DEVICE void ones(int stage) const {
        if (kept == terms) return;
        const Parts to = parts(stage);
        const int* tokens = ids(stage);
        const int before = first_c - family.columns;  // rows of the bias that other blocks have
        for (int e = threadIdx.x; e < s.tokens * family.slots; e += blockDim.x) {
            const int slot = e / s.tokens, token = e - slot * s.tokens;
            const float weight = weight_of(family, slot, tokens[token]);
            for (int q = 0, c = slot * n - before; q < n; ++q, ++c)
                if (c >= 0 && c < terms) store_parts<T>(to, c, token * n + q, weight);
        }
    }

    COMPACTER_DEVICE void add(int stage) {
        if (u >= width) return;
        const Lane lane;
        const Parts right_operand = parts(stage);
        const SharedRows<T> x{shared_memory() + w.rows + stage * w.stage_bytes, w.row_stride};
        const int columns = eights(terms), matrix = lane.index / 8;
        const uint16_t* from = right_operand.first + (matrix / 2 * 8 + lane.index % 8) * right_operand.stride + matrix % 2 * 8;
        float added[most_eights][4] = {};
        for (int row = 0; row < rows; row += 16) {
            uint32_t a[T::parts][4];
            load_transposed(a, x, row, u, lane);
#pragma unroll
            for (int j = 0; j < most_eights; j += 2) {
                if (j >= columns) break;
#pragma unroll
                for (int part = 0; part < T::factor_parts; ++part) {
                    uint32_t f[4];
                    load_matrices(f, from + part * right_operand.part + j * 8 * right_operand.stride + row);
#pragma unroll
                    for (int of_x = 0; of_x < T::parts; ++of_x) {
                        if (!counts<T::parts, T::factor_parts>(of_x, part)) continue;
                        mma_16x8x16(added[j], a[of_x], {f[0], f[1]});
                        mma_16x8x16(added[j + 1], a[of_x], {f[2], f[3]});
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < most_eights; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] += added[j][e];
    }

    // Writes the sums, each in the order of its tensor: left, then right2, then bias2. The next ones begin with 0.
    COMPACTER_DEVICE void store(int adapter) {
        const Lane lane;
        const int left_size = s.m * s.in, right_size = s.m * s.out;
#pragma unroll
        for (int j = 0; j < most_eights; ++j)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int of_block = j * 8 + lane.t * 2 + odd, c = first_c + of_block;
                if (of_block >= terms || u >= width) continue;
                const bool bias = c >= family.columns;
                const int slot = bias ? family.by_n_out.quotient(c - family.columns) : s.by_m.quotient(c);
                const int of_slot = bias ? c - family.columns - slot * family.n_out : c - slot * s.m;
                const int i = bias ? of_slot : family.by_rank.quotient(of_slot), rho = bias ? 0 : of_slot - i * s.rank;
                const Factor& factor = bias ? family.bias2 : right ? family.right2 : family.left;
                float* to = w.partials.of(family, program, family.mixed ? slot : adapter);
                to += (right ? left_size : 0) + (bias ? right_size : 0);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = u + lane.g + half * 8;
                    if (at >= width) continue;
                    to[factor.at(0, i, rho, first_u + at)] = sum[j][half * 2 + odd] * (right ? family.scale : 1.f);
                }
            }
#pragma unroll
        for (int j = 0; j < most_eights; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = 0.f;
    }
};

template <class T>
__global__ void __launch_bounds__(256, 2) weights(const FamilyWeights w) {
    Pass<T> pass{w};
    const Tiles tiles{w.family.tiling};
    const int share = tiles.share(w.partials.programs), begin = pass.program * share;
    const int end = min(begin + share, tiles.with_adapter());
    for (int stage = 0; stage < 2; ++stage) {
        const int parts = w.parts + stage * w.stage_bytes;
        clear(parts, parts + w.parts_bytes);
    }
    __syncthreads();
    const auto load = [&](int at, int stage) {
        if (at < end) {
            stage_tokens(pass.ids(stage), tiles, tiles.at(at));
            __syncthreads();
            pass.load(at, stage);
        }
        commit_copies();
    };
    if (!w.family.mixed)
        for (int stage = 0; stage < 2; ++stage) pass.ones(stage);
    load(begin, 0);
    int staged = -1;
    for (int at = begin, stage = 0; at < end; ++at, stage ^= 1) {
        load(at + 1, stage ^ 1);
        const int adapter = tiles.at(at).adapter;
        if (staged >= 0 && adapter != staged) pass.store(staged);
        staged = adapter;
        wait_copies<1>();
        __syncthreads();
        pass.add(stage);
        __syncthreads();
    }
    let_next_kernel_start();
    if (staged >= 0) pass.store(staged);
}

}  // namespace

template <>
void family_weights_kernel<COMPACTER_ELEMENT>(const FamilyWeights& w, const Launch& l) {
    launch(weights<COMPACTER_ELEMENT>, l, w);
}

}  // namespace compacter::cuda
