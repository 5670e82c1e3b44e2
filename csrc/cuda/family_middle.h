// Between the wide factors of the family: numbers X[c][token][p] of all slots in shared memory, for a block, on CUDA cores.
// Neighbouring lanes have neighbouring quads of four p, or four tokens of a plain bottleneck, of the same c.
#pragma once

#include "activations.h"
#include "small.h"

namespace compacter::cuda {

COMPACTER_DEVICE Quad<4> scaled(Quad<4> four, float by) {
#pragma unroll
    for (int j = 0; j < 4; ++j) four.at[j] *= by;
    return four;
}

// Anew: the compiler reads the number of the thread again, as no register is left for it.
template <bool Anew>
struct FamilyMiddle {
    using Four = Quad<4>;
    const Family& f;
    const Sizes& s;
    const FamilyPlaces& places;

    COMPACTER_DEVICE FamilyMiddle(const Family& family, const FamilyPlaces& at)
        : f(family), s(family.middle), places(at) {}

    // body(row of X, quad) for `count` rows.
    template <class Body>
    COMPACTER_DEVICE void for_each_quad(int count, const Body& body) const {
        for (int e = Anew ? thread_anew() : threadIdx.x; e < count * f.quads; e += blockDim.x) {
            const int row = f.by_quads.quotient(e);
            body(row, e - row * f.quads);
        }
    }
    COMPACTER_DEVICE float* at(int numbers, int row, int quad) const { return floats_at(numbers) + row * f.stride + quad * 4; }
    COMPACTER_DEVICE const float* factor(int offset, int slot) const { return floats_at(offset + slot * places.factors_bytes); }
    COMPACTER_DEVICE float weight(int slot, int token) const { return floats_at(places.mix)[slot * s.tokens + token]; }

    // Sets two numbers c and c + 1 of a token and chunk in X, of those that exist, or adds to them.
    COMPACTER_DEVICE void store_contracted(int numbers, bool adds, int c, int token, int chunk, float low, float high) const {
        float* const to = floats_at(numbers) + c * f.stride + token * s.n + chunk;
        if (c < f.columns) to[0] = adds ? to[0] + low : low;
        if (c + 1 < f.columns) to[f.stride] = adds ? to[f.stride] + high : high;
    }

    // Four numbers of an X[c]: the slot of c, its place there and its matrix of a rule, and the token and the first p.
    struct Place {
        int c, quad, slot, of_slot, matrix, token, first;
    };
    template <class Body>
    COMPACTER_DEVICE void for_each_place(const Body& body) const {
        for_each_quad(f.columns, [&](int c, int quad) {
            const int slot = s.by_m.quotient(c), of_slot = c - slot * s.m, token = s.by_blocks.quotient(quad);
            body(Place{c, quad, slot, of_slot, f.by_rank.quotient(of_slot), token, (quad - token * s.blocks) * 4});
        });
    }
    COMPACTER_DEVICE float* at(int numbers, const Place& place) const { return at(numbers, place.c, place.quad); }

    // sum_p A_i[p,q] X[p] for four q
    COMPACTER_DEVICE Four mix(int rule, int from, const Place& place) const {
        const float* x = at(from, place.c, place.token * s.blocks);
        const float* row = factor(rule, place.slot) + place.matrix * s.rule_stride + place.first;
        Four sum{};
#pragma unroll 2
        for (int p = 0; p < s.n; p += 4) {
            const Four four = load_quad<4>(x + p);
#pragma unroll
            for (int j = 0; j < 4; ++j) add_scaled(sum, four.at[j], load_quad<4>(row + (p + j) * s.n));
        }
        return sum;
    }
    // sum_q A_i[p,q] X[q] for four p
    COMPACTER_DEVICE Four mix_back(int rule, int from, const Place& place) const {
        const float* x = at(from, place.c, place.token * s.blocks);
        const float* rows = factor(rule, place.slot) + place.matrix * s.rule_stride + place.first * s.n;
        Four sum{};
#pragma unroll 2
        for (int q = 0; q < s.n; q += 4) {
            const Four four = load_quad<4>(x + q);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum.at[j] = add_dot(sum.at[j], four, load_quad<4>(rows + j * s.n + q));
        }
        return sum;
    }
    // sum_v factor_c[v] X[v]
    COMPACTER_DEVICE Four reduce(int factors, int from, const Place& place) const {
        Four sum{};
        const float* row = factor(factors, place.slot) + place.of_slot * s.inner_stride;
        add_product(sum, row, 1, at(from, place.slot * s.inner, place.quad), s.inner);
        return sum;
    }

    // y[v] = bias[v] + sum_c right_c[v] X[c], which it passes with the row of y to store(row, slot, v, quad, y).
    template <class Store>
    COMPACTER_DEVICE void widen(int from, const Store& store) const {
        for_each_quad(f.inner(), [&](int row, int quad) {
            const int slot = s.by_inner.quotient(row), v = row - slot * s.inner;
            const int block = quad - s.by_blocks.quotient(quad) * s.blocks;
            Four y = load_quad<4>(factor(places.factors.bias, slot) + v * s.n + block * 4);
            add_product(y, factor(places.factors.right, slot) + v, s.inner_stride, at(from, slot * s.m, quad), s.m);
            store(row, slot, v, quad, y);
        });
    }
    COMPACTER_DEVICE void add_product(Four& sum, const float* factor, int step, const float* x, int count) const {
#pragma unroll 4
        for (int b = 0; b < count; ++b) add_scaled(sum, factor[b * step], load_quad<4>(x + b * f.stride));
    }

    // Stores four numbers of V2 or dZ, which has `chunks` rows of each token.
    template <class T>
    COMPACTER_DEVICE void store_rows(const Parts& to, const Place& place, int chunks, const Four& four) const {
        const int row = place.token * chunks + place.first;
        if (chunks % 4 == 0) {
            if (place.first < chunks) store_parts<T>(to, place.c, row, four);
            return;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (place.first + j < chunks) store_parts<T>(to, place.c, row + j, four.at[j]);
    }

    // Sums over tokens: each number has some neighbouring lanes, the more the fewer numbers there are. body(number, first, step)
    // gives the sum of a lane, store(number, total) gets that of all.
    template <int Size, class Body, class Store>
    COMPACTER_DEVICE void for_each_sum(int count, const Body& body, const Store& store) const {
        int log_lanes = 0;
        while (log_lanes < 5 && count << (log_lanes + 1) <= static_cast<int>(blockDim.x)) ++log_lanes;
        const int lanes = 1 << log_lanes, all = count << log_lanes;
        for (int e = threadIdx.x; e < (all + 31) / 32 * 32; e += blockDim.x) {
            const int number = min(e >> log_lanes, count - 1), lane = e & (lanes - 1);
            Quad<Size> sum = body(number, lane, lanes);
            for (int flip = lanes >> 1; flip; flip >>= 1)
#pragma unroll
                for (int j = 0; j < Size; ++j) sum.at[j] += __shfl_xor_sync(0xffffffff, sum.at[j], flip);
            if (lane == 0 && e < all) store(number, sum);
        }
    }

    // gradient[slot][a * stride + b] += sum over all quads of L[slot][a] R[slot][b]
    COMPACTER_DEVICE void add_outer(int gradient, int gradient_bytes, int left, int lefts, int right, int rights) const {
        const auto split = [&](int number, int& slot, int& a, int& b) {
            const int row = s.by_inner.quotient(number);
            b = number - row * rights;
            slot = s.by_m.quotient(row);
            a = row - slot * lefts;
        };
        for_each_sum<1>(
            f.columns * rights,
            [&](int number, int first, int step) {
                int slot, a, b;
                split(number, slot, a, b);
                Quad<1> sum{};
#pragma unroll 4
                for (int quad = first; quad < f.quads; quad += step)
                    sum.at[0] = add_dot(sum.at[0], load_quad<4>(at(left, slot * lefts + a, quad)),
                                        load_quad<4>(at(right, slot * rights + b, quad)));
                return sum;
            },
            [&](int number, const Quad<1>& sum) {
                int slot, a, b;
                split(number, slot, a, b);
                floats_at(gradient + slot * gradient_bytes)[a * rights + b] += sum.at[0];
            });
    }

    // gradient[slot][i][p,q] += sum over tokens and rho of w Z[p] dV[q], for four q at once
    COMPACTER_DEVICE void add_rule_gradient(int gradient, int gradient_bytes, int z, int dv, bool weighted) const {
        const auto split = [&](int number, int& matrix, int& p, int& q) {
            const int row = s.by_blocks.quotient(number);
            q = (number - row * s.blocks) * 4;
            matrix = s.by_n.quotient(row);
            p = row - matrix * s.n;
        };
        for_each_sum<4>(
            f.slots * s.terms * s.n * s.blocks,
            [&](int number, int first, int step) {
                int matrix, p, q;
                split(number, matrix, p, q);
                const int slot = s.by_m.quotient(matrix * s.rank);
                Four sum{};
                for (int c = matrix * s.rank; c < (matrix + 1) * s.rank; ++c) {
                    const float *left = floats_at(z) + c * f.stride + p, *right = floats_at(dv) + c * f.stride + q;
#pragma unroll 4
                    for (int token = first; token < s.tokens; token += step) {
                        const float w = weighted ? weight(slot, token) : 1.f;
                        add_scaled(sum, left[token * s.n] * w, load_quad<4>(right + token * s.n));
                    }
                }
                return sum;
            },
            [&](int number, const Four& sum) {
                int matrix, p, q;
                split(number, matrix, p, q);
                const int slot = s.by_m.quotient(matrix * s.rank);
                float* to = floats_at(gradient + slot * gradient_bytes) + (matrix - slot * s.terms) * s.rule_stride + p * s.n + q;
                Four total = load_quad<4>(to);
                add_scaled(total, 1.f, sum);
                store_quad<4>(to, total);
            });
    }

    // gradient[slot][v][q] += sum over tokens of dy[v][q], for `count` v and n q.
    COMPACTER_DEVICE void add_bias_gradient(int gradient, int gradient_bytes, int dy, int count, int n) const {
        const int numbers = count * n;
        for (int e = threadIdx.x; e < f.slots * numbers; e += blockDim.x) {
            const int slot = e / numbers, of_slot = e - slot * numbers, v = of_slot / n;
            const float* from = floats_at(dy) + (slot * count + v) * f.stride + of_slot - v * n;
            float sum = 0.f;
#pragma unroll 4
            for (int token = 0; token < s.tokens; ++token) sum += from[token * n];
            floats_at(gradient + slot * gradient_bytes)[of_slot] += sum;
        }
    }
};

}  // namespace compacter::cuda
