// From rows of tokens to lanes, the first read of x (and of g):   Z[p,c] = sum_u x[p,u] s_c[u]
//
// A vector holds four u of each of W/4 rows c of s; four u of x are repeated in its quarters. So a sum is spread over four
// numbers only, and one fold4 turns the sums of four tokens into four consecutive lanes for each c.
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

class Contraction {
public:
    static constexpr int rows_at_once = many_registers ? 8 : 4, groups_at_once = many_registers ? 3 : 2;
    static constexpr int group = W / 4;  // rows of s in a vector

    // `basis` is s, [m][chunk]; `scratch` has size(m, chunk) floats.
    Contraction(int64_t n, int64_t m, int64_t chunk, const float* basis, float* scratch)
        : n(n), m(m), chunk(chunk), quads((chunk + 3) / 4), packed(scratch), widened(scratch + packed_size(m, chunk)) {
        pack(basis);
    }

    static int64_t size(int64_t m, int64_t chunk) {
        return packed_size(m, chunk) + rows_at_once * round_up(chunk, W);
    }

    // z[p,c][token] of `tokens` <= 16 rows of x, zero for the other lanes
    template <class T>
    void operator()(const T* x, int64_t tokens, float* z) const {
        if (tokens < lanes)
            for (int64_t j = 0; j < n * m * lanes; ++j) z[j] = 0.f;
        for (int64_t p = 0; p < n; ++p)
            tiles<rows_at_once, 4, 1>(0, tokens, [&](auto size, int64_t token) {
                constexpr int R = decltype(size)::value;
                int64_t stride = n * chunk;
                const float* rows = as_float<R>(x + token * stride + p * chunk, stride);
                if constexpr (groups_at_once == 3)
                    tiles<3, 2, 1>(0, groups(m), [&](auto count, int64_t first) {
                        tile<R, decltype(count)::value>(rows, stride, first, z + p * m * lanes + token);
                    });
                else
                    tiles<2, 1>(0, groups(m), [&](auto count, int64_t first) {
                        tile<R, decltype(count)::value>(rows, stride, first, z + p * m * lanes + token);
                    });
            });
    }

private:
    static int64_t groups(int64_t m) { return (m + group - 1) / group; }
    static int64_t packed_size(int64_t m, int64_t chunk) { return groups(m) * ((chunk + 3) / 4) * W; }

    // packed[group][quad][row in group][4], zeros where s has no number
    void pack(const float* basis) {
        for (int64_t g = 0; g < groups(m); ++g)
            for (int row = 0; row < group; ++row) {
                const int64_t c = g * group + row;
                float* to = packed + g * quads * W + row * 4;
                for (int64_t u = 0; u < quads * 4; u += 4, to += W)
                    if (c < m && u + 4 <= chunk)
                        store4(to, load4(basis + c * chunk + u));
                    else
                        for (int64_t k = 0; k < 4; ++k) to[k] = c < m && u + k < chunk ? basis[c * chunk + u + k] : 0.f;
            }
    }

    template <int R>
    const float* as_float(const float* rows, int64_t&) const {
        return rows;
    }

    // R rows of a chunk in fp32; `stride` becomes theirs.
    template <int R, class T>
    const float* as_float(const T* rows, int64_t& stride) const {
        const int64_t padded = round_up(chunk, W);
        for (int r = 0; r < R; ++r)
            columns<1>(chunk, [&](auto, int64_t u, auto cut, int64_t count) {
                const T* from = rows + r * stride + u;
                store(widened + r * padded + u, cut ? load(from, count) : load(from));
            });
        stride = padded;
        return widened;
    }

    template <int R, int G>
    __attribute__((noinline)) void tile(const float* rows, int64_t stride, int64_t first, float* z) const {
        Vec sum[R][G] = {};
        const float* s = packed + first * quads * W;
        const auto step = [&](int64_t quad, auto quad_of_row) COMPACTER_INLINE_LAMBDA {
            Vec basis[G];
#pragma GCC unroll 4
            for (int j = 0; j < G; ++j) basis[j] = load(s + (j * quads + quad) * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec four = quad_of_row(rows + r * stride + quad * 4);
#pragma GCC unroll 4
                for (int j = 0; j < G; ++j) sum[r][j] += four * basis[j];
            }
        };
        for (int64_t quad = 0; quad < chunk / 4; ++quad) step(quad, [](const float* row) { return load_quad(row); });
        if (chunk % 4) step(chunk / 4, [&](const float* row) {
            float four[4] = {};
            for (int64_t k = 0; k < chunk % 4; ++k) four[k] = row[k];
            return load_quad(four);
        });
#pragma GCC unroll 4
        for (int j = 0; j < G; ++j) {
            const int64_t c = (first + j) * group;
            const int64_t count = m - c < group ? m - c : group;
#pragma GCC unroll 2
            for (int r = 0; r < R; r += 4) put<R>(&sum[0][0] + r * G + j, G, z + c * lanes + r, count);
        }
    }

    // Four tokens (one, when R is 1) of `count` rows c, from sums that lie `step` apart.
    template <int R>
    COMPACTER_INLINE static void put(const Vec* sum, int step, float* z, int64_t count) {
        if constexpr (R == 1) {
            const Vec total = fold4(sum[0], Vec{}, Vec{}, Vec{});
            for (int64_t row = 0; row < count; ++row) z[row * lanes] = total[row * 4];
        } else {
            const Vec total = fold4(sum[0], sum[step], sum[2 * step], sum[3 * step]);
            if (count == group) {
#pragma GCC unroll 4
                for (int row = 0; row < group; ++row) store4(z + row * lanes, quarter(total, row));
            } else {
                for (int row = 0; row < count; ++row) store4(z + row * lanes, quarter(total, row));
            }
        }
    }

    int64_t n, m, chunk, quads;
    float *packed, *widened;
};

}  // namespace compacter::COMPACTER_ISA
