// out = up(act(down(x))) + residual [+ x], or its layer norm, and the gradients, block by block.
// The scale is a factor of up's right and bias.
#pragma once

#include "bottleneck.h"
#include "linear_kernel.h"
#include "norm.h"

namespace compacter::COMPACTER_ISA {

using cpu::AdapterJob;

// The names are those of the formulas; quantities of the up projection end in 2.
struct AdapterScratch {
    float *z, *v, *z2, *v2, *h, *slope, *dh, *x_contraction, *g_contraction, *kept, *kept2;

    AdapterScratch(const Factors& down, const Factors& up, Arena& arena)
        : z(arena.take(down.n * down.m * lanes)),
          v(arena.take(down.n * down.m * lanes)),
          z2(arena.take(up.n * up.m * lanes)),
          v2(arena.take(up.n * up.m * lanes)),
          h(arena.take(down.out * lanes)),
          slope(arena.take(down.out * lanes)),
          dh(arena.take(down.out * lanes)),
          x_contraction(arena.take(Contraction::size(down.m, down.in_chunk()))),
          g_contraction(arena.take(Contraction::size(up.m, up.out_chunk()))),
          kept(arena.take(RuleGradient::size(down))),
          kept2(arena.take(RuleGradient::size(up))) {}
};

inline int64_t adapter_scratch(const Factors& down, const Factors& up) {
    Arena arena(nullptr);
    AdapterScratch(down, up, arena);
    return arena.floats();
}

template <class T>
void adapter_forward(const AdapterJob& job, int64_t begin, int64_t end, float* memory) {
    const Factors &down = job.down, &up = job.up;
    Arena arena(memory);
    const AdapterScratch scratch(down, up, arena);
    const T *x = static_cast<const T*>(job.x), *residual = static_cast<const T*>(job.residual);
    const T* also = job.also_x ? x : nullptr;
    T *out = static_cast<T*>(job.out), *y = job.norm.weight ? static_cast<T*>(job.y) : out;
    const bool streaming = job.streaming && !job.norm.weight && can_stream(out, up.out_chunk());
    const Contraction contract_x(down.n, down.m, down.in_chunk(), down.left, scratch.x_contraction);
    const Expansion<T> expand{up.n, up.m, up.out_chunk(), up.right, up.bias, streaming};
    const Normalisation<T> norm{job.norm, up.out, job.streaming && y != out && can_stream(out, up.out)};

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        // Prefetches the slowest: another residual, or x if the output is streamed, or the output.
        T* y_rows = y + token * up.out;
        const T* x_next = rows_after(x, token, end, down.in);
        const T* other = residual && residual != x ? residual + token * up.out : nullptr;
        contract_x(x + token * down.in, tokens, scratch.z, other ? other : streaming ? x_next : y_rows);
        mix(down, scratch.z, scratch.v);
        preactivation(down, scratch.v, scratch.h);
        activate(job.activation, scratch.h, down.out);
        contract_bottleneck(up, scratch.h, scratch.z2);
        mix(up, scratch.z2, scratch.v2);
        expand(scratch.v2, residual ? residual + token * up.out : nullptr, also ? also + token * up.out : nullptr,
               y_rows, tokens, streaming && !other ? nullptr : x_next);
        if (job.norm.weight) norm.forward(y_rows, tokens, out + token * up.out);
    }
    if (streaming || norm.streaming) stream_fence();
}

template <class T>
void adapter_backward(const AdapterJob& job, int64_t begin, int64_t end, float* memory, const Sums& down_sums,
                      const Sums& up_sums) {
    const Factors &down = job.down, &up = job.up;
    Arena arena(memory);
    const AdapterScratch scratch(down, up, arena);
    const int64_t k = down.in;
    const T *x = static_cast<const T*>(job.x), *y = static_cast<const T*>(job.y);
    const T *grad_out = static_cast<const T*>(job.grad_out);
    T *grad_x = static_cast<T*>(job.out), *grad_y = static_cast<T*>(job.grad_y);
    const T* g = job.norm.weight ? grad_y : grad_out;
    const bool streaming = job.streaming && can_stream(grad_x, down.in_chunk());
    const Contraction contract_x(down.n, down.m, down.in_chunk(), down.left, scratch.x_contraction);
    const Contraction contract_g(up.n, up.m, up.out_chunk(), up.right, scratch.g_contraction);
    const WeightGradient<T> down_left{down.n, down.m, down.in_chunk(), down_sums.left, nullptr};
    const WeightGradient<T> up_right{up.n, up.m, up.out_chunk(), up_sums.right, up_sums.bias};
    const Expansion<T> expand{down.n, down.m, down.in_chunk(), down.left, nullptr, streaming};
    const Normalisation<T> norm{job.norm, k, false};
    RuleGradient rule(down, down_sums.rule, scratch.kept), rule2(up, up_sums.rule, scratch.kept2);

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const T *x_rows = x + token * k, *g_rows = g + token * k;
        if (job.norm.weight) norm.backward(y + token * k, grad_out + token * k, tokens, grad_y + token * k);
        contract_x(x_rows, tokens, rule.z(), rows_after(x, token, end, k));
        mix(down, rule.z(), scratch.v);
        preactivation(down, scratch.v, scratch.h);
        activate_with_slope(job.activation, scratch.h, scratch.slope, down.out);
        contract_bottleneck(up, scratch.h, rule2.z());
        mix(up, rule2.z(), scratch.v2);

        contract_g(g_rows, tokens, rule2.dv(), rows_after(grad_out, token, end, k));
        float* dz2 = scratch.z2;
        mix_transposed(up, rule2.dv(), dz2);
        rule2.next();
        if (up_sums.left) left_gradient(up, scratch.h, dz2, up_sums.left);
        float* dy = scratch.slope;
        preactivation_gradient(up, dz2, scratch.dh, dy);
        if (down_sums.right) right_gradient(down, scratch.v, dy, down_sums.right, down_sums.bias);
        expand_transposed(down, dy, rule.dv());
        float* dz = scratch.z;
        mix_transposed(down, rule.dv(), dz);
        rule.next();

        if (down_sums.left) down_left(dz, x_rows, tokens, nullptr);
        if (up_sums.right) up_right(scratch.v2, g_rows, tokens, nullptr);
        if (grad_x)
            expand(dz, job.residual ? g_rows : nullptr, nullptr, grad_x + token * k, tokens, nullptr);
    }
    rule.flush();
    rule2.flush();
    if (streaming) stream_fence();
}

}  // namespace compacter::COMPACTER_ISA
