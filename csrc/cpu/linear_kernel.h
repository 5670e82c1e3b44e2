// out = phm(x) and its gradients, block by block.
#pragma once

#include "arena.h"
#include "contract.h"
#include "expand.h"
#include "mix.h"
#include "rule_grad.h"
#include "weight_grad.h"

namespace compacter::COMPACTER_ISA {

using cpu::LinearJob;
using cpu::Sums;

// The rows of the next block, or null if it is not whole.
template <class T>
COMPACTER_INLINE const T* rows_after(const T* x, int64_t token, int64_t end, int64_t row) {
    return token + 2 * lanes <= end ? x + (token + lanes) * row : nullptr;
}

COMPACTER_INLINE int64_t block_size(int64_t token, int64_t end) { return end - token < lanes ? end - token : lanes; }

struct LinearScratch {
    float *z, *v, *x_contraction, *g_contraction, *kept;

    LinearScratch(const Factors& f, Arena& arena)
        : z(arena.take(f.n * f.m * lanes)),
          v(arena.take(f.n * f.m * lanes)),
          x_contraction(arena.take(Contraction::size(f.m, f.in_chunk()))),
          g_contraction(arena.take(Contraction::size(f.m, f.out_chunk()))),
          kept(arena.take(RuleGradient::size(f))) {}
};

inline int64_t linear_scratch(const Factors& f) {
    Arena arena(nullptr);
    LinearScratch(f, arena);
    return arena.floats();
}

template <class T>
void linear_forward(const LinearJob& job, int64_t begin, int64_t end, float* memory) {
    const Factors& f = job.factors;
    Arena arena(memory);
    const LinearScratch scratch(f, arena);
    const T* x = static_cast<const T*>(job.x);
    T* out = static_cast<T*>(job.out);
    const bool streaming = job.streaming && can_stream(out, f.out_chunk());
    const Contraction contract_x(f.n, f.m, f.in_chunk(), f.left, scratch.x_contraction);
    const Expansion<T> expand{f.n, f.m, f.out_chunk(), f.right, f.bias, streaming};

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        contract_x(x + token * f.in, tokens, scratch.z);
        mix(f, scratch.z, scratch.v);
        expand(scratch.v, nullptr, nullptr, out + token * f.out, tokens, nullptr);
    }
    if (streaming) stream_fence();
}

template <class T>
void linear_backward(const LinearJob& job, int64_t begin, int64_t end, float* memory, const Sums& sums) {
    const Factors& f = job.factors;
    Arena arena(memory);
    const LinearScratch scratch(f, arena);
    const T *x = static_cast<const T*>(job.x), *g = static_cast<const T*>(job.grad_out);
    T* grad_x = static_cast<T*>(job.out);
    const bool streaming = job.streaming && can_stream(grad_x, f.in_chunk());
    const Contraction contract_x(f.n, f.m, f.in_chunk(), f.left, scratch.x_contraction);
    const Contraction contract_g(f.n, f.m, f.out_chunk(), f.right, scratch.g_contraction);
    const WeightGradient<T> left_gradient{f.n, f.m, f.in_chunk(), sums.left, nullptr};
    const WeightGradient<T> right_gradient{f.n, f.m, f.out_chunk(), sums.right, sums.bias};
    const Expansion<T> expand{f.n, f.m, f.in_chunk(), f.left, nullptr, streaming};
    RuleGradient rule(f, sums.rule, scratch.kept);

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const T *x_rows = x + token * f.in, *g_rows = g + token * f.out;
        contract_x(x_rows, tokens, rule.z());
        mix(f, rule.z(), scratch.v);
        contract_g(g_rows, tokens, rule.dv());
        mix_transposed(f, rule.dv(), scratch.z);
        rule.next();
        if (sums.left) left_gradient(scratch.z, x_rows, tokens, rows_after(x, token, end, f.in));
        if (sums.right) right_gradient(scratch.v, g_rows, tokens, rows_after(g, token, end, f.out));
        if (grad_x) expand(scratch.z, nullptr, nullptr, grad_x + token * f.in, tokens, nullptr);
    }
    rule.flush();
    if (streaming) stream_fence();
}

}  // namespace compacter::COMPACTER_ISA
