// From lanes to rows of tokens, the only write:
//     out[q,u] = bias[q,u] + sum_c V[q,c] t_c[u] + also[q,u] + residual[q,u]
// or, for a mix of adapters,
//     out[q,u] = sum_e w_e bias_e[q,u] + sum_c V[q,c] t_c[u] + also[q,u] + residual[q,u]
// The residual comes last, since each addition after a large residual would round to its size.
//
// Where all numbers of many terms t are in bf16, and the processor multiplies such pairs (has_dot),
// V is rounded to bf16 too, and two terms are added at once.
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

// More terms than this are worth packing.
constexpr int64_t few_terms = 12;

inline int64_t packed_size(int64_t m, int64_t chunk) { return m > few_terms ? m * round_up(chunk, W) : 0; }

template <class T>
struct Expansion {
    int64_t n, m, chunk;
    const float *basis, *bias;  // t, [m][chunk]; bias [n * chunk], or [biases][n * chunk], or null
    bool streaming;
    int64_t biases = 0;  // of a mix
    const float* packed = nullptr;
    float* paired = nullptr;  // memory for V in pairs of terms, or null

    // Lays t out strip by strip in `to`, which has packed_size(m, chunk) floats. It pays for many
    // terms, whose rows of t would drive one another out of the first cache, and more than one block.
    // Pairs do not depend on the number of tokens, as the bits of the output do not.
    void pack(float* to, int64_t tokens) {
        if (!packed_size(m, chunk)) return;
        const bool two = has_dot<T> && m % 2 == 0 && all_bf16(basis, m * chunk);
        if (tokens <= lanes && !two) return;
        packed = to;
        if (two) paired = to + m / 2 * round_up(chunk, W);
        columns<packed_vectors, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) {
            constexpr int U = decltype(vectors)::value;
            for (int64_t c = 0; c < m; c += two ? 2 : 1, to += U * W) {
                Vec t[U], second[U];
                get<U, decltype(cut)::value>(basis + c * chunk + u, t, count);
                if (two) get<U, decltype(cut)::value>(basis + (c + 1) * chunk + u, second, count);
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) store(to + k * W, two ? joined_upper_halves(t[k], second[k]) : t[k]);
            }
        });
    }

    // Rows of `tokens` <= 16 tokens. It prefetches `next`, the rows of the next block, which may be
    // null like residual and also. The weights of the biases are [biases][lanes].
    void operator()(const float* v, const T* residual, const T* also, T* out, int64_t tokens, const T* next,
                    const float* weights = nullptr) const {
        if (biases)
            chunks<0>(v, residual, also, out, tokens, next, weights);
        else if (m == 4)
            chunks<4>(v, residual, also, out, tokens, next, weights);
        else if (m == 8)
            chunks<8>(v, residual, also, out, tokens, next, weights);
        else if (m == 12)
            chunks<12>(v, residual, also, out, tokens, next, weights);
        else
            chunks<0>(v, residual, also, out, tokens, next, weights);
    }

private:
    static constexpr int64_t page = 4096;  // bytes; with wider rows each token would touch a new page
    static constexpr int64_t strip_floats = 8192;
    // Tiles of t itself and of the packed t: rows, and vectors of a row. With few registers these are
    // the vectors of a line, so that a streamed line is written at once.
    static constexpr int line_vectors = vectors_per_line<T> < 4 ? vectors_per_line<T> : 4;
    static constexpr int tile_vectors = many_registers ? 4 : line_vectors, tile_rows = many_registers ? 4 : 8 / line_vectors;
    static constexpr int packed_vectors = W == 16 ? 2 : tile_vectors, packed_rows = W == 16 ? 8 : tile_rows;

    // The vectors of a row whose M terms, sums and starts fit into the registers, at least 2; 0: none.
    static constexpr int held(int M) {
        for (int U = 4; M && U > 1; U /= 2)
            if (M * U + 2 * U < registers) return U;
        return 0;
    }

    // Whether a tile of U vectors writes whole lines. Streamed parts of many lines would leave the
    // processor's few buffers before the other parts come.
    template <int U>
    static constexpr bool whole_lines = U % vectors_per_line<T> == 0;

    // M: the number of terms if it is known at compile time, else 0.
    template <int M>
    void chunks(const float* v, const T* residual, const T* also, T* out, int64_t tokens, const T* next,
                const float* weights) const {
        // Backwards, since the ends of x's rows were read last and are still in the first cache.
        for (int64_t q = n; q-- > 0;) {
            const int64_t at = q * chunk;
            const float* terms = v + q * m * lanes;
            if (paired) terms = in_pairs_of_terms(terms);
            const Chunk here{terms,    bias ? bias + at : nullptr, residual ? residual + at : nullptr, also ? also + at : nullptr,
                             out + at, next ? next + at : nullptr, weights};
            if constexpr (held(M) > 0)
                if (n * chunk * static_cast<int64_t>(sizeof(T)) < page && (!streaming || whole_lines<held(M)>)) {
                    columns<held(M), 2, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) {
                        basis_held<decltype(vectors)::value, M>(here, u, tokens, cut, count);
                    });
                    continue;
                }
            constexpr int64_t step = 4 * 3 * W;  // any tile's vectors
            const int64_t fit = strip_floats / (m > 0 ? m : 1) / step * step, width = fit ? fit : step;
            for (int64_t u = 0; u < chunk; u += width) strip<M>(here, u, chunk - u < width ? chunk - u : width, tokens);
        }
    }

    // [pair of terms][token], rounded to bf16
    const float* in_pairs_of_terms(const float* v) const {
        for (int64_t c = 0; c < m; c += 2)
            for (int l = 0; l < lanes; l += W)
                store(paired + c / 2 * lanes + l, joined(to_bf16(load(v + c * lanes + l)), to_bf16(load(v + (c + 1) * lanes + l))));
        return paired;
    }

    // Pointers to the first number of a chunk.
    struct Chunk {
        const float *coef, *bias;
        const T *residual, *also;
        T* out;
        const T* next;
        const float* weights;
    };

    // U vectors of a row, the last of which may be cut. What is added and stored goes through these
    // three, so that a pair's order of numbers is that of all its vectors.
    template <int U, bool Cut, class Number>
    COMPACTER_INLINE static void get(const Number* p, Vec (&vectors)[U], int64_t count) {
        if constexpr (Cut) {
            vectors[0] = load(p, count);
        } else if constexpr (in_pairs<T> && U % 2 == 0) {
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; k += 2) {
                const VecPair pair = load_pair(p + k * W);
                vectors[k] = pair.first;
                vectors[k + 1] = pair.second;
            }
        } else {
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) vectors[k] = load(p + k * W);
        }
    }

    template <int U, bool Cut, class Number>
    COMPACTER_INLINE static void add(const Number* p, Vec (&sum)[U], int64_t count) {
        Vec more[U];
        get<U, Cut>(p, more, count);
        COMPACTER_UNROLL(4)
        for (int k = 0; k < U; ++k) sum[k] += more[k];
    }

    template <int U, bool Cut>
    COMPACTER_INLINE static void put(T* to, const Vec (&sum)[U], int64_t count, bool streams) {
        if constexpr (Cut) {
            store(to, sum[0], count);
        } else if constexpr (in_pairs<T> && U % 2 == 0) {
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; k += 2)
                streams ? stream_pair(to + k * W, {sum[k], sum[k + 1]}) : store_pair(to + k * W, {sum[k], sum[k + 1]});
        } else if (streams) {
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) stream(to + k * W, sum[k]);
        } else {
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) store(to + k * W, sum[k]);
        }
    }

    // The basis stays in registers for all tokens, which saves loads and spreads the stores.
    template <int U, int M, bool Cut>
    COMPACTER_NOINLINE void basis_held(const Chunk& at, int64_t u, int64_t tokens, std::bool_constant<Cut>,
                                       int64_t count) const {
        // Copies, since a store to the output might change the members of `this` and `at`.
        const int64_t row = n * chunk;
        const bool streams = streaming;
        const float* coef = at.coef;
        const T* residual = at.residual ? at.residual + u : nullptr;
        const T* also = at.also ? at.also + u : nullptr;
        const T* next = at.next ? at.next + u : nullptr;
        Vec t[M][U], start[U] = {};
        COMPACTER_UNROLL(12)
        for (int c = 0; c < M; ++c) get<U, Cut>(basis + c * chunk + u, t[c], count);
        if (at.bias) get<U, Cut>(at.bias + u, start, count);
        T *out = at.out + u, *const end = out + tokens * row;
        for (; out < end; out += row, ++coef) {
            Vec sum[U];
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) sum[k] = start[k];
            if (!streams) {  // the line has arrived when the products are ready
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; k += vectors_per_line<T>) COMPACTER_PREFETCH(out + k * W, 1, 3);
            }
            if (next) {
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; k += vectors_per_line<T>) COMPACTER_PREFETCH(next + k * W, 0, 2);
                next += row;
            }
            COMPACTER_UNROLL(12)
            for (int c = 0; c < M; ++c) {
                const Vec weight = splat(coef[c * lanes]);
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) sum[k] += weight * t[c][k];
            }
            if (also) {
                add<U, Cut>(also, sum, count);
                also += row;
            }
            if (residual) {
                add<U, Cut>(residual, sum, count);
                residual += row;
            }
            put<U, Cut>(out, sum, count, streams);
        }
    }

    // `width` columns of all rows, whose part of t stays in the first cache. Tiles go along the rows,
    // since a load that lies a multiple of 4 KiB behind a recent store waits for it.
    template <int M>
    COMPACTER_NOINLINE void strip(const Chunk& at, int64_t u, int64_t width, int64_t tokens) const {
        const auto from_packed = [&](auto pairs, int64_t terms) COMPACTER_INLINE_LAMBDA {
            tiles<packed_rows, packed_rows / 2, 1>(0, tokens, [&](auto size, int64_t token) COMPACTER_INLINE_LAMBDA {
                columns<packed_vectors, 1>(width, [&](auto vectors, int64_t j, auto cut, int64_t count) COMPACTER_INLINE_LAMBDA {
                    constexpr int R = decltype(size)::value, U = decltype(vectors)::value;
                    const float* t = packed + (u + j) * terms;
                    tile<R, U, true, decltype(pairs)::value>(at, t, U * W, terms, token, u + j, cut, count);
                });
            });
        };
        if constexpr (!M && has_dot<T>)
            if (paired) return from_packed(std::true_type{}, m / 2);
        if (!M && packed)
            from_packed(std::false_type{}, m);
        else
            tiles<tile_rows, 1>(0, tokens, [&](auto size, int64_t token) COMPACTER_INLINE_LAMBDA {
                columns<tile_vectors, 2, 1>(width, [&](auto vectors, int64_t j, auto cut, int64_t count) COMPACTER_INLINE_LAMBDA {
                    constexpr int R = decltype(size)::value, U = decltype(vectors)::value;
                    tile<R, U, false, false>(at, basis + u + j, chunk, M ? M : m, token, u + j, cut, count);
                });
            });
    }

    // R tokens by U vectors. With Pairs, a term is a pair of two.
    template <int R, int U, bool Packed, bool Pairs, bool Cut>
    COMPACTER_INLINE void tile(const Chunk& at, const float* t, int64_t stride, int64_t terms, int64_t token, int64_t u,
                               std::bool_constant<Cut>, int64_t count) const {
        const int64_t row = n * chunk, offset = token * row + u;
        const bool streams = streaming;
        Vec start[U] = {}, sum[R][U];
        if (at.bias && !biases) get<U, Cut>(at.bias + u, start, count);
        COMPACTER_UNROLL(8)
        for (int r = 0; r < R; ++r)
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) sum[r][k] = start[k];
        if (const T* next = at.next) {
            next += offset;
            COMPACTER_UNROLL(8)
            for (int r = 0; r < R; ++r, next += row)
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; k += vectors_per_line<T>) COMPACTER_PREFETCH(next + k * W, 0, 2);
        }
        for (int64_t e = 0; e < biases; ++e) {
            Vec value[U];
            get<U, Cut>(at.bias + e * row + u, value, count);
            COMPACTER_UNROLL(8)
            for (int r = 0; r < R; ++r) {
                const Vec weight = splat(at.weights[e * lanes + token + r]);
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) sum[r][k] += weight * value[k];
            }
        }
        const float* coef = at.coef + token;
        COMPACTER_UNROLL(12)
        for (int64_t c = 0; c < terms; ++c, t += stride) {
            Vec value[U];
            if constexpr (Packed) {
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) value[k] = load(t + k * W);
            } else {
                get<U, Cut>(t, value, count);
            }
            COMPACTER_UNROLL(8)
            for (int r = 0; r < R; ++r) {
                const Vec weight = Pairs ? splat_pair(coef + c * lanes + r) : splat(coef[c * lanes + r]);
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) sum[r][k] = Pairs ? dot(sum[r][k], weight, value[k]) : sum[r][k] + weight * value[k];
            }
        }
        const auto add_rows = [&](const T* p) COMPACTER_INLINE_LAMBDA {
            if (!p) return;
            p += offset;
            COMPACTER_UNROLL(8)
            for (int r = 0; r < R; ++r, p += row) add<U, Cut>(p, sum[r], count);
        };
        add_rows(at.also);
        add_rows(at.residual);
        T* out = at.out + offset;
        COMPACTER_UNROLL(8)
        for (int r = 0; r < R; ++r, out += row) put<U, Cut>(out, sum[r], count, streams);
    }
};

// Whether all vectors of all rows of `out` are aligned, as streamed stores require.
template <class T>
COMPACTER_INLINE bool can_stream(const T* out, int64_t chunk) {
    constexpr int together = in_pairs<T> ? 2 * W : W;
    return reinterpret_cast<uintptr_t>(out) % (together * sizeof(T)) == 0 && chunk % together == 0;
}

}  // namespace compacter::COMPACTER_ISA
