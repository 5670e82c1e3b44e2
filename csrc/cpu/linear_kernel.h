// out = base + phm(x) and its gradients, block by block. The scale is a factor of right and bias.
#pragma once

#include "arena.h"
#include "mix.h"
#include "rows.h"
#include "rule_grad.h"
#include "wide.h"

namespace compacter::COMPACTER_ISA {

using cpu::LinearJob;
using cpu::Sums;

struct LinearScratch {
    float *dz, *v;
    WideScratch wide;
    RuleGradient rule;

    LinearScratch(const Factors& f, Arena& arena)
        : dz(arena.take(f.n_in * f.m * lanes)),
          v(arena.take(f.n_out * f.m * lanes)),
          wide({f.n_in, f.m, f.in_chunk()}, {f.n_out, f.m, f.out_chunk()}, arena),
          rule(f, arena) {}
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
    const T *x = static_cast<const T*>(job.x), *base = static_cast<const T*>(job.base);
    T* out = static_cast<T*>(job.out);
    const bool streaming = job.streaming && can_stream(out, f.out_chunk());
    const Contraction<T> contract_x(f.n_in, f.m, f.in_chunk(), f.left, scratch.wide.x_contraction);
    Expansion<T> expand{f.n_out, f.m, f.out_chunk(), f.right, f.bias, streaming};
    expand.pack(scratch.wide.expansion, end - begin);

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        contract_x(x + token * f.in, tokens, scratch.rule.z());
        mix(f, scratch.rule.z(), scratch.v);
        expand(scratch.v, base ? base + token * f.out : nullptr, nullptr, out + token * f.out, tokens, nullptr);
    }
    if (streaming) stream_fence();
}

template <class T>
void linear_backward(const LinearJob& job, int64_t begin, int64_t end, float* memory, const Sums& sums) {
    const Factors& f = job.factors;
    Arena arena(memory);
    LinearScratch scratch(f, arena);
    RuleGradient& rule = scratch.rule;
    const T *x = static_cast<const T*>(job.x), *g = static_cast<const T*>(job.grad_out);
    T* grad_x = static_cast<T*>(job.out);
    const bool streaming = job.streaming && can_stream(grad_x, f.in_chunk());
    const Contraction<T> contract_x(f.n_in, f.m, f.in_chunk(), f.left, scratch.wide.x_contraction);
    const Contraction<T> contract_g(f.n_out, f.m, f.out_chunk(), f.right, scratch.wide.g_contraction);
    WeightGradient<T> left_gradient(f.n_in, f.m, f.in_chunk(), sums.left, nullptr, scratch.wide.x_gradient, end - begin,
                                    contract_x.pairs());
    WeightGradient<T> right_gradient(f.n_out, f.m, f.out_chunk(), sums.right, sums.bias, scratch.wide.g_gradient, end - begin,
                                     contract_g.pairs());
    Expansion<T> expand{f.n_in, f.m, f.in_chunk(), f.left, nullptr, streaming};
    expand.pack(scratch.wide.expansion, end - begin);

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const T *x_rows = x + token * f.in, *g_rows = g + token * f.out;
        contract_x(x_rows, tokens, rule.z());
        mix(f, rule.z(), scratch.v);
        contract_g(g_rows, tokens, rule.dv());
        mix_transposed(f, rule.dv(), scratch.dz);
        rule.next(sums.rule);
        if (sums.left) left_gradient(scratch.dz, x_rows, tokens, rows_after(x, token, end, f.in));
        if (sums.right) right_gradient(scratch.v, g_rows, tokens, rows_after(g, token, end, f.out));
        if (grad_x) expand(scratch.dz, nullptr, nullptr, grad_x + token * f.in, tokens, nullptr);
    }
    left_gradient.flush();
    right_gradient.flush();
    rule.flush(sums.rule);
    if (streaming) stream_fence();
}

}  // namespace compacter::COMPACTER_ISA
