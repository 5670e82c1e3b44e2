// From rows of tokens to lanes, the first read of x (and of g):   Z[p,c] = sum_u x[p,u] s_c[u]
//
// A vector holds `span` numbers u for each of `group` = W / span rows c of s, another the same
// numbers of x repeated. A shorter span leaves fewer sums to add at the end (fold4 adds four tokens
// at once into lanes), but loads x more often. A small m takes the longer span.
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

class Contraction {
public:
    // `basis` is s, [m][chunk]; `scratch` has size(m, chunk) floats.
    Contraction(int64_t n, int64_t m, int64_t chunk, const float* basis, float* scratch)
        : n(n), m(m), chunk(chunk), packed(scratch) {
        with_span([&](auto span) { pack<decltype(span)::value>(basis); });
    }

    static int64_t size(int64_t m, int64_t chunk) {
        return groups(m, span(m)) * round_up(chunk, span(m)) / span(m) * W;
    }

    // z[p,c][token] of `tokens` <= 16 rows of x, zero in the other lanes. `next`, or null: as many
    // rows that are used soon. They are prefetched here, in the phase that stores almost nothing.
    template <class T>
    void operator()(const T* x, int64_t tokens, float* z, const T* next = nullptr) const {
        if (tokens < lanes)
            for (int64_t j = 0; j < n * m * lanes; ++j) z[j] = 0.f;
        for (int64_t p = 0; p < n; ++p)
            tiles<rows_at_once, 4, 1>(0, tokens, [&](auto size, int64_t token) {
                constexpr int R = decltype(size)::value;
                const T* rows = x + token * n * chunk + p * chunk;
                const T* ahead = next ? next + (rows - x) : nullptr;
                float* to = z + p * m * lanes + token;
                with_span([&](auto span) { all_groups<R, decltype(span)::value>(rows, ahead, to); });
            });
    }

private:
    static constexpr int rows_at_once = many_registers ? 8 : 4;

    static int span(int64_t m) { return many_registers && m <= 4 ? 8 : 4; }

    template <class Body>
    COMPACTER_INLINE void with_span(const Body& body) const {
        if constexpr (many_registers)
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

    template <int R, int Span, class T>
    void all_groups(const T* rows, const T* ahead, float* z) const {
        const auto body = [&](auto count, int64_t first) {
            tile<R, decltype(count)::value, Span>(rows, first ? nullptr : ahead, first, z);
        };
        if constexpr (many_registers && Span == 4)
            tiles<3, 2, 1>(0, groups(m, Span), body);
        else
            tiles<2, 1>(0, groups(m, Span), body);
    }

    // R tokens by G groups. A step prefetches in every second row, the next step in the others.
    template <int R, int G, int Span, class T>
    __attribute__((noinline)) void tile(const T* rows, const T* ahead, int64_t first, float* z) const {
        const int64_t stride = n * chunk;
        const int64_t steps = (chunk + Span - 1) / Span;
        const float* s = packed + first * steps * W;
        Vec sum[R][G] = {};
        const auto step = [&](int64_t at, auto numbers_of) COMPACTER_INLINE_LAMBDA {
            Vec basis[G];
            if (ahead) {
#pragma GCC unroll 8
                for (int r = 0; r < R; r += 2) __builtin_prefetch(ahead + (r + at % 2) * stride + at / 2 * 2 * Span, 1, 2);
            }
#pragma GCC unroll 4
            for (int j = 0; j < G; ++j) basis[j] = load(s + (j * steps + at) * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec numbers = numbers_of(rows + r * stride + at * Span);
#pragma GCC unroll 4
                for (int j = 0; j < G; ++j) sum[r][j] += numbers * basis[j];
            }
        };
        for (int64_t at = 0; at < chunk / Span; ++at) step(at, [](const T* row) { return load_repeated<Span>(row); });
        if (chunk % Span) step(chunk / Span, [&](const T* row) {
            T padded[Span] = {};
            for (int64_t k = 0; k < chunk % Span; ++k) padded[k] = row[k];
            return load_repeated<Span>(padded);
        });
        constexpr int group = W / Span;
#pragma GCC unroll 4
        for (int j = 0; j < G; ++j) {
            const int64_t c = (first + j) * group;
            const int64_t count = m - c < group ? m - c : group;
#pragma GCC unroll 2
            for (int r = 0; r < R; r += 4) {
                const auto of = [&](int k) COMPACTER_INLINE_LAMBDA { return r + k < R ? sum[r + k < R ? r + k : 0][j] : Vec{}; };
                put<R, Span>(fold4(of(0), of(1), of(2), of(3)), z + c * lanes + r, count);
            }
        }
    }

    // Four tokens (one, when R is 1) of `count` rows c.
    template <int R, int Span>
    COMPACTER_INLINE static void put(Vec total, float* z, int64_t count) {
#pragma GCC unroll 4
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
};

}  // namespace compacter::COMPACTER_ISA
