// From lanes to rows of tokens, the only write:
//     out[q,u] = bias[q,u] + sum_c V[q,c] t_c[u] + also[q,u] + residual[q,u]
// The residual comes last, since each addition after a large residual would round to its size.
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

// Residual and Also are the types of the numbers that are added.
template <class T, class Residual = T, class Also = T>
struct Expansion {
    int64_t n, m, chunk;
    const float *basis, *bias;  // t, [m][chunk]; bias [n * chunk] or null
    bool streaming;

    // Rows of `tokens` <= 16 tokens. It prefetches `next`, the rows of the next block, which may be
    // null like residual and also.
    void operator()(const float* v, const Residual* residual, const Also* also, T* out, int64_t tokens, const T* next) const {
        if (m == 4)
            blocks<4>(v, residual, also, out, tokens, next);
        else if (m == 8)
            blocks<8>(v, residual, also, out, tokens, next);
        else if (m == 12)
            blocks<12>(v, residual, also, out, tokens, next);
        else
            blocks<0>(v, residual, also, out, tokens, next);
    }

private:
    static constexpr int64_t page = 4096;  // bytes; with wider rows each token would touch a new page

    // M: the number of terms if it is known at compile time, else 0.
    template <int M>
    void blocks(const float* v, const Residual* residual, const Also* also, T* out, int64_t tokens, const T* next) const {
        // Backwards, since the ends of x's rows were read last and are still in the first cache.
        for (int64_t q = n; q-- > 0;) {
            const int64_t at = q * chunk;
            const Chunk here{v + q * m * lanes,           bias ? bias + at : nullptr, residual ? residual + at : nullptr,
                             also ? also + at : nullptr, out + at,                   next ? next + at : nullptr};
            if constexpr (many_registers && M)
                if (n * chunk * static_cast<int64_t>(sizeof(T)) <= page) {
                    columns<M == 4 ? 4 : 2, 2, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) {
                        basis_held<decltype(vectors)::value, M>(here, u, tokens, cut, count);
                    });
                    continue;
                }
            tiles<4, 1>(0, tokens, [&](auto size, int64_t token) { rows<decltype(size)::value, M>(here, token); });
        }
    }

    // Pointers to the first number of a chunk.
    struct Chunk {
        const float *coef, *bias;
        const Residual* residual;
        const Also* also;
        T* out;
        const T* next;
    };

    // The basis stays in registers for all tokens, which saves loads and spreads the stores.
    template <int U, int M, bool Cut>
    __attribute__((noinline)) void basis_held(const Chunk& at, int64_t u, int64_t tokens, std::bool_constant<Cut>,
                                              int64_t count) const {
        // Copies, since a store to the output might change the members of `this` and `at`.
        const int64_t row = n * chunk;
        const bool streams = streaming;
        const float* coef = at.coef;
        const Residual* residual = at.residual ? at.residual + u : nullptr;
        const Also* also = at.also ? at.also + u : nullptr;
        const T* next = at.next ? at.next + u : nullptr;
        const auto get = [count](auto p) COMPACTER_INLINE_LAMBDA { return Cut ? load(p, count) : load(p); };
        Vec t[M][U], start[U];
#pragma GCC unroll 12
        for (int c = 0; c < M; ++c)
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) t[c][k] = get(basis + c * chunk + u + k * W);
#pragma GCC unroll 4
        for (int k = 0; k < U; ++k) start[k] = at.bias ? get(at.bias + u + k * W) : Vec{};
        T *out = at.out + u, *const end = out + tokens * row;
        for (; out < end; out += row, ++coef) {
            Vec sum[U];
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) sum[k] = start[k];
            if (!streams) {  // the line has arrived when the products are ready
#pragma GCC unroll 4
                for (int k = 0; k < U; k += vectors_per_line<T>) __builtin_prefetch(out + k * W, 1, 3);
            }
            if (next) {
#pragma GCC unroll 4
                for (int k = 0; k < U; k += vectors_per_line<T>) __builtin_prefetch(next + k * W, 0, 2);
                next += row;
            }
#pragma GCC unroll 12
            for (int c = 0; c < M; ++c) {
                const Vec weight = splat(coef[c * lanes]);
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[k] += weight * t[c][k];
            }
            if (also) {
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[k] += get(also + k * W);
                also += row;
            }
            if (residual) {
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[k] += get(residual + k * W);
                residual += row;
            }
            put<U, Cut>(out, sum, count, streams);
        }
    }

    // R rows of one chunk.
    template <int R, int M>
    __attribute__((noinline)) void rows(const Chunk& at, int64_t token) const {
        constexpr int widest = many_registers ? 4 : 2;
        columns<widest, 2, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) COMPACTER_INLINE_LAMBDA {
            token_tile<R, decltype(vectors)::value, M>(at, token, u, cut, count);
        });
    }

    // R tokens by U vectors, with the basis from the first cache.
    template <int R, int U, int M, bool Cut>
    COMPACTER_INLINE void token_tile(const Chunk& at, int64_t token, int64_t u, std::bool_constant<Cut>, int64_t count) const {
        const auto get = [&](auto p) COMPACTER_INLINE_LAMBDA { return Cut ? load(p, count) : load(p); };
        const int64_t row = n * chunk, offset = token * row + u;
        T* out = at.out + offset;
        Vec sum[R][U];
#pragma GCC unroll 4
        for (int k = 0; k < U; ++k) {
            const Vec start = at.bias ? get(at.bias + u + k * W) : Vec{};
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][k] = start;
        }
        const auto add = [&](auto p) COMPACTER_INLINE_LAMBDA {
            if (!p) return;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[r][k] += get(p + offset + r * row + k * W);
        };
        if (at.next) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int k = 0; k < U; k += vectors_per_line<T>) __builtin_prefetch(at.next + offset + r * row + k * W, 0, 2);
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
                const Vec weight = splat(at.coef[c * lanes + token + r]);
#pragma GCC unroll 4
                for (int k = 0; k < U; ++k) sum[r][k] += weight * value[k];
            }
        }
        add(at.also);
        add(at.residual);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) put<U, Cut>(out + r * row, sum[r], count, streaming);
    }

    template <int U, bool Cut>
    COMPACTER_INLINE static void put(T* to, const Vec (&sum)[U], int64_t count, bool streams) {
        const auto all = [&](auto write) COMPACTER_INLINE_LAMBDA {
#pragma GCC unroll 4
            for (int k = 0; k < U; ++k) write(to + k * W, sum[k]);
        };
        if constexpr (Cut)
            all([&](T* p, Vec v) COMPACTER_INLINE_LAMBDA { store(p, v, count); });
        else if (streams)
            all([](T* p, Vec v) COMPACTER_INLINE_LAMBDA { stream(p, v); });
        else
            all([](T* p, Vec v) COMPACTER_INLINE_LAMBDA { store(p, v); });
    }
};

// Whether all vectors of all rows of `out` are aligned, as streamed stores require.
template <class T>
COMPACTER_INLINE bool can_stream(const T* out, int64_t chunk) {
    return reinterpret_cast<uintptr_t>(out) % (W * sizeof(T)) == 0 && chunk % W == 0;
}

}  // namespace compacter::COMPACTER_ISA
