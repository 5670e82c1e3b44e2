// The forward for what forward.cu does not serve. It reads x once and writes the output once. Each warp
// has a tile of 16 rows (48 for n = 12).
//
//     Z[p,i] = sum_u x[p,u] s1_i[u]           contract, with x from memory straight to registers
//     V[q,i] = sum_p A1_i[p,q] Z[p,i]         mix
//     h[q,v] = act(sum_i V[q,i] t1_i[v] + b1[q,v])
//     Z2[p,i] = sum_v h[p,v] s2_i[v]
//     V2[q,i] = sum_p A2_i[p,q] Z2[p,i]       mix
//     out[q,u] = residual[q,u] + sum_i V2[q,i] t2_i[u] + b2[q,u]         expand
//
// `scale` multiplies t2 and b2. The rows of b2 follow those of t2: they meet a 1 if c - m is q.
#include "activations.h"
#include "columns.h"
#include "bottleneck.h"
#include "stage.h"

namespace compacter::cuda {
namespace {

// Prefetches the first tile of a warp while the block stages the factors.
template <class T>
COMPACTER_DEVICE void prefetch_rows(const T* first, int64_t numbers) {
    for (int64_t at = threadIdx.x % 32 * (128 / sizeof(T)); at < numbers; at += 32 * (128 / sizeof(T))) prefetch(first + at);
}

template <class T, class K>
__global__ void __launch_bounds__(256, K::general ? 1 : 2) forward(const Forward f) {
    constexpr int Q = K::quad;
    const Sizes& s = f.sizes;
    const int n = K::n(s), m = K::m(s), terms = m + (f.factors.bias2.data ? n : 0), steps = eights(terms);
    const Warp warp;
    const int index = threadIdx.x / 32, warps = blockDim.x / 32, rows = s.rows();
    const int64_t all_rows = f.tokens * n, begin = (static_cast<int64_t>(blockIdx.x) * warps + index) * rows;
    prefetch_rows(static_cast<const T*>(f.x) + begin * s.in, (all_rows - begin < rows ? all_rows - begin : rows) * s.in);

    const Parts left = factor_parts(shared_memory() + f.left, s.in, m), right2 = factor_parts(shared_memory() + f.right2, s.out, terms);
    stage_factor<T>(left, s.in, m, 1.f, [&](int c, int u) { return ask_left(f.factors.left, s, s.in, c, u); });
    stage_factor<T>(right2, s.out, terms, f.factors.scale, [&](int c, int u) {
        return ask_right(c < m ? f.factors.right2 : f.factors.bias2, s.out, c < m ? c : c - m, u);
    });
    stage_factors(f.shared, f.factors, s);
    __syncthreads();

    unsigned char* scratch = shared_memory() + f.scratch + index * f.scratch_bytes;
    float *z = reinterpret_cast<float*>(scratch + f.z), *v = reinterpret_cast<float*>(scratch + f.v);
    float* h = reinterpret_cast<float*>(scratch + f.h);
    for (int64_t first = begin; first < all_rows; first += static_cast<int64_t>(gridDim.x) * warps * rows) {
        const int valid = all_rows - first < rows ? static_cast<int>(all_rows - first) : rows;
        const GlobalRows<T> x{static_cast<const T*>(f.x) + first * s.in, valid, s.in, s.in_vectors};
        for (int row = 0; row < rows; row += 16) contract<T, K>(x, row, left, 0, segments(s.in), s, z);
        warp.sync();
        mix<K>(warp, s, floats_at(f.shared.rule), z, [&](int token, int block, int c, const Quad<Q>& sum) {
            store_quad<Q>(v + (token * m + c) * n + block * Q, sum);
        });
        warp.sync();
        if (s.inner) {
            through_bottleneck<K>(warp, s, f.shared, f.factors.activation, z, v, h,
                                  [&](int token, int block, int c, const Quad<Q>& sum) {
                                      store_quad<Q>(v + (token * m + c) * n + block * Q, sum);
                                  });
            warp.sync();
        }

        T* out = static_cast<T*>(f.out) + first * s.out;
        const GlobalRows<T> residual{static_cast<const T*>(f.residual) + first * s.out, valid, s.out, s.out_vectors};
        for (int row = 0; row < rows; row += 16) {
            const auto number = [&](int at, int c) {
                const int token = K::by_n(s, at), q = at - token * n;
                return c < m ? v[(token * m + c) * n + q] : c < terms && c - m == q ? 1.f : 0.f;
            };
            const Operand<T, K::most_steps> operand(number, row, steps);
#pragma unroll(K::most_steps == 1 ? 2 : 1)
            for (int at = 0; at < segments(s.out); ++at) {
                if (f.residual)
                    expand(operand, steps, row, at, right2, terms, residual, out, valid, s.out, s.out_vectors);
                else
                    expand(operand, steps, row, at, right2, terms, NoRows{}, out, valid, s.out, s.out_vectors);
            }
        }
    }
}

}  // namespace

template <>
void forward_kernel<COMPACTER_ELEMENT>(const Forward& f, const Launch& l) {
    with_instance<known_forward<COMPACTER_ELEMENT>>(
        f.sizes, [&](auto known) { launch(forward<COMPACTER_ELEMENT, decltype(known)>, l, f); });
}

}  // namespace compacter::cuda
