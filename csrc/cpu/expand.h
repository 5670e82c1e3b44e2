// From lanes to rows of tokens, the only write:   out[q,u] = residual[q,u] + bias[q,u] + sum_c V[q,c] t_c[u]
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

template <class T>
struct Expansion {
    int64_t n, m, chunk;
    const float *basis, *bias;  // t, [m][chunk]; bias [n * chunk] or null
    bool streaming;

    // Rows of `tokens` <= 16 tokens; residual may be null. Rows that are read here for the last time make room in the
    // caches: the rows `ahead` numbers behind them, of the next block, are fetched meanwhile (0: there are none).
    void operator()(const float* v, const T* residual, T* out, int64_t tokens, int64_t ahead) const {
        constexpr int R = 4;
        for (int64_t q = 0; q < n; ++q)
            tiles<R, 1>(0, tokens, [&](auto size, int64_t token) {
                const int64_t at = token * n * chunk + q * chunk;
                const float* coef = v + q * m * lanes + token;
                const auto run = [&](auto terms) {
                    const auto body = [&](auto vectors, int64_t u, auto cut, int64_t count) {
                        tile<decltype(size)::value, decltype(vectors)::value, decltype(terms)::value>(
                            coef, u, bias ? bias + q * chunk + u : nullptr, residual ? residual + at + u : nullptr,
                            out + at + u, ahead, cut, count);
                    };
                    if constexpr (many_registers)
                        columns<4, 2, 1>(chunk, body);
                    else
                        columns<2, 1>(chunk, body);
                };
                if (m == 4)
                    run(Int<4>{});
                else if (m == 8)
                    run(Int<8>{});
                else if (m == 12)
                    run(Int<12>{});
                else
                    run(Int<0>{});
            });
    }

private:
    // R tokens by U vectors; M: the number of terms where it is known at compile time, else 0.
    template <int R, int U, int M, bool Cut>
    COMPACTER_INLINE void tile(const float* coef, int64_t u, const float* bias_here, const T* residual, T* out,
                               int64_t ahead, std::bool_constant<Cut>, int64_t count) const {
        const int64_t row = n * chunk;
        const auto get = [&](auto p) { return Cut ? load(p, count) : load(p); };
        Vec sum[R][U];
#pragma GCC unroll 4
        for (int k = 0; k < U; ++k) {
            const Vec start = bias_here ? get(bias_here + k * W) : Vec{};
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][k] = start;
        }
        if (residual)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) {
                    sum[r][k] += get(residual + r * row + k * W);
                    if (ahead && (k * W * sizeof(T)) % 64 == 0) __builtin_prefetch(residual + ahead + r * row + k * W, 0, 2);
                }
        const float* t = basis + u;
        const int64_t terms = M ? M : m;
#pragma GCC unroll 12
        for (int64_t c = 0; c < terms; ++c, t += chunk, coef += lanes) {
            Vec value[U];
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) value[k] = get(t + k * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec weight = splat(coef[r]);
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[r][k] += weight * value[k];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) {
                T* to = out + r * row + k * W;
                if constexpr (Cut)
                    store(to, sum[r][k], count);
                else if (streaming)
                    stream(to, sum[r][k]);
                else
                    store(to, sum[r][k]);
            }
    }
};

// Whether every whole vector of every row of `out` is aligned, so that it may be streamed.
template <class T>
COMPACTER_INLINE bool can_stream(const T* out, int64_t chunk) {
    return reinterpret_cast<uintptr_t>(out) % (W * sizeof(T)) == 0 && chunk % W == 0;
}

}  // namespace compacter::COMPACTER_ISA
