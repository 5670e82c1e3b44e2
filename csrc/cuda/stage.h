// Copies the parameters to shared memory, once for each block.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "numbers.h"

namespace compacter::cuda {

COMPACTER_DEVICE float* floats_at(int offset) { return reinterpret_cast<float*>(shared_memory() + offset); }
COMPACTER_DEVICE uint4* vectors_at(int offset) { return reinterpret_cast<uint4*>(shared_memory() + offset); }

// s_c[u], c = (i, rho), of left [i][u][rho], and t_c[v] of right [i][rho][v].
COMPACTER_DEVICE Asked ask_left(const Array& left, const Sizes& s, int width, int c, int u) {
    const int i = s.rank == 1 ? c : c / s.rank;
    return Asked(left, (i * static_cast<int64_t>(width) + u) * s.rank + c - i * s.rank);
}
COMPACTER_DEVICE Asked ask_right(const Array& right, int width, int c, int v) {
    return Asked(right, static_cast<int64_t>(c) * width + v);
}

COMPACTER_DEVICE void stage_rule(float* to, const Array& rule, const Sizes& s) {
    const int matrix = s.n * s.n;
    for (int e = threadIdx.x; e < s.n * matrix; e += blockDim.x) to[e / matrix * s.rule_stride + e % matrix] = read(rule, e);
}

COMPACTER_DEVICE void stage_factors(const SharedFactors& at, const Factors& f, const Sizes& s) {
    stage_rule(floats_at(at.rule), f.rule, s);
    if (!s.inner) return;
    stage_rule(floats_at(at.rule2), f.rule2, s);
    for (int e = threadIdx.x; e < s.m * s.inner; e += blockDim.x) {
        const int c = s.by_inner.quotient(e), v = e - c * s.inner;
        floats_at(at.right)[c * s.inner_stride + v] = ask_right(f.right, s.inner, c, v).value();
        floats_at(at.left2)[c * s.inner_stride + v] = ask_left(f.left2, s, s.inner, c, v).value();
    }
    for (int e = threadIdx.x; e < s.n * s.inner; e += blockDim.x) {
        const int q = s.by_inner.quotient(e), v = e - q * s.inner;
        floats_at(at.bias)[v * s.n + q] = f.bias.data ? read(f.bias, e) : 0.f;
    }
}

}  // namespace compacter::cuda
