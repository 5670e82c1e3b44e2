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

    // Rows of `tokens` <= 16 tokens; residual may be null. `next`: rows of the
    // next block, which are fetched meanwhile, as is the room for its output; may be null.
    void operator()(const float* v, const T* residual, T* out, int64_t tokens, const T* next) const {
        if (m == 4)
            blocks<4>(v, residual, out, tokens, next);
        else if (m == 8)
            blocks<8>(v, residual, out, tokens, next);
        else if (m == 12)
            blocks<12>(v, residual, out, tokens, next);
        else
            blocks<0>(v, residual, out, tokens, next);
    }

private:
    // M: the number of terms where it is known at compile time, else 0.
    template <int M>
    void blocks(const float* v, const T* residual, T* out, int64_t tokens, const T* next) const {
        for (int64_t q = 0; q < n; ++q)
            tiles<4, 1>(0, tokens, [&](auto size, int64_t token) COMPACTER_INLINE_LAMBDA {
                const int64_t at = token * n * chunk + q * chunk;
                rows<decltype(size)::value, M>(v + q * m * lanes + token, bias ? bias + q * chunk : nullptr,
                                               residual ? residual + at : nullptr, out + at, next ? next + at : nullptr);
            });
    }

    // One chunk of R tokens.
    template <int R, int M>
    __attribute__((noinline)) void rows(const float* coef, const float* bias_here, const T* residual, T* out,
                                        const T* next) const {
        Tokens<R> tokens;
        for (int r = 0; r < R; ++r) {
            tokens.residual[r] = residual ? residual + r * n * chunk : nullptr;
            tokens.out[r] = out + r * n * chunk;
            tokens.next[r] = next ? next + r * n * chunk : nullptr;
        }
        constexpr int widest = many_registers ? 4 : 2;
        columns<widest, 2, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) COMPACTER_INLINE_LAMBDA {
            tile<R, decltype(vectors)::value, M>(coef, bias_here, tokens, u, cut, count);
        });
    }

    template <int R>
    struct Tokens {
        const T* residual[R];
        T* out[R];
        const T* next[R];
    };

    template <int R, int U, int M, bool Cut>
    COMPACTER_INLINE void tile(const float* coef, const float* bias_here, const Tokens<R>& tokens, int64_t u,
                               std::bool_constant<Cut>, int64_t count) const {
        const auto get = [&](auto p) COMPACTER_INLINE_LAMBDA { return Cut ? load(p, count) : load(p); };
        Vec sum[R][U];
#pragma GCC unroll 4
        for (int k = 0; k < U; ++k) {
            const Vec start = bias_here ? get(bias_here + u + k * W) : Vec{};
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][k] = start;
        }
        if (tokens.residual[0]) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[r][k] += get(tokens.residual[r] + u + k * W);
        }
        if (tokens.next[0]) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int k = 0; k < U; k += vectors_per_line<T>) {
                    __builtin_prefetch(tokens.next[r] + u + k * W, 0, 2);
                    if (!streaming) __builtin_prefetch(tokens.out[r] + lanes * n * chunk + u + k * W, 1, 2);
                }
        }
        const int64_t terms = M ? M : m;
        const float* t = basis + u;
#pragma GCC unroll 12
        for (int64_t c = 0; c < terms; ++c, t += chunk) {
            Vec value[U];
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) value[k] = get(t + k * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec weight = splat(coef[c * lanes + r]);
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[r][k] += weight * value[k];
            }
        }
        const auto put = [&](auto write) COMPACTER_INLINE_LAMBDA {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) write(tokens.out[r] + u + k * W, sum[r][k]);
        };
        if constexpr (Cut)
            put([&](T* to, Vec v) COMPACTER_INLINE_LAMBDA { store(to, v, count); });
        else if (streaming)
            put([](T* to, Vec v) COMPACTER_INLINE_LAMBDA { stream(to, v); });
        else
            put([](T* to, Vec v) COMPACTER_INLINE_LAMBDA { store(to, v); });
    }
};

// Whether every whole vector of every row of `out` is aligned, so that it may be streamed.
template <class T>
COMPACTER_INLINE bool can_stream(const T* out, int64_t chunk) {
    return reinterpret_cast<uintptr_t>(out) % (W * sizeof(T)) == 0 && chunk % W == 0;
}

}  // namespace compacter::COMPACTER_ISA
