// Operations on the vectors of one instruction set that plain vector arithmetic lacks.
//
// Every file in csrc/cpu that names COMPACTER_ISA is compiled for each instruction set, in a
// namespace of that name. It must not call inline functions of the standard library: the linker
// keeps one copy of each, which might be the one for AVX-512.
#pragma once

#include <type_traits>

#include "vector.h"

namespace compacter::COMPACTER_ISA {

COMPACTER_INLINE Vec splat(float value) { return value - Vec{}; }
COMPACTER_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
COMPACTER_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// The same Span floats, repeated: 4, or also 8 if a vector has 16.
template <int Span>
COMPACTER_INLINE Vec load_repeated(const float* p) {
#if defined(__AVX512F__)
    if constexpr (Span == 8) return (Vec)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
    return (Vec)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
    return load(p);
#endif
}

// Quarter k of the result holds the sums of quarter k of a, b, c and d.
COMPACTER_INLINE Vec fold4(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    return (Vec)_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
#elif defined(__AVX2__)
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
    return (Vec)_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#else
    const Vec ab = Vec{a[0], b[0], a[1], b[1]} + Vec{a[2], b[2], a[3], b[3]};
    const Vec cd = Vec{c[0], d[0], c[1], d[1]} + Vec{c[2], d[2], c[3], d[3]};
    return Vec{ab[0], ab[1], cd[0], cd[1]} + Vec{ab[2], ab[3], cd[2], cd[3]};
#endif
}

COMPACTER_INLINE Quad quarter(Vec v, int k) {
    Quad quarters[W / 4];
    std::memcpy(quarters, &v, sizeof v);
    return quarters[k];
}

COMPACTER_INLINE Quad add_quarters(Vec v) {
    Quad sum = quarter(v, 0);
    COMPACTER_UNROLL(4)
    for (int k = 1; k < W / 4; ++k) sum += quarter(v, k);
    return sum;
}

COMPACTER_INLINE void store4(float* p, Quad v) { *reinterpret_cast<UnalignedQuad*>(p) = v; }
COMPACTER_INLINE Quad load4(const float* p) { return *reinterpret_cast<const UnalignedQuad*>(p); }

COMPACTER_INLINE int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

template <int Value>
using Int = std::integral_constant<int, Value>;

// Covers [begin, end) with tiles of decreasing sizes, the last one 1: body(Int<size>, first).
template <int Size, int... Smaller, class Body>
COMPACTER_INLINE void tiles(int64_t begin, int64_t end, const Body& body) {
    for (; begin + Size <= end; begin += Size) body(Int<Size>{}, begin);
    if constexpr (sizeof...(Smaller) > 0)
        if (begin < end) tiles<Smaller...>(begin, end, body);
}

}  // namespace compacter::COMPACTER_ISA
