// The layer norm of an adapter's output, row by row while a block of rows is in the first cache:
//
//   m = sum_u y[u] / k, c = sum_u (y[u] - m) / k, r = 1 / sqrt(sum_u (y[u] - m)^2 / k - c^2 + eps)
//   z[u] = ((y[u] - m) - c) r, out[u] = z[u] w[u] + b[u]
//   dy[u] = r (g[u] w[u] - sum_v g[v] w[v] / k - z[u] sum_v g[v] w[v] z[v] / k)
//
// c corrects the rounding of m. For a row far from 0, m has an error, larger with fewer vectors,
// and fp32 cannot express the mean; c is a sum of small numbers (Chan, Golub and LeVeque, 1983).
// Backward computes m and r again from y, which it reads anyway.
#pragma once

#include <math.h>

#include "element.h"
#include "kernels.h"

namespace compacter::COMPACTER_ISA {

template <class T>
struct Normalisation {
    cpu::Norm norm;
    int64_t k;
    bool streaming;  // forward

    // `out` may be `y`.
    void forward(const T* y, int64_t tokens, T* out) const {
        const bool streams = streaming;
        for (; tokens > 0; --tokens, y += k, out += k) {
            const Row row = moments(y, streams ? nullptr : out, nullptr);
            each([&](int64_t u, auto, auto numbers) COMPACTER_INLINE_LAMBDA {
                const Vec z = row.z(numbers.get(y + u));
                numbers.put(out + u, z * numbers.get(norm.weight + u) + numbers.get(norm.bias + u), streams);
            });
        }
    }

    // g: the gradient of the normed rows. dy, the memory for the gradient of y, may be `y`.
    void backward(const T* y, const T* g, int64_t tokens, T* dy) const {
        for (; tokens > 0; --tokens, y += k, g += k, dy += k) {
            const Row row = moments(y, dy, g);
            Vec sum[unroll] = {}, along[unroll] = {};
            each([&](int64_t u, auto slot, auto numbers) COMPACTER_INLINE_LAMBDA {
                const Vec gw = numbers.get(g + u) * numbers.get(norm.weight + u);
                sum[slot] += gw;
                along[slot] += gw * row.z(numbers.get(y + u));
            });
            const Vec mean = average(sum), slope = average(along);
            each([&](int64_t u, auto, auto numbers) COMPACTER_INLINE_LAMBDA {
                const Vec z = row.z(numbers.get(y + u));
                numbers.put(dy + u, row.rate * (numbers.get(g + u) * numbers.get(norm.weight + u) - mean - z * slope), false);
            });
        }
    }

private:
    static constexpr int unroll = 4;

    struct Row {
        Vec mean, rest, rate;

        COMPACTER_INLINE Vec z(Vec y) const { return ((y - mean) - rest) * rate; }
    };

    // It also prefetches the rows that are written and read next, unless they are null.
    Row moments(const T* y, const T* written, const T* read) const {
        Vec sum[unroll] = {}, rests[unroll] = {}, squares[unroll] = {};
        each([&](int64_t u, auto slot, auto numbers) COMPACTER_INLINE_LAMBDA {
            sum[slot] += numbers.get(y + u);
            if (slot % vectors_per_line<T> == 0) {
                if (written) COMPACTER_PREFETCH(written + u, 1, 3);
                if (read) COMPACTER_PREFETCH(read + u, 0, 3);
            }
        });
        const Vec mean = average(sum);
        each([&](int64_t u, auto slot, auto numbers) COMPACTER_INLINE_LAMBDA {
            const Vec apart = numbers.only(numbers.get(y + u) - mean);
            rests[slot] += apart;
            squares[slot] += apart * apart;
        });
        const Vec rest = average(rests);
        float variance = (average(squares) - rest * rest)[0];
        if (variance < 0) variance = 0;  // possible for equal numbers; NaN stays
        return {mean, rest, splat(1.f / sqrtf(variance + norm.eps))};
    }

    Vec average(const Vec (&sums)[unroll]) const {
        const Quad four = add_quarters((sums[0] + sums[1]) + (sums[2] + sums[3]));
        return splat(((four[0] + four[1]) + (four[2] + four[3])) / static_cast<float>(k));
    }

    // Access to a vector of a row. The last vector may be cut after `count` numbers.
    template <bool Cut>
    struct Numbers {
        int64_t count;

        template <class P>
        COMPACTER_INLINE Vec get(const P* p) const { return Cut ? load(p, count) : load(p); }

        COMPACTER_INLINE void put(T* p, Vec v, bool streams) const {
            if constexpr (Cut)
                store(p, v, count);
            else if (streams)
                stream(p, v);
            else
                store(p, v);
        }

        // v with zeros behind the last number.
        COMPACTER_INLINE Vec only(Vec v) const {
            float kept[W];
            store(kept, v);
            return get(kept);
        }
    };

    // body(u, index of the sum, Numbers) for each vector of a row.
    template <class Body>
    COMPACTER_INLINE void each(const Body& body) const {
        columns<unroll, 1>(k, [&](auto vectors, int64_t u, auto cut, int64_t count) COMPACTER_INLINE_LAMBDA {
            const Numbers<decltype(cut)::value> numbers{count};
            COMPACTER_UNROLL(4)
            for (int slot = 0; slot < decltype(vectors)::value; ++slot) body(u + slot * W, slot, numbers);
        });
    }
};

}  // namespace compacter::COMPACTER_ISA
