// The vectors of one instruction set, W numbers each, and what compilers say in different words.
//
// GCC and Clang have vectors as a type, with arithmetic, comparisons and casts between types of one
// size, which keep the bits. vector_loops.h has the same as a class of loops, for other compilers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(COMPACTER_VECTOR_LOOPS)
#define COMPACTER_VECTOR_TYPES
#endif

#if defined(__SSE2__) && defined(COMPACTER_VECTOR_TYPES)
#define COMPACTER_SSE2
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define COMPACTER_INLINE inline __attribute__((always_inline))
#define COMPACTER_INLINE_LAMBDA __attribute__((always_inline))
#define COMPACTER_NOINLINE __attribute__((noinline))
#define COMPACTER_PREFETCH(address, write, level) __builtin_prefetch(address, write, level)
#else
#define COMPACTER_INLINE __forceinline
#define COMPACTER_INLINE_LAMBDA
#define COMPACTER_NOINLINE __declspec(noinline)
#define COMPACTER_PREFETCH(address, write, level) (void)(address)
#endif

// Unrolls the loop that follows. A loop over an array of vectors must be, to keep it in registers.
#define COMPACTER_PRAGMA(words) _Pragma(#words)
#if defined(__clang__)
#define COMPACTER_UNROLL(count) COMPACTER_PRAGMA(clang loop unroll_count(count))
#elif defined(__GNUC__)
#define COMPACTER_UNROLL(count) COMPACTER_PRAGMA(GCC unroll count)
#else
#define COMPACTER_UNROLL(count)
#endif

#if !defined(COMPACTER_VECTOR_TYPES)
#include "vector_loops.h"
#endif

namespace compacter::COMPACTER_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif
constexpr bool many_registers = registers == 32;

#if defined(COMPACTER_VECTOR_TYPES)

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef uint32_t BitVec __attribute__((vector_size(4 * W)));
typedef float UnalignedVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t HalfBits __attribute__((vector_size(2 * W), aligned(2), may_alias));

// Lane by lane a where the comparison holds, else b.
template <class V>
COMPACTER_INLINE V select(IntVec holds, V a, V b) {
    return holds ? a : b;
}

// From 16 bits of each lane to 32, of which the upper ones are 0; and the lower 16 bits of 32.
COMPACTER_INLINE BitVec extended(HalfBits half) { return __builtin_convertvector(half, BitVec); }
COMPACTER_INLINE HalfBits truncated(BitVec bits) { return __builtin_convertvector(bits, HalfBits); }

#else

using Vec = Lanes<float, W>;
using IntVec = Lanes<int32_t, W>;
using BitVec = Lanes<uint32_t, W>;
using UnalignedVec = Vec;  // a class of floats needs no other alignment than theirs
using Quad = Lanes<float, 4>;
using UnalignedQuad = Quad;
using HalfBits = Lanes<uint16_t, W>;

COMPACTER_INLINE BitVec extended(HalfBits half) { return half.converted<uint32_t>(); }
COMPACTER_INLINE HalfBits truncated(BitVec bits) { return bits.converted<uint16_t>(); }

#endif

}  // namespace compacter::COMPACTER_ISA
