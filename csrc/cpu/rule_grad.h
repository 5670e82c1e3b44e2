// The gradient of a rule:   dA_i[p,q] = sum_{token,rho} Z[p,c] dV[q,c]
#pragma once

#include "arena.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

using cpu::Factors;

// The 16 tokens of a block are too few for the cost of adding lanes and of n^3 sums in memory, so
// it keeps Z and dV of several blocks and multiplies them together.
class RuleGradient {
public:
    static constexpr int64_t batch = 8;

    RuleGradient(const Factors& f, Arena& arena)
        : f(f), z_kept(arena.take(batch * z_floats())), dv_kept(arena.take(batch * dv_floats())) {}

    float* z() const { return z_kept + used * z_floats(); }
    float* dv() const { return dv_kept + used * dv_floats(); }

    // To be called when z() and dv() hold a block. `sum` is null if the gradient is unwanted.
    void next(float* sum) {
        if (++used == batch) flush(sum);
    }

    void flush(float* sum) {
        if (sum && used)
            for (int64_t c = 0; c < f.m; ++c)
                lane_outer(sum + c / f.rank * f.n_in * f.n_out, f.n_out, z_kept + c * lanes, dv_kept + c * lanes, f.m, f.m,
                           {used, f.n_in * f.m, f.n_in, f.n_out * f.m, f.n_out});
        used = 0;
    }

private:
    int64_t z_floats() const { return f.n_in * f.m * lanes; }
    int64_t dv_floats() const { return f.n_out * f.m * lanes; }

    const Factors& f;
    float *z_kept, *dv_kept;
    int64_t used = 0;
};

}  // namespace compacter::COMPACTER_ISA
