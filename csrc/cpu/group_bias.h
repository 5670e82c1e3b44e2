// The biases of a mix, for tokens that have the same weights, so that all of them add
//     b = sum_e w_e b2_e
// and, with s the sum of their g,
//     db2_e += w_e s        dw_e has the part <s, b2_e>
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

struct GroupBias {
    int64_t count, width;
    const float *biases, *weights;  // b2, [count][width]; w, [count][lanes]

    // The same products in the same order as in an Expansion, which gives the same bits.
    void sum(float* b) const {
        columns<4, 1>(width, [&](auto vectors, int64_t u, auto cut, int64_t numbers) COMPACTER_INLINE_LAMBDA {
            constexpr int U = decltype(vectors)::value;
            constexpr bool Cut = decltype(cut)::value;
            Vec sum[U] = {};
            for (int64_t e = 0; e < count; ++e) {
                const Vec weight = splat(weights[e * lanes]);
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) sum[k] += weight * part<Cut>(biases + e * width + u + k * W, numbers);
            }
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) put<Cut>(b + u + k * W, sum[k], numbers);
        });
    }

    // Adds to db2, [count][width], and sets dw of the first token to the part of all, and of the others
    // to 0, [count][lanes]. Either may be null. `rows` is memory for s.
    template <class T>
    void gradients(const T* g, int64_t tokens, float* of_biases, float* of_weights, float* rows) const {
        columns<4, 1>(width, [&](auto vectors, int64_t u, auto cut, int64_t numbers) COMPACTER_INLINE_LAMBDA {
            constexpr int U = decltype(vectors)::value;
            constexpr bool Cut = decltype(cut)::value;
            Vec sum[U] = {};
            for (int64_t t = 0; t < tokens; ++t)
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) sum[k] += part<Cut>(g + t * width + u + k * W, numbers);
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) put<Cut>(rows + u + k * W, sum[k], numbers);
        });
        for (int64_t e = 0; e < count; ++e) {
            if (of_biases) add(weights[e * lanes], rows, of_biases + e * width);
            if (!of_weights) continue;
            for (int l = 0; l < lanes; ++l) of_weights[e * lanes + l] = 0.f;
            of_weights[e * lanes] = product(rows, biases + e * width);
        }
    }

private:
    template <bool Cut, class T>
    COMPACTER_INLINE static Vec part(const T* p, int64_t numbers) {
        return Cut ? load(p, numbers) : load(p);
    }
    template <bool Cut>
    COMPACTER_INLINE static void put(float* p, Vec v, int64_t numbers) {
        Cut ? store(p, v, numbers) : store(p, v);
    }

    // to += weight * from
    void add(float weight, const float* from, float* to) const {
        columns<1>(width, [&](auto, int64_t u, auto cut, int64_t numbers) COMPACTER_INLINE_LAMBDA {
            constexpr bool Cut = decltype(cut)::value;
            put<Cut>(to + u, part<Cut>(to + u, numbers) + splat(weight) * part<Cut>(from + u, numbers), numbers);
        });
    }

    float product(const float* a, const float* b) const {
        Vec sum[4] = {};
        columns<4, 1>(width, [&](auto vectors, int64_t u, auto cut, int64_t numbers) COMPACTER_INLINE_LAMBDA {
            constexpr bool Cut = decltype(cut)::value;
            COMPACTER_UNROLL(4)
            for (int k = 0; k < decltype(vectors)::value; ++k)
                sum[k] += part<Cut>(a + u + k * W, numbers) * part<Cut>(b + u + k * W, numbers);
        });
        const Quad total = add_quarters((sum[0] + sum[1]) + (sum[2] + sum[3]));
        return (total[0] + total[1]) + (total[2] + total[3]);
    }
};

}  // namespace compacter::COMPACTER_ISA
