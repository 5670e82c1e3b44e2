// Divides the scratch of a part. Without scratch (nullptr), it only counts.
#pragma once

#include "simd.h"

namespace compacter::COMPACTER_ISA {

class Arena {
public:
    explicit Arena(float* base) : base(base) {}

    float* take(int64_t floats) {
        float* piece = base ? base + used : nullptr;
        used += round_up(floats, 16);
        return piece;
    }

    int64_t floats() const { return used; }

private:
    float* base;
    int64_t used = 0;
};

}  // namespace compacter::COMPACTER_ISA
