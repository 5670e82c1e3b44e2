// Parameters of any float dtype, read as fp32; fp32 sums, written in a gradient's dtype.
#pragma once

#include "../adapter.h"
#include "element.h"

namespace compacter::cuda {

COMPACTER_DEVICE float read(const Array& array, int64_t at) {
    switch (array.dtype) {
        case DType::f32: return static_cast<const float*>(array.data)[at];
        case DType::bf16: return to_float(static_cast<const bf16*>(array.data)[at]);
        case DType::f16: return to_float(static_cast<const f16*>(array.data)[at]);
        default: return static_cast<float>(static_cast<const double*>(array.data)[at]);
    }
}

COMPACTER_DEVICE void write(const Array& array, int64_t at, float value) {
    switch (array.dtype) {
        case DType::f32: static_cast<float*>(array.data)[at] = value; break;
        case DType::bf16: static_cast<uint16_t*>(array.data)[at] = static_cast<uint16_t>(pack_bf16(value, 0.f)); break;
        case DType::f16: static_cast<uint16_t*>(array.data)[at] = static_cast<uint16_t>(pack_f16(value, 0.f)); break;
        default: static_cast<double*>(array.data)[at] = value;
    }
}

}  // namespace compacter::cuda
