// All wide kernels on the rows of one call, block by block, as tables for each instruction set.
#pragma once

#include "../../csrc/adapter.h"

namespace compacter::check {

struct WideJob {
    int64_t n, m, chunk, tokens;
    DType dtype;
    const void *x, *residual, *also;  // residual and also may be null
    void* out;                        // the expansion of v
    const float *basis, *bias, *v;    // bias may be null; v: [block][n][m][16]
    float *z, *sum, *bias_sum;        // the contraction of x, like v; the gradients of v and x; bias_sum may be null
};

struct WideKernels {
    int64_t (*scratch)(const WideJob&);
    void (*run)(const WideJob&, float* scratch);
};

}  // namespace compacter::check
