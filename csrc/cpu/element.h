// The numbers of x, g and the output: f32, bf16 or f16 in memory, fp32 in a vector.
#pragma once

#include "simd.h"

namespace compacter::COMPACTER_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

COMPACTER_INLINE BitVec widen(HalfBits half) {
#if defined(__AVX512F__)
    return (BitVec)_mm512_cvtepu16_epi32((__m256i)half);  // one instruction, where GCC needs three
#else
    return extended(half);
#endif
}

COMPACTER_INLINE Vec from_bf16(HalfBits half) { return (Vec)(widen(half) << 16); }

COMPACTER_INLINE HalfBits to_bf16(Vec v) {
#if defined(__AVX512BF16__)
    return (HalfBits)_mm512_cvtneps_pbh((__m512)v);
#else
    const BitVec bits = (BitVec)v;
    const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const BitVec quiet_nan = (bits >> 16) | 0x40u;
    return truncated(select(v != v, quiet_nan, rounded));
#endif
}

COMPACTER_INLINE Vec from_f16(HalfBits half) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps((__m128i)half);
#else
    const BitVec bits = widen(half), shifted = (bits & 0x7fffu) << 13;  // as in convert.h
    const Vec normal = (Vec)(shifted + (112u << 23)), subnormal = (Vec)(shifted + (113u << 23)) - splat(0x1p-14f);
    const BitVec finite = (BitVec)select(subnormal < normal, subnormal, normal);
    const BitVec magnitude = select((bits & 0x7c00u) == 0x7c00u, finite | 0x7f800000u, finite);
    return (Vec)(magnitude | (bits & 0x8000u) << 16);
#endif
}

COMPACTER_INLINE HalfBits to_f16(Vec v) {
#if defined(__AVX512F__)
    return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const BitVec bits = (BitVec)v, magnitude = bits & 0x7fffffffu;
    // Normal: drop 13 bits, to nearest even. Subnormal: the adder rounds when 0.5 is added.
    const BitVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const BitVec subnormal = (BitVec)((Vec)magnitude + splat(0.5f)) - 0x3f000000u;
    BitVec half = select(magnitude < 0x38800000u, subnormal, normal);
    half = select(magnitude >= 0x477ff000u, BitVec{} + 0x7c00u, half);
    half = select(v != v, BitVec{} + 0x7e00u, half);
    return truncated(half | (bits >> 16 & 0x8000u));
#endif
}

COMPACTER_INLINE HalfBits load_bits(const void* p) { return *static_cast<const HalfBits*>(p); }
COMPACTER_INLINE Vec load(const bf16* p) { return from_bf16(load_bits(p)); }
COMPACTER_INLINE Vec load(const f16* p) { return from_f16(load_bits(p)); }

// The same Span numbers, repeated.
template <int Span>
COMPACTER_INLINE HalfBits load_bits_repeated(const void* p) {
#if defined(__AVX512F__)
    if constexpr (Span == 8) return (HalfBits)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return (HalfBits)_mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__AVX2__)
    return (HalfBits)_mm_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p));
#else
    return load_bits(p);
#endif
}

// One byte shuffle moves each bf16 number to the upper half of its fp32.
template <int Span>
COMPACTER_INLINE Vec load_repeated(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set4_epi32(0x07068080, 0x05048080, 0x03028080, 0x01008080);
    if constexpr (Span == 8) {
        const __m512i high = _mm512_set4_epi32(0x0f0e8080, 0x0d0c8080, 0x0b0a8080, 0x09088080);
        const __m512i eight = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
        return (Vec)_mm512_shuffle_epi8(eight, _mm512_mask_blend_epi64(0xcc, low, high));
    }
    return (Vec)_mm512_shuffle_epi8(_mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p)), low);
#else
    return from_bf16(load_bits_repeated<Span>(p));
#endif
}
template <int Span>
COMPACTER_INLINE Vec load_repeated(const f16* p) {
    return from_f16(load_bits_repeated<Span>(p));
}

// On AVX2, bf16 is converted by two vectors at once and without moves between their halves: `first`
// has the numbers 0 to 3 and 8 to 11 of 16, `second` the others.
template <class T>
constexpr bool in_pairs = W == 8 && std::is_same_v<T, bf16>;

struct VecPair {
    Vec first, second;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
COMPACTER_INLINE VecPair from_bf16(__m256i bits) {
    const __m256i zero = _mm256_setzero_si256();
    return {(Vec)_mm256_unpacklo_epi16(zero, bits), (Vec)_mm256_unpackhi_epi16(zero, bits)};
}
COMPACTER_INLINE VecPair load_pair(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
COMPACTER_INLINE VecPair load_pair(const float* p) {
    const auto halves = [p](int at) COMPACTER_INLINE_LAMBDA {
        return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + at)), _mm_loadu_ps(p + at + 8), 1);
    };
    return {halves(0), halves(4)};
}
// Numbers 0 to 3 repeated, and 4 to 7.
COMPACTER_INLINE VecPair load_pair_repeated(const bf16* p) {
    return from_bf16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)));
}
COMPACTER_INLINE __m256i to_bf16(VecPair pair) {
    const auto upper_half = [](Vec v) COMPACTER_INLINE_LAMBDA {
        const BitVec bits = (BitVec)v;
        return (__m256i)((((bits + 0x7fffu) + ((bits >> 16) & 1u)) | (BitVec)(v != v)) >> 16);
    };
    return _mm256_packus_epi32(upper_half(pair.first), upper_half(pair.second));
}
COMPACTER_INLINE void store_pair(bf16* p, VecPair pair) { _mm256_storeu_si256((__m256i*)p, to_bf16(pair)); }
COMPACTER_INLINE void stream_pair(bf16* p, VecPair pair) { _mm256_stream_si256((__m256i*)p, to_bf16(pair)); }
#endif

// With AVX512-BF16, a vector of 2 W numbers in bf16 is multiplied by another, and the products of
// two neighbours are added to a sum in fp32. Subnormal numbers count as 0.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool has_dot = std::is_same_v<T, bf16>;
COMPACTER_INLINE Vec dot(Vec sum, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
// The same eight numbers, repeated.
COMPACTER_INLINE Vec load_pairs_repeated(const bf16* p) {
    return (Vec)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}
#else
template <class T>
constexpr bool has_dot = false;
Vec dot(Vec, Vec, Vec);
Vec load_pairs_repeated(const void*);
#endif

// The upper halves of fp32: numbers that are numbers in bf16 too.
COMPACTER_INLINE HalfBits upper_halves(Vec v) { return truncated((BitVec)v >> 16); }

// The pairs of the numbers of two vectors, and the same pair everywhere. A pair lies in a float,
// which no arithmetic may touch.
COMPACTER_INLINE Vec joined(HalfBits first, HalfBits second) { return (Vec)(widen(first) | widen(second) << 16); }
COMPACTER_INLINE Vec joined_upper_halves(Vec first, Vec second) {
    return (Vec)((BitVec)first >> 16 | ((BitVec)second & 0xffff0000u));
}
COMPACTER_INLINE Vec splat_pair(const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vec)(BitVec{} + bits);
}

// Whether all numbers are numbers in bf16.
inline bool all_bf16(const float* p, int64_t count) {
    uint32_t lost = 0;
    for (int64_t j = 0; j < count; ++j) {
        uint32_t bits;
        std::memcpy(&bits, p + j, sizeof bits);
        lost |= bits;
    }
    return !(lost & 0xffffu);
}

COMPACTER_INLINE void store(bf16* p, Vec v) { *reinterpret_cast<HalfBits*>(p) = to_bf16(v); }
COMPACTER_INLINE void store(f16* p, Vec v) { *reinterpret_cast<HalfBits*>(p) = to_f16(v); }

// The first `count` < W numbers, then zeros. No memory behind them is read or written.
COMPACTER_INLINE HalfBits load_bits(const void* p, int64_t count) {
    HalfBits bits = {};
    std::memcpy(&bits, p, static_cast<size_t>(2 * count));
    return bits;
}
template <class T>
COMPACTER_INLINE Vec load(const T* p, int64_t count) {
    T padded[W] = {};
    for (int64_t j = 0; j < count; ++j) padded[j] = p[j];
    return load(padded);
}

template <class T>
COMPACTER_INLINE void store(T* p, Vec v, int64_t count) {
    T padded[W];
    store(padded, v);
    for (int64_t j = 0; j < count; ++j) p[j] = padded[j];
}

#if defined(__AVX512F__)
COMPACTER_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

COMPACTER_INLINE Vec load(const float* p, int64_t count) { return (Vec)_mm512_maskz_loadu_ps(first(count), p); }
COMPACTER_INLINE void store(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, first(count), (__m512)v); }
COMPACTER_INLINE Vec load(const bf16* p, int64_t count) {
    return from_bf16((HalfBits)_mm256_maskz_loadu_epi16(first(count), p));
}
COMPACTER_INLINE Vec load(const f16* p, int64_t count) {
    return from_f16((HalfBits)_mm256_maskz_loadu_epi16(first(count), p));
}
COMPACTER_INLINE void store(bf16* p, Vec v, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), (__m256i)to_bf16(v));
}
COMPACTER_INLINE void store(f16* p, Vec v, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), (__m256i)to_f16(v));
}
#endif

// A store past the caches, for data that they cannot hold until it is read. p must be aligned.
COMPACTER_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(COMPACTER_SSE2)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
}

COMPACTER_INLINE void stream_bits(void* p, HalfBits half) {
#if defined(__AVX512F__)
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)half);
#elif defined(__AVX2__)
    _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)half);
#else
    *static_cast<HalfBits*>(p) = half;
#endif
}

COMPACTER_INLINE void stream(bf16* p, Vec v) { stream_bits(p, to_bf16(v)); }
COMPACTER_INLINE void stream(f16* p, Vec v) { stream_bits(p, to_f16(v)); }

// Makes streamed stores of this thread visible before its later stores.
COMPACTER_INLINE void stream_fence() {
#if defined(COMPACTER_SSE2)
    _mm_sfence();
#endif
}

// A prefetch brings 64 bytes.
template <class T>
constexpr int vectors_per_line = W * sizeof(T) >= 64 ? 1 : 64 / (W * sizeof(T));

// Tiles of U vectors: body(Int<U>, u, cut, count). The last vector may be cut to `count` numbers.
template <int... Sizes, class Body>
COMPACTER_INLINE void columns(int64_t width, const Body& body) {
    const int64_t whole = width / W;
    tiles<Sizes...>(0, whole, [&](auto size, int64_t v) COMPACTER_INLINE_LAMBDA { body(size, v * W, std::false_type{}, 0); });
    if (width % W) body(Int<1>{}, whole * W, std::true_type{}, width % W);
}

}  // namespace compacter::COMPACTER_ISA
