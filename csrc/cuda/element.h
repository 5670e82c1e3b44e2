// Eight numbers of x, g or the output: as in memory, as fp32, as bf16 pairs for matrix products.
//
// Matrix products multiply bf16 numbers and sum in fp32. A number that bf16 cannot hold is split:
//     value = part[0] + part[1] + part[2]        8 significant bits each
// x has one part in bf16, two in fp16, three in fp32. A weight or a number between the projections
// has two for a 16-bit x and three for fp32. A product omits the terms below the last part.
#pragma once

#include <type_traits>

#include "ptx.h"

namespace compacter::cuda {

struct f32 {
    float value;
    static constexpr int parts = 3, factor_parts = 3;
};
struct bf16 {
    uint16_t bits;
    static constexpr int parts = 1, factor_parts = 2;
};
struct f16 {
    uint16_t bits;
    static constexpr int parts = 2, factor_parts = 2;
};

COMPACTER_DEVICE float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
COMPACTER_DEVICE float high_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The rounding error of a value; 0 for an Inf or a NaN, which the first part holds alone.
COMPACTER_DEVICE float rest_of(float value, float rounded) {
    return (__float_as_uint(rounded) & 0x7f800000u) == 0x7f800000u ? 0.f : value - rounded;
}

// Splits two floats into one pair for each part.
template <int Parts>
COMPACTER_DEVICE void split(float low, float high, uint32_t (&pair)[Parts]) {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
        pair[part] = pack_bf16(low, high);
        low = rest_of(low, low_of(pair[part]));
        high = rest_of(high, high_of(pair[part]));
    }
}

// Whether the product of part a of one operand and part b of the other is computed.
template <int A, int B>
COMPACTER_DEVICE constexpr bool counts(int a, int b) {
    return a + b < (A > B ? A : B);
}

// Eight numbers of a row as in memory.
template <class T>
struct Eight {
    static constexpr int vectors = sizeof(T) * 8 / 16;
    uint4 raw[vectors];
};

// One number as fp32.
COMPACTER_DEVICE float to_float(f32 x) { return x.value; }
COMPACTER_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
COMPACTER_DEVICE float to_float(f16 x) { return from_f16(x.bits); }

// Pairs of 16-bit numbers to fp32 and back.
COMPACTER_DEVICE void widen(bf16, uint32_t pair, float& low, float& high) {
    low = low_of(pair);
    high = high_of(pair);
}
COMPACTER_DEVICE void widen(f16, uint32_t pair, float& low, float& high) {
    low = from_f16(static_cast<uint16_t>(pair & 0xffffu));
    high = from_f16(static_cast<uint16_t>(pair >> 16));
}
COMPACTER_DEVICE uint32_t narrow(bf16, float low, float high) { return pack_bf16(low, high); }
COMPACTER_DEVICE uint32_t narrow(f16, float low, float high) { return pack_f16(low, high); }

COMPACTER_DEVICE uint32_t& word(uint4& v, int j) { return (&v.x)[j]; }
COMPACTER_DEVICE uint32_t word(const uint4& v, int j) { return (&v.x)[j]; }

template <class T>
COMPACTER_DEVICE void to_floats(const Eight<T>& eight, float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) widen(T{}, word(eight.raw[0], j), out[2 * j], out[2 * j + 1]);
}
COMPACTER_DEVICE void to_floats(const Eight<f32>& eight, float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __uint_as_float(word(eight.raw[j / 4], j % 4));
}

template <class T>
COMPACTER_DEVICE Eight<T> from_floats(T, const float (&in)[8]) {
    Eight<T> eight;
#pragma unroll
    for (int j = 0; j < 4; ++j) word(eight.raw[0], j) = narrow(T{}, in[2 * j], in[2 * j + 1]);
    return eight;
}
COMPACTER_DEVICE Eight<f32> from_floats(f32, const float (&in)[8]) {
    Eight<f32> eight;
#pragma unroll
    for (int j = 0; j < 8; ++j) word(eight.raw[j / 4], j % 4) = __float_as_uint(in[j]);
    return eight;
}

// The four pairs of eight numbers, in parts.
template <class T>
COMPACTER_DEVICE void to_parts(const Eight<T>& eight, uint32_t (&pairs)[4][T::parts]) {
    float value[8];
    to_floats(eight, value);
#pragma unroll
    for (int j = 0; j < 4; ++j) split(value[2 * j], value[2 * j + 1], pairs[j]);
}
COMPACTER_DEVICE void to_parts(const Eight<bf16>& eight, uint32_t (&pairs)[4][1]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j][0] = word(eight.raw[0], j);
}

template <class T>
COMPACTER_DEVICE Eight<T> zeros() {
    Eight<T> eight;
#pragma unroll
    for (int v = 0; v < Eight<T>::vectors; ++v) eight.raw[v] = make_uint4(0, 0, 0, 0);
    return eight;
}

// Loads `count` <= 8 numbers, padded with zeros. vectors: all eight exist, aligned to 16 bytes.
template <class T>
COMPACTER_DEVICE Eight<T> load_eight(const T* p, int count, bool vectors) {
    Eight<T> eight = zeros<T>();
    if (vectors) {
        if (count > 0) {
#pragma unroll
            for (int v = 0; v < Eight<T>::vectors; ++v) eight.raw[v] = load_constant(reinterpret_cast<const uint4*>(p) + v);
        }
        return eight;
    }
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = j < count ? to_float(p[j]) : 0.f;
    return from_floats(T{}, value);
}

// Stores `count` <= 8 numbers. The store asks no cache to evict them first, since the next layer
// reads the output, and the layer before it the gradient of x.
template <class T>
COMPACTER_DEVICE void store_eight(T* p, const Eight<T>& eight, int count, bool vectors) {
    if (vectors) {
        if (count > 0) {
#pragma unroll
            for (int v = 0; v < Eight<T>::vectors; ++v) store_global(reinterpret_cast<uint4*>(p) + v, eight.raw[v]);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j >= count) continue;
        if constexpr (sizeof(T) == 4)
            reinterpret_cast<uint32_t*>(p)[j] = word(eight.raw[j / 4], j % 4);
        else
            reinterpret_cast<uint16_t*>(p)[j] = static_cast<uint16_t>(word(eight.raw[0], j / 2) >> (j % 2 * 16));
    }
}

}  // namespace compacter::cuda
