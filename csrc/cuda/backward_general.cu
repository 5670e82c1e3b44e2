// Backward reads x and g once, into shared memory, writes dx once and recomputes the rest.
//   Z[p,i]   = sum_u x[p,u] s1_i[u]         dV2[q,i] = sum_u g[q,u] t2_i[u]         contract
//   V, h, Z2, V2 as forward
//   dZ2[p,i] = sum_q A2_i[p,q] dV2[q,i]     dA2_i[p,q] = sum_tok Z2[p,i] dV2[q,i]   mix_back
//   dh[p,v]  = sum_i s2_i[v] dZ2[p,i]       ds2_i[v] = sum_{tok,p} h[p,v] dZ2[p,i]
//   dy       = dh act'(y)                   db1 = sum_tok dy
//   dV[q,i]  = sum_v dy[q,v] t1_i[v]        dt1_i[v] = sum_{tok,q} V[q,i] dy[q,v]
//   dZ[p,i]  = sum_q A1_i[p,q] dV[q,i]      dA1_i[p,q] = sum_tok Z[p,i] dV[q,i]     mix_back
//   dx[p,u]  = sum_i s1_i[u] dZ[p,i] (+ g)                                          expand
//   ds1_i[u] = sum_{tok,p} x[p,u] dZ[p,i]   db2[q,u] = sum_tok g[q,u]               add_gradient
//   dt2_i[u] = sum_{tok,q} V2[q,i] g[q,u]                                           add_gradient
// One projection has dV2 = dV and V2 = V. Each block sums weight gradients over its tiles into one
// row of partials, which reduce.cu adds. `scale` multiplies t2, and at the end dt2 and db2.
#include "bottleneck.h"
#include "gradients.h"
#include "stage.h"
#include "tile.h"

namespace compacter::cuda {
namespace {

// Stores the numbers of a quad as parts, [part][c][row].
template <class T, class K>
struct ToParts {
    uint16_t* first;
    int stride, part, n;

    COMPACTER_DEVICE void operator()(int token, int block, int c, const Quad<K::quad>& v) const {
#pragma unroll
        for (int j = 0; j < K::quad; ++j) {
            uint32_t pair[T::factor_parts];
            split(v.at[j], 0.f, pair);
            uint16_t* to = first + c * stride + token * n + block * K::quad + j;
#pragma unroll
            for (int of = 0; of < T::factor_parts; ++of) to[of * part] = static_cast<uint16_t>(pair[of]);
        }
    }
};

template <class T, class K>
struct Pass {
    const Backward& b;
    const Sizes& s;
    Block block;
    Between<K> between;
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int n, m, columns, right_terms, right_columns;
    Parts left, right2;

    COMPACTER_DEVICE explicit Pass(const Backward& b)
        : b(b), s(b.sizes), between{s, b.shared, b.sums, b.numbers, b.factors.activation}, n(K::n(s)), m(K::m(s)), columns(eights(m)), right_terms(m + (b.has_bias2 ? n : 0)),
          right_columns(eights(right_terms)), left(factor_parts(shared_memory() + b.left_factor, s.in, m)),
          right2(factor_parts(shared_memory() + b.right2_factor, s.out, m)) {}

    COMPACTER_DEVICE Parts parts(int offset, int groups) const {
        return {reinterpret_cast<uint16_t*>(shared_memory() + offset), b.part_stride, groups * 8 * b.part_stride};
    }
    COMPACTER_DEVICE uint4* sums_of(int offset, int job, int terms) const { return vectors_at(offset) + job * sum_vectors(terms); }
    COMPACTER_DEVICE ToParts<T, K> to_parts(int offset, int groups) const {
        return {reinterpret_cast<uint16_t*>(shared_memory() + offset), b.part_stride, groups * 8 * b.part_stride, n};
    }

    // Stages the factors, clears sums and parts, and sets the ones that pick the bias.
    COMPACTER_DEVICE void prepare() const {
        const Factors& f = b.factors;
        stage_factor<T>(left, s.in, m, 1.f, [&](int c, int u) { return ask_left(f.left, s, s.in, c, u); });
        stage_factor<T>(right2, s.out, m, f.scale, [&](int c, int u) { return ask_right(f.right2, s.out, c, u); });
        stage_factors(b.shared, f, s);
        const auto clear = [](int from, int to) {
            for (int e = from / 16 + threadIdx.x; e < to / 16; e += blockDim.x) vectors_at(0)[e] = make_uint4(0, 0, 0, 0);
        };
        clear(b.left_sums, b.tile);
        clear(b.v_parts, b.dz_parts + T::factor_parts * columns * 8 * b.part_stride * 2);
        block.sync();
        const ToParts<T, K> ones = to_parts(b.v_parts, right_columns);
        if (b.has_bias2)
            for (int row = threadIdx.x; row < s.rows(); row += blockDim.x)
                ones.first[(m + row % n) * ones.stride + row] = static_cast<uint16_t>(pack_bf16(1.f, 0.f));
    }

    COMPACTER_DEVICE void load(int64_t tile, int stage) const {
        const int64_t first = tile * s.rows(), remaining = b.tokens * n - first;
        const int valid = remaining < s.rows() ? static_cast<int>(remaining) : s.rows();
        unsigned char* to = shared_memory() + b.tile + stage * b.tile_bytes;
        copy_rows(to, b.x_stride, s.rows(), static_cast<const T*>(b.x) + first * s.in, valid, s.in, s.in_vectors);
        copy_rows(to + s.rows() * b.x_stride, b.g_stride, s.rows(), static_cast<const T*>(b.grad_out) + first * s.out, valid,
                  s.out, s.out_vectors);
    }

    // Z and dV2. Each warp computes 16 rows of a share of the columns.
    COMPACTER_DEVICE void contract_both(const SharedRows<T>& x, const SharedRows<T>& g) const {
        float *z = floats_at(b.numbers.z), *dv2 = floats_at(b.numbers.dv2);
        const int groups = s.rows() / 16;
        for (int job = warp; job < 2 * groups * b.splits; job += warps) {
            const int split = job % b.splits, row = job / b.splits % groups * 16;
            const bool of_g = job / b.splits >= groups;
            const int all = segments(of_g ? s.out : s.in);
            const SharedRows<T> rows{of_g ? g.first : x.first, of_g ? g.stride : x.stride};
            const Parts factor{of_g ? right2.first : left.first, of_g ? right2.stride : left.stride, of_g ? right2.part : left.part};
            contract<T, K>(rows, row, factor, all * split / b.splits,
                           all * (split + 1) / b.splits, s, (of_g ? dv2 : z) + split * s.numbers());
        }
        block.sync();
        if (b.splits == 1) return;
        for (int e = block.rank; e < s.numbers(); e += block.size)
            for (int split = 1; split < b.splits; ++split) {
                z[e] += z[split * s.numbers() + e];
                dv2[e] += dv2[split * s.numbers() + e];
            }
        block.sync();
    }

    // From Z and dV2 to V2 and dZ, with the gradients of the parameters between them.
    COMPACTER_DEVICE void middle() const {
        between.back(to_parts(b.v_parts, right_columns), to_parts(b.dz_parts, columns));
    }

    COMPACTER_DEVICE void wide_gradients(const SharedRows<T>& x, const SharedRows<T>& g) const {
        const int of_x = (s.in + 15) / 16, of_g = (s.out + 15) / 16;
        for (int job = warp; job < of_x + of_g; job += warps)
            if (job < of_x)
                add_gradient<T, K::most_columns>(x, job * 16, s.rows(), parts(b.dz_parts, columns),
                                                 sums_of(b.left_sums, job, m), m);
            else
                add_gradient<T, K::most_steps>(g, (job - of_x) * 16, s.rows(), parts(b.v_parts, right_columns),
                                               sums_of(b.right_sums, job - of_x, right_terms), right_terms);
    }

    COMPACTER_DEVICE void gradient_of_x(const SharedRows<T>& g, int64_t tile) const {
        if (!b.grad_x) return;
        const int64_t first = tile * s.rows(), remaining = b.tokens * n - first;
        const int valid = remaining < s.rows() ? static_cast<int>(remaining) : s.rows();
        T* out = static_cast<T*>(b.grad_x) + first * s.in;
        const Parts dz = parts(b.dz_parts, columns);
        const int per_row = segments(s.in);
        for (int job = warp; job < s.rows() / 16 * per_row; job += warps) {
            const int row = job / per_row * 16, at = job % per_row;
            const Operand<T, K::most_columns> operand(dz, row, columns);
            if (b.residual_is_x)
                expand(operand, columns, row, at, left, m, g, out, valid, s.in, s.in_vectors);
            else
                expand(operand, columns, row, at, left, m, NoRows{}, out, valid, s.in, s.in_vectors);
        }
    }

    // Writes the block's row of partials, each gradient in the layout of its parameter.
    COMPACTER_DEVICE void store() const {
        float* row = b.partials + blockIdx.x * b.row;
        const auto store_rule = [&](int to, int from) {
            for (int e = threadIdx.x; e < n * n * n; e += blockDim.x)
                row[to + e] = floats_at(from)[e / (n * n) * s.rule_stride + e % (n * n)];
        };
        store_rule(b.rule, b.sums.rule);
        for_each_sum(vectors_at(b.left_sums), s.in, m, [&](int u, int c, float sum) {
            row[b.left + (c / s.rank * s.in + u) * s.rank + c % s.rank] = sum;
        });
        for_each_sum(vectors_at(b.right_sums), s.out, right_terms, [&](int u, int c, float sum) {
            if (c < m)
                row[b.right2 + c * s.out + u] = sum * b.factors.scale;
            else
                row[b.bias2 + (c - m) * s.out + u] = sum * b.factors.scale;
        });
        if (!s.inner) return;
        store_rule(b.rule2, b.sums.rule2);
        for (int e = threadIdx.x; e < m * s.inner; e += blockDim.x) {
            const int c = s.by_inner.quotient(e), at = e - c * s.inner;
            row[b.right + e] = floats_at(b.sums.right)[e];
            row[b.left2 + (c / s.rank * s.inner + at) * s.rank + c % s.rank] = floats_at(b.sums.left2)[e];
        }
        if (!b.factors.bias.data) return;
        for (int e = threadIdx.x; e < n * s.inner; e += blockDim.x) {
            const int q = s.by_inner.quotient(e), at = e - q * s.inner;
            row[b.bias + e] = floats_at(b.sums.bias)[at * n + q];
        }
    }
};

template <class T, class K>
__global__ void __launch_bounds__(256, K::general ? 1 : 2) backward(const Backward b) {
    const Pass<T, K> pass(b);
    const Sizes& s = b.sizes;
    const int64_t tiles = (b.tokens + s.tokens - 1) / s.tokens;
    int stage = 0;
    pass.load(blockIdx.x, 0);
    commit_copies();
    pass.prepare();
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t next = tile + gridDim.x;
        if (b.stages == 2) {
            if (next < tiles) pass.load(next, stage ^ 1);
            commit_copies();
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const unsigned char* rows = shared_memory() + b.tile + stage * b.tile_bytes;
        const SharedRows<T> x{rows, b.x_stride}, g{rows + s.rows() * b.x_stride, b.g_stride};
        pass.contract_both(x, g);
        pass.middle();
        pass.wide_gradients(x, g);
        pass.gradient_of_x(g, tile);
        __syncthreads();
        if (b.stages == 2) {
            stage ^= 1;
        } else if (next < tiles) {
            pass.load(next, 0);
            commit_copies();
        }
    }
    let_next_kernel_start();
    pass.store();
}

}  // namespace

template <>
void backward_kernel<COMPACTER_ELEMENT>(const Backward& b, const Launch& l) {
    with_instance(b.sizes, [&](auto known) { launch(backward<COMPACTER_ELEMENT, decltype(known)>, l, b); });
}

}  // namespace compacter::cuda
