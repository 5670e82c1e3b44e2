// Reads parameters of any float dtype as fp32, and writes fp32 sums in the dtype of a gradient.
#pragma once

#include "../adapter.h"
#include "element.h"

namespace compacter::cuda {

// A number whose load has started, without a branch that needs it: many loads can be in flight.
struct Asked {
    DType dtype;
    uint32_t low, high;

    Asked() = default;
    COMPACTER_DEVICE Asked(const Array& array, int64_t at) : dtype(array.dtype), low(0), high(0) {
        const bool half = dtype == DType::bf16 || dtype == DType::f16, twice = dtype == DType::f64;
        const auto* p = static_cast<const unsigned char*>(array.data) + at * (half ? 2 : twice ? 8 : 4);
        if (half) low = *reinterpret_cast<const uint16_t*>(p);
        if (!half) low = *reinterpret_cast<const uint32_t*>(p);
        if (twice) high = *reinterpret_cast<const uint32_t*>(p + 4);
    }

    COMPACTER_DEVICE float value() const {
        if (dtype == DType::f32) return __uint_as_float(low);
        if (dtype == DType::bf16) return __uint_as_float(low << 16);
        if (dtype == DType::f16) return from_f16(static_cast<uint16_t>(low));
        return static_cast<float>(double_of(high, low));
    }
};

COMPACTER_DEVICE float read(const Array& array, int64_t at) { return Asked(array, at).value(); }

COMPACTER_DEVICE void write(const Array& array, int64_t at, float value) {
    switch (array.dtype) {
        case DType::f32: static_cast<float*>(array.data)[at] = value; break;
        case DType::bf16: static_cast<uint16_t*>(array.data)[at] = static_cast<uint16_t>(pack_bf16(value, 0.f)); break;
        case DType::f16: static_cast<uint16_t*>(array.data)[at] = static_cast<uint16_t>(pack_f16(value, 0.f)); break;
        default: static_cast<double*>(array.data)[at] = value;
    }
}

}  // namespace compacter::cuda
