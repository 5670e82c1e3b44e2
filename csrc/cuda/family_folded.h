// Between the wide factors of a bank of Compacter adapters: a rule and the small factor beside it are one matrix, and the
// middle consists of matrix products whose rows are tokens. With c = (i, rho),
//
//     C1[(c,p),(q,v)] = A1_i[p,q] t1_c[v]      y = Z C1 + b1    h = act(y)            V2 = h C2^T
//     C2[(c,q),(p,v)] = A2_i[p,q] s2_c[v]      dh = dV2 C2      dy = dh act'(y)       dZ = dy C1^T
//     dC1 = sum_tok Z^T dy                     dC2 = sum_tok dV2^T h                  db1 = sum_tok dy
//
// The weight w of a mix multiplies h and dy, and its gradient is <V2, dV2> = <h, dh>. A job of a warp is 16 rows and 16 columns
// of a product of one slot.
#pragma once

#include "activations.h"
#include "small.h"

namespace compacter::cuda {

using Block16 = float[2][4];  // sums of 16 x 16 numbers: two eights of columns

// sum += a b. Half: only the first eight of the 16 summed numbers.
template <class T, bool Half, int Parts, int RightParts>
COMPACTER_DEVICE void add_products(Block16& sum, const uint32_t (&a)[Parts][4], const uint32_t (&b)[RightParts][4]) {
    Block16 apart = {};
    Block16& total = T::parts == 3 ? apart : sum;
#pragma unroll
    for (int right = 0; right < RightParts; ++right)
#pragma unroll
        for (int left = 0; left < Parts; ++left) {
            if (!counts<Parts, Parts>(left, right)) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if constexpr (Half)
                    mma_16x8x8(total[j], {a[left][0], a[left][1]}, b[right][2 * j]);
                else
                    mma_16x8x16(total[j], a[left], {b[right][2 * j], b[right][2 * j + 1]});
        }
    if constexpr (T::parts == 3)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] += apart[j][e];
}

// sum += the sums of the columns of b, in every row.
template <class T, int Parts>
COMPACTER_DEVICE void add_ones(Block16& sum, const uint32_t (&b)[Parts][4]) {
    constexpr uint32_t ones = 0x3f803f80;
    Block16 apart = {};
#pragma unroll
    for (int part = 0; part < Parts; ++part)
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_16x8x16(apart[j], {ones, ones, ones, ones}, {b[part][2 * j], b[part][2 * j + 1]});
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += apart[j][e];
}

// MatrixParts: those of C1 and C2.
template <class T, int MatrixParts>
struct FoldedMiddle {
    static constexpr int parts = T::factor_parts;
    const Family& f;
    const Sizes& s = f.middle;
    const Folded& folded = f.folded;
    const FamilyPlaces& places;

    COMPACTER_DEVICE FoldedMiddle(const Family& family, const FamilyPlaces& at) : f(family), places(at) {}

    // Numbers of 16 tokens and one slot.
    COMPACTER_DEVICE Parts z(int offset, int slot, int token) const {
        return at(parts_at(offset, folded.z_stride, s.tokens), token, slot * folded.padded_rows);
    }
    COMPACTER_DEVICE Parts h(int offset, int slot, int token) const {
        return at(parts_at(offset, folded.h_stride, s.tokens), token, slot * folded.padded_width);
    }
    COMPACTER_DEVICE static Parts at(Parts numbers, int token, int column) {
        numbers.first += token * numbers.stride + column;
        return numbers;
    }
    COMPACTER_DEVICE Parts matrix(int offset, int slot) const {
        return parts_at(offset + slot * places.factors_bytes, folded.stride, folded.padded_rows);
    }
    COMPACTER_DEVICE float weight(int slot, int token) const {
        return token < s.tokens ? floats_at(places.mix)[slot * s.tokens + token] : 0.f;
    }

    // body(slot, first row, block) for `groups` groups of 16 rows of each slot and so many blocks.
    template <class Body>
    COMPACTER_DEVICE void for_each_job(const Divisor& by_groups, int blocks, const Body& body) const {
        const int groups = static_cast<int>(by_groups.divisor), jobs = f.slots * groups * blocks;
        for (int job = threadIdx.x / 32; job < jobs; job += blockDim.x / 32) {
            const int rest = folded.by_slots.quotient(job), block = by_groups.quotient(rest);
            body(job - rest * f.slots, (rest - block * groups) * 16, block);
        }
    }

    // sum += left C, for 16 columns of C from `column` on.
    COMPACTER_DEVICE void widen(Block16& sum, const Parts& left, const Parts& c, int column) const {
        const Lane lane;
        const int row = lane.index % 16, last = folded.padded_width - 8;
        const uint16_t *a = left.first + row * left.stride + lane.index / 16 * 8;
        const uint16_t *b = c.first + row * c.stride + min(column + lane.index / 16 * 8, last);
#pragma unroll 1
        for (int k = 0; k < folded.padded_rows; k += 16, a += 16, b += 16 * c.stride) {
            uint32_t of_left[parts][4], of_c[MatrixParts][4];
#pragma unroll
            for (int part = 0; part < parts; ++part) load_matrices(of_left[part], a + part * left.part);
#pragma unroll
            for (int part = 0; part < MatrixParts; ++part) load_matrices_transposed(of_c[part], b + part * c.part);
            add_products<T, false>(sum, of_left, of_c);
        }
    }
    // sum += left C^T, for 16 rows of C from `row` on.
    COMPACTER_DEVICE void narrow(Block16& sum, const Parts& left, const Parts& c, int row) const {
        const Lane lane;
        const uint16_t *a = left.first + lane.index % 16 * left.stride;
        const uint16_t *b = c.first + (row + lane.index / 16 * 8 + lane.index % 8) * c.stride;
        const auto add = [&](int k, auto half) {
            constexpr bool Half = decltype(half)::value;
            uint32_t of_left[parts][4], of_c[MatrixParts][4];
#pragma unroll
            for (int part = 0; part < parts; ++part)
                load_matrices(of_left[part], a + part * left.part + k + (Half ? 0 : lane.index / 16 * 8));
#pragma unroll
            for (int part = 0; part < MatrixParts; ++part)
                load_matrices(of_c[part], b + part * c.part + k + (Half ? 0 : lane.index / 8 % 2 * 8));
            add_products<T, Half>(sum, of_left, of_c);
        };
        int k = 0;
#pragma unroll 1
        for (; k + 8 < folded.padded_width; k += 16) add(k, std::false_type{});
        if (k < folded.padded_width) add(k, std::true_type{});
    }
    // sum += left^T right over all tokens, for 16 columns of left from `row` on and of right from `column` on; ones: the sums of
    // the columns of right, in every row.
    COMPACTER_DEVICE void outer(Block16& sum, Block16& ones, const Parts& left, const Parts& right, int row, int column) const {
        const Lane lane;
        const int last = folded.padded_width - 8;
        const uint16_t *a = left.first + (lane.index / 16 * 8 + lane.index % 8) * left.stride + row + lane.index / 8 % 2 * 8;
        const uint16_t *b = right.first + lane.index % 16 * right.stride + min(column + lane.index / 16 * 8, last);
#pragma unroll 1
        for (int token = 0; token < s.tokens; token += 16, a += 16 * left.stride, b += 16 * right.stride) {
            uint32_t of_left[parts][4], of_right[parts][4];
#pragma unroll
            for (int part = 0; part < parts; ++part) {
                load_matrices_transposed(of_left[part], a + part * left.part);
                load_matrices_transposed(of_right[part], b + part * right.part);
            }
            add_products<T, false>(sum, of_left, of_right);
            if (row == 0) add_ones<T>(ones, of_right);
        }
    }

    // Stores the numbers c and c + 1 of a chunk in Z or dV2 of their token, c even. All m but 1 are even.
    COMPACTER_DEVICE void store_contracted(int offset, int c, int token, int chunk, float low, float high) const {
        if (c >= f.columns) return;
        uint32_t pair[parts];
        split(low, high, pair);
        const int padding = folded.padded_rows - folded.rows, next = s.m == 1 ? folded.padded_rows : f.n_in;
        const Parts to = parts_at(offset, folded.z_stride, s.tokens);
        uint16_t* const there = to.first + token * to.stride + c * f.n_in + chunk + (padding ? s.by_m.quotient(c) * padding : 0);
        const bool both = s.m > 1 || c + 1 < f.columns;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            there[part * to.part] = static_cast<uint16_t>(pair[part]);
            if (both) there[part * to.part + next] = static_cast<uint16_t>(pair[part] >> 16);
        }
    }

    // Starts y with the bias of columns `column` on.
    COMPACTER_DEVICE void start(Block16& y, int slot, int column) const {
        const Lane lane;
        const float* bias = floats_at(places.folded.bias + slot * places.factors_bytes);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int at = min(column + j * 8, folded.padded_width - 8) + lane.t * 2;
#pragma unroll
            for (int e = 0; e < 4; ++e) y[j][e] = bias[at + e % 2];
        }
    }
    // body(eight, column) for those of the two eights from `column` on that exist.
    template <class Body>
    COMPACTER_DEVICE void for_each_eight(int column, const Body& body) const {
        const Lane lane;
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (column + j * 8 < folded.padded_width) body(j, column + j * 8 + lane.t * 2);
    }
    // Two neighbouring numbers of h or dy of a token.
    COMPACTER_DEVICE void store_pair(const Parts& to, int token, int column, float low, float high) const {
        uint32_t pair[parts];
        split(low, high, pair);
#pragma unroll
        for (int part = 0; part < parts; ++part)
            *reinterpret_cast<uint32_t*>(to.first + part * to.part + token * to.stride + column) = pair[part];
    }

    // From Z to w h.
    COMPACTER_DEVICE void to_h(int from, int to) const {
        for_each_job(folded.by_groups, folded.blocks(), [&](int slot, int token, int block) {
            const Lane lane;
            const int column = block * 16;
            const float w[2] = {weight(slot, token + lane.g), weight(slot, token + lane.g + 8)};
            const Parts there = h(to, slot, token);
            Block16 y;
            start(y, slot, column);
            widen(y, z(from, slot, token), matrix(places.folded.first, slot), column);
            for_each_eight(column, [&](int j, int at) {
                with_activation(f.activation, [&](auto function) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) y[j][e] = function(y[j][e]).value * w[e / 2];
                });
                store_pair(there, lane.g, at, y[j][0], y[j][1]);
                store_pair(there, lane.g + 8, at, y[j][2], y[j][3]);
            });
        });
    }
    // From Z and dV2 to w h and dy, and <h, dh> of each token if of_mix >= 0.
    COMPACTER_DEVICE void to_h_and_dy(int from_z, int from_dv2, int to_h, int to_dy, int of_mix) const {
        for_each_job(folded.by_groups, folded.blocks(), [&](int slot, int token, int block) {
            const Lane lane;
            const int column = block * 16;
            const float w[2] = {weight(slot, token + lane.g), weight(slot, token + lane.g + 8)};
            const Parts of_h = h(to_h, slot, token), of_dy = h(to_dy, slot, token);
            float both[2] = {};
            Block16 y, dh = {};
            start(y, slot, column);
            widen(y, z(from_z, slot, token), matrix(places.folded.first, slot), column);
            widen(dh, z(from_dv2, slot, token), matrix(places.folded.second, slot), column);
            for_each_eight(column, [&](int j, int at) {
                with_activation(f.activation, [&](auto function) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const ValueAndSlope a = function(y[j][e]);
                        both[e / 2] += a.value * dh[j][e];
                        y[j][e] = a.value * w[e / 2];
                        dh[j][e] *= a.slope * w[e / 2];
                    }
                });
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    store_pair(of_h, lane.g + half * 8, at, y[j][half * 2], y[j][half * 2 + 1]);
                    store_pair(of_dy, lane.g + half * 8, at, dh[j][half * 2], dh[j][half * 2 + 1]);
                }
            });
            if (of_mix < 0) return;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = token + lane.g + half * 8;
                both[half] += __shfl_xor_sync(0xffffffff, both[half], 1);
                both[half] += __shfl_xor_sync(0xffffffff, both[half], 2);
                if (lane.t == 0 && row < s.tokens) floats_at(of_mix)[(block * f.slots + slot) * s.tokens + row] = both[half];
            }
        });
    }

    // V2 from h by C2, or dZ from dy by C1, as [part][c][row].
    COMPACTER_DEVICE void back(int from, int matrices, const Parts& to) const {
        for_each_job(folded.by_groups, folded.padded_rows / 16, [&](int slot, int token, int block) {
            const Lane lane;
            Block16 sum = {};
            narrow(sum, h(from, slot, token), matrix(matrices, slot), block * 16);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = block * 16 + j * 8 + lane.t * 2;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int its = token + lane.g + half * 8;
                    if (its < s.tokens) store_row(to, slot, row, its, sum[j][half * 2], sum[j][half * 2 + 1]);
                }
            }
        });
    }
    // Two neighbouring numbers (c, chunk) of a token.
    COMPACTER_DEVICE void store_row(const Parts& to, int slot, int row, int token, float low, float high) const {
        const int n = f.n_in, c = folded.by_n.quotient(row);
        if (row >= folded.rows) return;
        uint32_t pair[parts];
        split(low, high, pair);
        uint16_t* const there = to.first + (slot * s.m + c) * to.stride + token * n + row - c * n;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            if (n > 1) {
                *reinterpret_cast<uint32_t*>(there + part * to.part) = pair[part];
                continue;
            }
            there[part * to.part] = static_cast<uint16_t>(pair[part]);
            if (row + 1 < folded.rows) there[part * to.part + to.stride] = static_cast<uint16_t>(pair[part] >> 16);
        }
    }

    // Adds left^T right of all slots to sums [row][column], and the sums of the columns of `right` to those at bias, or none.
    COMPACTER_DEVICE void add_sums(int sums, int bias, int bytes, int left, int right) const {
        for_each_job(folded.by_rows, folded.blocks(), [&](int slot, int row, int block) {
            const Lane lane;
            Block16 sum = {}, ones = {};
            outer(sum, ones, z(left, slot, 0), h(right, slot, 0), row, block * 16);
            for_each_eight(block * 16, [&](int j, int column) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = row + lane.g + half * 8;
                    float* to = floats_at(sums + slot * bytes) + at * folded.stride + column;
                    if (at < folded.rows) add_pair(to, sum[j][half * 2], sum[j][half * 2 + 1]);
                }
                if (bias >= 0 && row == 0 && lane.g == 0)
                    add_pair(floats_at(bias + slot * bytes) + column, ones[j][0], ones[j][1]);
            });
        });
    }
    COMPACTER_DEVICE static void add_pair(float* to, float low, float high) {
        auto* pair = reinterpret_cast<float2*>(to);
        const float2 before = *pair;
        *pair = make_float2(before.x + low, before.y + high);
    }
};

}  // namespace compacter::cuda
