// Heap buffers of exactly the wanted size, so that AddressSanitizer sees a step beyond either end, misaligned on demand.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/convert.h"

namespace compacter::check {

class Tensor {
public:
    Tensor() = default;

    // `offset` elements of slack in front: the data then starts where no vector would.
    Tensor(int64_t count, DType dtype, int64_t offset = 0)
        : count(count), dtype(dtype), offset(offset), bytes(static_cast<size_t>((count + offset) * size(dtype))) {
        fill([](int64_t) { return std::numeric_limits<double>::quiet_NaN(); });
    }

    static int64_t size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

    void* data() { return count ? bytes.data() + offset * size(dtype) : nullptr; }
    const void* data() const { return const_cast<Tensor*>(this)->data(); }
    Array array() { return {data(), dtype}; }

    template <class Value>
    void fill(const Value& value) {
        cpu::with_number(dtype, [&](auto zero) {
            auto* to = static_cast<decltype(zero)*>(data());
            for (int64_t j = 0; j < count; ++j) to[j].set(static_cast<float>(value(j)));
        });
    }

    void randomise(std::mt19937& random, double spread) {
        std::normal_distribution<double> normal(0., spread);
        fill([&](int64_t) { return normal(random); });
    }

    std::vector<double> values() const {
        std::vector<double> result(static_cast<size_t>(count));
        cpu::with_number(dtype, [&](auto zero) {
            const auto* from = static_cast<const decltype(zero)*>(data());
            for (int64_t j = 0; j < count; ++j) result[static_cast<size_t>(j)] = from[j].get();
        });
        return result;
    }

    bool same_bits(const Tensor& other) const { return bytes == other.bytes; }

    int64_t count = 0;
    DType dtype = DType::f32;

private:
    int64_t offset = 0;
    std::vector<unsigned char> bytes;
};

}  // namespace compacter::check
