// Conversions of one number of any float dtype to fp32 and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "../adapter.h"

namespace compacter::cpu {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <DType>
struct Number;

template <>
struct Number<DType::f32> {
    float stored;
    float get() const { return stored; }
    void set(float value) { stored = value; }
};

template <>
struct Number<DType::f64> {
    double stored;
    float get() const { return static_cast<float>(stored); }
    void set(float value) { stored = value; }
};

template <>
struct Number<DType::bf16> {
    uint16_t stored;
    float get() const { return from_bits(uint32_t{stored} << 16); }
    void set(float value) {
        const uint32_t bits = to_bits(value);
        stored = static_cast<uint16_t>(value != value ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
};

template <>
struct Number<DType::f16> {
    uint16_t stored;
    float get() const {
        // The lesser of two is right. No number here is subnormal in fp32, where it might count as 0.
        const uint32_t shifted = (stored & 0x7fffu) << 13;
        const float normal = from_bits(shifted + (112u << 23)), subnormal = from_bits(shifted + (113u << 23)) - 0x1p-14f;
        const uint32_t bits = to_bits(subnormal < normal ? subnormal : normal);
        return from_bits(((stored & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : bits) | (stored & 0x8000u) << 16);
    }
    void set(float value) {
        const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
        uint32_t half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
        if (magnitude < 0x38800000u) half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
        if (magnitude >= 0x477ff000u) half = value != value ? 0x7e00u : 0x7c00u;
        stored = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
    }
};

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <class Body>
void with_number(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f32: return body(Number<DType::f32>{});
        case DType::f64: return body(Number<DType::f64>{});
        case DType::bf16: return body(Number<DType::bf16>{});
        case DType::f16: return body(Number<DType::f16>{});
    }
}

}  // namespace compacter::cpu
