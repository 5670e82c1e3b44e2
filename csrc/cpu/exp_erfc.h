// exp and erfc of vectors, with a relative error near one unit in the last place. NaN stays NaN.
#pragma once

#include "simd.h"

namespace compacter::COMPACTER_ISA {

COMPACTER_INLINE Vec clamp(Vec x, float low, float high) {
#if defined(__AVX512F__)  // with a NaN, these return the second operand
    return (Vec)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)x));
#else
    x = select(x < splat(low), splat(low), x);
    return select(x > splat(high), splat(high), x);
#endif
}

COMPACTER_INLINE Vec abs(Vec x) { return (Vec)((BitVec)x & 0x7fffffffu); }

// e^x = 2^n e^r, r = x - n ln 2; 0 below -104 and infinity above 88.8, as e^x rounded to fp32.
COMPACTER_INLINE Vec exp(Vec x) {
    x = clamp(x, -105.f, 89.f);
    const Vec magic = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits
    const Vec shifted = x * 1.44269504f + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n is two factors, so that subnormal and infinite results are right.
    const IntVec exponent = (IntVec)shifted - (IntVec)magic, half = exponent >> 1;
    return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
#endif
}

// erfc(z) = t exp(-z^2 + P(t)), z >= 0, t = 1 / (1 + z/2); error 1.2e-7 (Numerical Recipes 6.2.2).
COMPACTER_INLINE Vec erfc_positive(Vec z) {
    z = clamp(z, 0.f, 11.f);
    const Vec t = 1.f / (z * 0.5f + 1.f);
    Vec p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    return t * exp(p - z * z);
}

}  // namespace compacter::COMPACTER_ISA
