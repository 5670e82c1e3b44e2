// The gradients of the wide factors:
//     G_c[u] += sum_{token,q} V[q,c] g[q,u]        bias[q,u] += sum_token g[q,u]
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

template <class T>
struct WeightGradient {
    int64_t n, m, chunk;
    float *sum, *bias_sum;  // [m][chunk]; [n * chunk] or null

    // Sums start at 0 in every block: two levels of summation reduce the error of long sums.
    void operator()(const float* v, const T* g, int64_t tokens, const T* next) const {
        // A tile of few rows is wider in u, so that each coefficient serves several vectors.
        tiles<largest, 4, 1>(0, m, [&](auto rows, int64_t first) COMPACTER_INLINE_LAMBDA {
            constexpr int C = decltype(rows)::value;
            constexpr int widest = C <= 4 && many_registers ? 4 : 2;
            columns<widest, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) COMPACTER_INLINE_LAMBDA {
                constexpr int U = decltype(vectors)::value;
                if (first == 0 && bias_sum)
                    tile<C, U, true>(v, g, tokens, next, first, u, cut, count);
                else
                    tile<C, U, false>(v, g, tokens, first ? nullptr : next, first, u, cut, count);
            });
        });
    }

private:
    static constexpr int largest = many_registers ? 8 : 4;

    template <int C, int U, bool WithBias, bool Cut>
    COMPACTER_INLINE void tile(const float* v, const T* g, int64_t tokens, const T* next, int64_t first, int64_t u,
                               std::bool_constant<Cut>, int64_t count) const {
        const int64_t row = n * chunk;
        const auto get = [&](auto p) COMPACTER_INLINE_LAMBDA { return Cut ? load(p, count) : load(p); };
        const auto add = [&](float* p, Vec value) COMPACTER_INLINE_LAMBDA {
            if constexpr (Cut)
                store(p, load(p, count) + value, count);
            else
                store(p, load(p) + value);
        };
        Vec total[C][U] = {};
        for (int64_t q = 0; q < n; ++q) {
            const float* coef = v + (q * m + first) * lanes;
            const T* source = g + q * chunk + u;
            Vec bias_total[U] = {};
            for (int64_t token = 0; token < tokens; ++token, ++coef, source += row) {
                Vec value[U];
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) {
                    if (next && k % vectors_per_line<T> == 0) __builtin_prefetch(source + (next - g) + k * W, 0, 2);
                    value[k] = get(source + k * W);
                    if constexpr (WithBias) bias_total[k] += value[k];
                }
#pragma GCC unroll 12
                for (int j = 0; j < C; ++j) {
                    const Vec weight = splat(coef[j * lanes]);
#pragma GCC unroll 4
                    for (int k = 0; k < U; ++k) total[j][k] += weight * value[k];
                }
            }
            if constexpr (WithBias)
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) add(bias_sum + q * chunk + u + k * W, bias_total[k]);
        }
#pragma GCC unroll 12
        for (int j = 0; j < C; ++j)
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) add(sum + (first + j) * chunk + u + k * W, total[j][k]);
    }
};

}  // namespace compacter::COMPACTER_ISA
