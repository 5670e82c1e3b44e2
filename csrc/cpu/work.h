// How much work a call is, which decides on threads and on streamed stores.
#pragma once

#include <algorithm>

#include "../adapter.h"
#include "caches.h"

namespace compacter::cpu {

// Multiplications.
inline int64_t work_per_token(const Projection& p) {
    if (p.dense()) return p.in * p.out;
    return (p.in + p.out + p.n_in * p.n_out) * p.terms * p.rank;
}

inline int64_t work_per_token(const Adapter& a) { return work_per_token(a.down) + work_per_token(a.up); }

// Whether the output leaves the caches before it is read. Other work takes half of them.
inline bool exceeds_caches(int64_t tokens, int64_t numbers_per_token, DType dtype) {
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    return tokens * numbers_per_token * size > last_level_cache() / 2;
}

inline void clear(float* floats, int64_t count) { std::fill_n(floats, count, 0.f); }

}  // namespace compacter::cpu
