// Fetches the rows of the next block while the present one is worked on: a little with every tile, in the order of memory.
#pragma once

#include "simd.h"

namespace compacter::COMPACTER_ISA {

class Ahead {
public:
    // `rows` of `bytes` bytes follow one another; none when there is no next block.
    Ahead(const void* rows, int64_t bytes) : at(static_cast<const char*>(rows)), end(at + bytes) {}
    Ahead() : at(nullptr), end(nullptr) {}

    template <int Bytes>
    COMPACTER_INLINE void fetch() {
        if (at >= end) return;
#pragma GCC unroll 32
        for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
        at += Bytes;
    }

private:
    const char *at, *end;
};

}  // namespace compacter::COMPACTER_ISA
