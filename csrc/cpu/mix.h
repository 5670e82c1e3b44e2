// The mixes by the rule A, terms n_in n_out products for each rank index. Only here do chunks meet.
#pragma once

#include "lanes.h"

namespace compacter::COMPACTER_ISA {

using cpu::Factors;

// V[q,c] = sum_p A_i[p,q] Z[p,c], c = (i, rho)
inline void mix(const Factors& f, float* z, float* v) {
    for (int64_t c = 0; c < f.m; ++c)
        lane_gemm({v + c * lanes, f.m}, f.n_out, {z + c * lanes, f.m}, f.n_in, {f.rule_of(c), 1, f.n_out});
}

// dZ[p,c] = sum_q A_i[p,q] dV[q,c]
inline void mix_transposed(const Factors& f, float* dv, float* dz) {
    for (int64_t c = 0; c < f.m; ++c)
        lane_gemm({dz + c * lanes, f.m}, f.n_in, {dv + c * lanes, f.m}, f.n_out, {f.rule_of(c), f.n_out, 1});
}

}  // namespace compacter::COMPACTER_ISA
