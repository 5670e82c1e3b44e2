// The wide kernels, which every kind of projection shares: from rows to lanes, from lanes to rows,
// and the gradients of the wide factors.
#pragma once

#include "arena.h"
#include "contract.h"
#include "expand.h"
#include "weight_grad.h"

namespace compacter::COMPACTER_ISA {

// One side of the wide kernels: a factor [m][chunk] and the n chunks of the rows beside it.
struct Side {
    int64_t n, m, chunk;
};

// The memory of the wide kernels between x on one side and the output on the other.
struct WideScratch {
    float *x_contraction, *g_contraction, *expansion, *x_gradient, *g_gradient;

    WideScratch(Side x, Side out, Arena& arena)
        : x_contraction(arena.take(Contraction<float>::size(x.m, x.chunk))),
          g_contraction(arena.take(Contraction<float>::size(out.m, out.chunk))),
          expansion(arena.take(larger(packed_size(x.m, x.chunk), packed_size(out.m, out.chunk)))),
          x_gradient(arena.take(WeightGradient<float>::size(x.n, x.m, x.chunk))),
          g_gradient(arena.take(WeightGradient<float>::size(out.n, out.m, out.chunk))) {}

private:
    static int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
};

}  // namespace compacter::COMPACTER_ISA
