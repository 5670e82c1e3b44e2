// The gradient of a rule:   dA_i[p,q] = sum_{token,rho} Z[p,c] dV[q,c]
#pragma once

#include "lanes.h"

namespace compacter::COMPACTER_ISA {

using cpu::Factors;

// The 16 tokens of a block are too few for the cost of adding lanes and of n^3 sums in memory, so
// it keeps Z and dV of several blocks and multiplies them together.
class RuleGradient {
public:
    static constexpr int64_t batch = 8;

    // `kept` has size(f) floats.
    RuleGradient(const Factors& f, float* sum, float* kept)
        : f(f), sum(sum), z_kept(kept), dv_kept(kept + batch * block_floats()) {}

    static int64_t size(const Factors& f) { return 2 * batch * f.n * f.m * lanes; }

    float* z() const { return z_kept + used * block_floats(); }
    float* dv() const { return dv_kept + used * block_floats(); }

    // To be called when z() and dv() hold a block.
    void next() {
        if (++used == batch) flush();
    }

    void flush() {
        if (sum && used)
            for (int64_t c = 0; c < f.m; ++c)
                lane_outer(sum + c / f.rank * f.n * f.n, f.n, z_kept + c * lanes, dv_kept + c * lanes, f.m, f.m,
                           {used, f.n * f.m, f.n, f.n * f.m, f.n});
        used = 0;
    }

private:
    int64_t block_floats() const { return f.n * f.m * lanes; }

    const Factors& f;
    float *sum, *z_kept, *dv_kept;
    int64_t used = 0;
};

}  // namespace compacter::COMPACTER_ISA
