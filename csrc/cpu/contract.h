// From rows of tokens to lanes, the first read of x (and of g):   Z[p,c] = sum_u x[p,u] s_c[u]
//
// A vector holds `span` numbers u for each of `group` = W / span rows c of s, another the same
// numbers of x repeated. A shorter span leaves fewer sums to add at the end (fold4 adds four tokens
// at once into lanes), but loads x more often. A small m takes the longer span.
//
// Where x and all numbers of s are in bf16, and the processor multiplies such pairs (has_dot), a
// vector holds pairs in place of numbers. The products are exact, and their sums are in fp32.
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

template <class T>
class Contraction {
public:
    // `basis` is s, [m][chunk]; `scratch` has size(m, chunk) floats.
    Contraction(int64_t n, int64_t m, int64_t chunk, const float* basis, float* scratch)
        : n(n), m(m), chunk(chunk), packed(scratch), paired(has_dot<T> && all_bf16(basis, m * chunk)) {
        if constexpr (has_dot<T>)
            if (paired) {
                pack_pairs(basis);
                return;
            }
        with_span([&](auto span) { pack<decltype(span)::value>(basis); });
    }

    // Whether it multiplies pairs.
    bool pairs() const { return paired; }

    static int64_t size(int64_t m, int64_t chunk) {
        return groups(m, span(m)) * round_up(chunk, span(m)) / span(m) * W;
    }

    // z[p,c][token] of `tokens` <= 16 rows of x, zero in the other lanes. `next`, or null: as many
    // rows that are used soon. They are prefetched here, in the phase that stores almost nothing.
    void operator()(const T* x, int64_t tokens, float* z, const T* next = nullptr) const {
        if (tokens < lanes)
            for (int64_t j = 0; j < n * m * lanes; ++j) z[j] = 0.f;
        for (int64_t p = 0; p < n; ++p) {
            const T *rows = x + p * chunk, *ahead = next ? next + p * chunk : nullptr;
            float* to = z + p * m * lanes;
            if (has_dot<T> && paired)
                chunks<4, has_dot<T>>(rows, ahead, tokens, to);
            else
                with_span([&](auto span) { chunks<decltype(span)::value, false>(rows, ahead, tokens, to); });
        }
    }

private:
    template <int Span, bool Pairs>
    COMPACTER_INLINE void chunks(const T* rows, const T* ahead, int64_t tokens, float* z) const {
        if (size(m, chunk) <= stays_cached) {
            each_rows(tokens, [&](auto R, int64_t token) {
                each_groups<Span>([&](auto G, int64_t first) {
                    tile<R, G, Span, Pairs>(rows, first ? nullptr : ahead, token, first, z);
                });
            });
        } else {
            each_groups<Span>([&](auto G, int64_t first) {
                each_rows(tokens, [&](auto R, int64_t token) {
                    // The first tiles share the prefetches.
                    tile<R, G, Span, Pairs>(rows, first == token / R * G ? ahead : nullptr, token, first, z);
                });
            });
        }
    }

    // With 16 registers, twelve sums: eight would just wait for one another.
    static constexpr int rows_at_once = many_registers ? 8 : W == 8 && !in_pairs<T> ? 6 : 4;

    static int span(int64_t m) { return W == 16 && m <= 4 ? 8 : 4; }

    template <class Body>
    COMPACTER_INLINE void with_span(const Body& body) const {
        if constexpr (W == 16)
            if (span(m) == 8) return body(Int<8>{});
        body(Int<4>{});
    }

    static int64_t groups(int64_t m, int span) { return (m * span + W - 1) / W; }

    // packed[group][u / span][row in group][span], padded with zeros.
    template <int Span>
    void pack(const float* basis) {
        const int64_t padded = round_up(chunk, Span);
        for (int64_t g = 0; g < groups(m, Span); ++g)
            for (int row = 0; row < W / Span; ++row) {
                const int64_t c = g * (W / Span) + row;
                float* to = packed + g * padded / Span * W + row * Span;
                for (int64_t u = 0; u < padded; u += 4) {
                    float* four = to + u / Span * W + u % Span;
                    if (c < m && u + 4 <= chunk)
                        store4(four, load4(basis + c * chunk + u));
                    else
                        for (int64_t k = 0; k < 4; ++k) four[k] = c < m && u + k < chunk ? basis[c * chunk + u + k] : 0.f;
                }
            }
    }

    // packed[group][u / 8][row in group][8] in bf16
    void pack_pairs(const float* basis) {
        const int64_t padded = round_up(chunk, 8), all = groups(m, 4) * (W / 4);
        uint16_t* to = reinterpret_cast<uint16_t*>(packed);
        for (int64_t c = 0; c < all; ++c) {
            uint16_t* row = to + c / (W / 4) * (W / 4) * padded + c % (W / 4) * 8;
            for (int64_t u = 0; u < padded; u += W) {
                const int64_t left = c < m ? chunk - u : 0;
                const Vec numbers = left >= W ? load(basis + c * chunk + u) : left > 0 ? load(basis + c * chunk + u, left) : Vec{};
                const HalfBits bits = upper_halves(numbers);
                for (int64_t k = 0; k < W && u + k < padded; k += 8)
                    std::memcpy(row + (u + k) / 8 * (W / 4) * 8, reinterpret_cast<const uint16_t*>(&bits) + k, 16);
            }
        }
    }

    // A larger s is read once for all rows, since it comes from a cache that other cores use too.
    static constexpr int64_t stays_cached = 1 << 16;

    template <class Body>
    COMPACTER_INLINE static void each_rows(int64_t tokens, const Body& body) {
        tiles<rows_at_once, 4, 1>(0, tokens, body);
    }

    template <int Span, class Body>
    COMPACTER_INLINE void each_groups(const Body& body) const {
        if constexpr (many_registers && Span == 4)
            tiles<3, 2, 1>(0, groups(m, Span), body);
        else
            tiles<2, 1>(0, groups(m, Span), body);
    }

    // R tokens by G groups; the same rows of `next`, which may be null, are prefetched.
    template <int R, int G, int Span, bool Pairs>
    COMPACTER_NOINLINE void tile(const T* x, const T* next, int64_t token, int64_t first, float* lanes_of_z) const {
        const int64_t stride = n * chunk;
        constexpr int Step = Pairs ? 2 * Span : Span;  // numbers u of a vector
        const int64_t steps = (chunk + Step - 1) / Step;
        const T *rows = x + token * stride, *ahead = next ? next + token * stride : nullptr;
        const float* s = packed + first * steps * W;
        float* z = lanes_of_z + token;
        Vec sum[R][G] = {};
        // Each line once: a step, or pair of steps, prefetches in every `turns`-th row.
        constexpr int turns = 64 / ((in_pairs<T> ? 2 : 1) * Step * static_cast<int>(sizeof(T)));
        const auto fetch_ahead = [&](int64_t at) COMPACTER_INLINE_LAMBDA {
            const int64_t turn = at % turns, from = at / turns * (64 / static_cast<int>(sizeof(T)));
            if constexpr (turns >= R) {
                if (turns == R || turn < R) COMPACTER_PREFETCH(ahead + turn * stride + from, 1, 2);
            } else {
                COMPACTER_UNROLL(8)
                for (int r = 0; r < R; r += turns) COMPACTER_PREFETCH(ahead + (r + turn) * stride + from, 1, 2);
            }
        };
        const auto step = [&](int64_t at, auto numbers_of) COMPACTER_INLINE_LAMBDA {
            Vec basis[G];
            if (ahead) fetch_ahead(at);
            COMPACTER_UNROLL(4)
            for (int j = 0; j < G; ++j) basis[j] = load(s + (j * steps + at) * W);
            COMPACTER_UNROLL(8)
            for (int r = 0; r < R; ++r) {
                const Vec numbers = numbers_of(rows + r * stride + at * Step);
                COMPACTER_UNROLL(4)
                for (int j = 0; j < G; ++j) sum[r][j] = Pairs ? dot(sum[r][j], numbers, basis[j]) : sum[r][j] + numbers * basis[j];
            }
        };
        const auto load_step = [](const T* row) COMPACTER_INLINE_LAMBDA {
            if constexpr (Pairs)
                return load_pairs_repeated(row);
            else
                return load_repeated<Span>(row);
        };
        int64_t at = 0;
        if constexpr (in_pairs<T>)
            for (; at + 2 <= chunk / Span; at += 2) {
                Vec basis[2][G];
                if (ahead) fetch_ahead(at / 2);
                COMPACTER_UNROLL(4)
                for (int j = 0; j < G; ++j) {
                    basis[0][j] = load(s + (j * steps + at) * W);
                    basis[1][j] = load(s + (j * steps + at) * W + W);
                }
                COMPACTER_UNROLL(8)
                for (int r = 0; r < R; ++r) {
                    const VecPair numbers = load_pair_repeated(rows + r * stride + at * Span);
                    COMPACTER_UNROLL(4)
                    for (int j = 0; j < G; ++j) sum[r][j] += numbers.first * basis[0][j];
                    COMPACTER_UNROLL(4)
                    for (int j = 0; j < G; ++j) sum[r][j] += numbers.second * basis[1][j];
                }
            }
        for (; at < chunk / Step; ++at) step(at, load_step);
        if (chunk % Step) step(chunk / Step, [&](const T* row) {
            T padded[Step] = {};
            for (int64_t k = 0; k < chunk % Step; ++k) padded[k] = row[k];
            return load_step(padded);
        });
        constexpr int group = W / Span;
        COMPACTER_UNROLL(4)
        for (int j = 0; j < G; ++j) {
            const int64_t c = (first + j) * group;
            const int64_t count = m - c < group ? m - c : group;
            COMPACTER_UNROLL(2)
            for (int r = 0; r < R; r += 4) {
                const auto of = [&](int k) COMPACTER_INLINE_LAMBDA { return r + k < R ? sum[r + k < R ? r + k : 0][j] : Vec{}; };
                put<R, Span>(fold4(of(0), of(1), of(2), of(3)), z + c * lanes + r, count);
            }
        }
    }

    // Four tokens (one, when R is 1) of `count` rows c.
    template <int R, int Span>
    COMPACTER_INLINE static void put(Vec total, float* z, int64_t count) {
        COMPACTER_UNROLL(4)
        for (int row = 0; row < W / Span; ++row) {
            if (row >= count) break;
            Quad four = quarter(total, row * (Span / 4));
            if constexpr (Span == 8) four += quarter(total, row * 2 + 1);
            if constexpr (R == 1)
                z[row * lanes] = four[0];
            else
                store4(z + row * lanes, four);
        }
    }

    int64_t n, m, chunk;
    float* packed;
    bool paired;
};

}  // namespace compacter::COMPACTER_ISA
