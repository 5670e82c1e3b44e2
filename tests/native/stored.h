// The count of what holds, and the parameters of a projection in exactly sized buffers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "cases.h"
#include "exact.h"
#include "reference.h"

namespace compacter::check {

inline int passed = 0, failed = 0;
inline uint64_t digest = 14695981039346656037u;  // of all results (FNV-1a), to compare the bits of two runs

inline double rounding(DType dtype) {
    return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
}

// Largest error over largest value, against the rounding of the dtype and that of a chain of fp32 sums.
inline void expect(const std::string& name, const char* what, const Tensor& got, const Numbers& want) {
    double error = 0., largest = 1e-30;
    const Numbers values = got.values();
    for (size_t j = 0; j < want.size(); ++j) {
        uint64_t bits;
        std::memcpy(&bits, &values[j], sizeof bits);
        digest = (digest ^ bits) * 1099511628211u;
        largest = std::max(largest, std::abs(want[j]));
        const double difference = std::abs(values[j] - want[j]);
        if (!(difference <= error)) error = difference;  // NaN stays
    }
    if (error <= largest * (rounding(got.dtype) + 2e-5)) {
        ++passed;
    } else {
        ++failed;
        std::printf("FAILED %s %s: error %.3g of %.3g\n", name.c_str(), what, error, largest);
    }
}

inline void expect(const std::string& name, const char* what, bool holds) {
    holds ? ++passed : ++failed;
    if (!holds) std::printf("FAILED %s %s\n", name.c_str(), what);
}

// One projection's parameters in memory, and poisoned gradients of the same shape.
struct Stored {
    int64_t n, rank, in, out;
    Tensor rule, left, right, bias;

    Stored(const Case& c, bool down)
        : n(down ? c.n_down : c.n_up),
          rank(down ? c.rank_down : c.rank_up),
          in(down ? c.k : c.d),
          out(down ? c.d : c.k),
          rule(n * n * n, c.parameters),
          left(in * rank, c.parameters, c.offset),
          right(out * rank, c.parameters),
          bias(c.bias ? out : 0, c.parameters, c.bias ? c.offset : 0) {}

    void randomise(std::mt19937& random) {
        rule.randomise(random, 0.5);
        left.randomise(random, 1. / std::sqrt(double(in / n * rank)));
        right.randomise(random, 0.7);
        if (bias.count) bias.randomise(random, 0.3);
    }

    Parameters parameters() { return {rule.array(), left.array(), right.array(), bias.array()}; }
    Projection projection() { return {n, n, n, rank, in, out, false, parameters()}; }
    Weights values() const { return {n, rank, in, out, rule.values(), left.values(), right.values(), bias.values()}; }

    bool same_bits(const Stored& other) const {
        return rule.same_bits(other.rule) && left.same_bits(other.left) && right.same_bits(other.right) && bias.same_bits(other.bias);
    }
};

inline void expect_gradients(const std::string& name, const Stored& got, const Weights& want) {
    if (got.rule.count) expect(name, "rule", got.rule, want.rule);
    if (got.left.count) expect(name, "left", got.left, want.left);
    if (got.right.count) expect(name, "right", got.right, want.right);
    if (got.bias.count) expect(name, "bias", got.bias, want.bias);
}

// Leaves out every other gradient.
inline void drop_some(Stored& gradients) { gradients.rule = gradients.right = Tensor(); }

}  // namespace compacter::check
