// out = up(act(down(x))) + residual [+ x], or its layer norm, and the gradients, block by block.
// The scale is a factor of up's right and bias.
#pragma once

#include "middle.h"
#include "norm.h"
#include "rows.h"
#include "wide.h"

namespace compacter::COMPACTER_ISA {

using cpu::AdapterJob;

// Copies of rows that are not consecutive. Those of x and other stay as long as the gradients of the
// wide factors keep them.
template <class T>
struct Gathered {
    int64_t kept, block;
    T *x, *other, *out;

    Gathered(const AdapterJob& job, Arena& arena)
        : kept(kept_blocks(job.down.m < job.up.m ? job.up.m : job.down.m)), block(lanes * job.down.in),
          x(take(job, arena, kept)), other(take(job, arena, kept)), out(take(job, arena, 1)) {}

    T* x_of(int64_t number) const { return x ? x + number % kept * block : nullptr; }
    T* other_of(int64_t number) const { return other ? other + number % kept * block : nullptr; }

private:
    T* take(const AdapterJob& job, Arena& arena, int64_t blocks) const {
        return job.rows ? reinterpret_cast<T*>(arena.take(blocks * block * static_cast<int64_t>(sizeof(T)) / 4)) : nullptr;
    }
};

template <class T, class Middle>
struct AdapterScratch {
    WideScratch wide;
    Gathered<T> gathered;
    Middle middle;

    AdapterScratch(const AdapterJob& job, Arena& arena)
        : wide({job.down.n_in, job.down.m, job.down.in_chunk()}, {job.up.n_out, job.up.m, job.up.out_chunk()}, arena),
          gathered(job, arena),
          middle(job.down, job.up, job.activation, arena) {}
};

template <class T, class Middle>
int64_t adapter_scratch(const AdapterJob& job) {
    Arena arena(nullptr);
    AdapterScratch<T, Middle>(job, arena);
    return arena.floats();
}

template <class T, class Middle>
void adapter_forward(const AdapterJob& job, int64_t begin, int64_t end, float* memory) {
    const Factors &down = job.down, &up = job.up;
    Arena arena(memory);
    AdapterScratch<T, Middle> scratch(job, arena);
    Middle& middle = scratch.middle;
    const RowIndex rows{job.rows, down.in};
    const T *x = static_cast<const T*>(job.x), *residual = static_cast<const T*>(job.residual);
    const T* others = residual && residual != x ? residual : nullptr;
    T *out = static_cast<T*>(job.out), *y = job.norm.weight ? static_cast<T*>(job.y) : out;
    const bool streaming = job.streaming && !job.norm.weight && can_stream(out, up.out_chunk());
    const Contraction<T> contract_x(down.n_in, down.m, down.in_chunk(), down.left, scratch.wide.x_contraction);
    Expansion<T> expand{up.n_out, up.m, up.out_chunk(), up.right, up.bias, streaming};
    expand.pack(scratch.wide.expansion, end - begin);
    const Normalisation<T> norm{job.norm, up.out, job.streaming && y != out && can_stream(out, up.out)};

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const bool direct = rows.consecutive(token, tokens);
        const T* x_rows = rows.read(x, token, tokens, scratch.gathered.x);
        const T* other = others ? rows.read(others, token, tokens, scratch.gathered.other) : nullptr;
        T* y_rows = direct ? rows.direct(y, token) : scratch.gathered.out;
        // Prefetches the slowest: another residual, or x if the output is streamed, or the output.
        const T* x_next = rows.after(x, token, end);
        contract_x(x_rows, tokens, middle.z(), other ? other : streaming ? x_next : y_rows);
        expand.streaming = streaming && direct;
        expand(middle.forward(), other ? other : residual ? x_rows : nullptr, job.also_x ? x_rows : nullptr, y_rows, tokens,
               streaming && !other ? nullptr : x_next);
        rows.write(y, token, tokens, y_rows);
        if (job.norm.weight) norm.forward(y_rows, tokens, out + token * up.out);
    }
    if (streaming || norm.streaming) stream_fence();
}

template <class T, class Middle>
void adapter_backward(const AdapterJob& job, int64_t begin, int64_t end, float* memory, const Sums& down_sums,
                      const Sums& up_sums) {
    const Factors &down = job.down, &up = job.up;
    Arena arena(memory);
    AdapterScratch<T, Middle> scratch(job, arena);
    Middle& middle = scratch.middle;
    const int64_t k = down.in;
    const RowIndex rows{job.rows, k};
    const T *x = static_cast<const T*>(job.x), *y = static_cast<const T*>(job.y);
    const T *grad_out = static_cast<const T*>(job.grad_out);
    T *grad_x = static_cast<T*>(job.out), *grad_y = static_cast<T*>(job.grad_y);
    const T* g = job.norm.weight ? grad_y : grad_out;
    const bool streaming = job.streaming && can_stream(grad_x, down.in_chunk());
    const Contraction<T> contract_x(down.n_in, down.m, down.in_chunk(), down.left, scratch.wide.x_contraction);
    const Contraction<T> contract_g(up.n_out, up.m, up.out_chunk(), up.right, scratch.wide.g_contraction);
    WeightGradient<T> down_left(down.n_in, down.m, down.in_chunk(), down_sums.left, nullptr, scratch.wide.x_gradient, end - begin,
                                contract_x.pairs());
    WeightGradient<T> up_right(up.n_out, up.m, up.out_chunk(), up_sums.right, up_sums.bias, scratch.wide.g_gradient, end - begin,
                               contract_g.pairs());
    Expansion<T> expand{down.n_in, down.m, down.in_chunk(), down.left, nullptr, streaming};
    expand.pack(scratch.wide.expansion, end - begin);
    const Normalisation<T> norm{job.norm, k, false};

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const bool direct = rows.consecutive(token, tokens);
        if (job.norm.weight) norm.backward(y + token * k, grad_out + token * k, tokens, grad_y + token * k);
        const int64_t number = (token - begin) / lanes;
        const T* x_rows = rows.read(x, token, tokens, scratch.gathered.x_of(number));
        const T* g_rows = rows.read(g, token, tokens, scratch.gathered.other_of(number));
        contract_x(x_rows, tokens, middle.z(), rows.after(x, token, end));
        const float* v2 = middle.forward_with_slopes();
        contract_g(g_rows, tokens, middle.dv2(), rows.after(grad_out, token, end));
        const float* dz = middle.backward(down_sums, up_sums);

        if (down_sums.left) down_left(dz, x_rows, tokens, nullptr);
        if (up_sums.right) up_right(v2, g_rows, tokens, nullptr);
        if (!grad_x) continue;
        T* grad_rows = direct ? rows.direct(grad_x, token) : scratch.gathered.out;
        expand.streaming = streaming && direct;
        expand(dz, job.residual ? g_rows : nullptr, nullptr, grad_rows, tokens, nullptr);
        rows.write(grad_x, token, tokens, grad_rows);
    }
    down_left.flush();
    up_right.flush();
    middle.flush(down_sums, up_sums);
    if (streaming) stream_fence();
}

// out = residual [+ x], or 0
template <class T>
void adapter_skip(const AdapterJob& job, int64_t begin, int64_t end, float* memory) {
    Arena arena(memory);
    const Gathered<T> gathered(job, arena);
    const int64_t k = job.down.in;
    const RowIndex rows{job.rows, k};
    const T *residual = static_cast<const T*>(job.residual), *also = job.also_x ? static_cast<const T*>(job.x) : nullptr;
    T* out = static_cast<T*>(job.out);
    if (!out) return;
    const Expansion<T> add{1, 0, k, nullptr, nullptr, false};
    const auto bytes = [&](int64_t tokens) { return static_cast<size_t>(tokens * k) * sizeof(T); };
    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const T* first = residual ? rows.read(residual, token, tokens, gathered.other) : nullptr;
        const T* second = also ? rows.read(also, token, tokens, gathered.x) : nullptr;
        T* to = rows.consecutive(token, tokens) ? rows.direct(out, token) : gathered.out;
        if (first && second)
            add(nullptr, first, second, to, tokens, nullptr);
        else if (first || second)  // its bits, also those of -0
            std::memcpy(to, first ? first : second, bytes(tokens));
        else
            std::memset(to, 0, bytes(tokens));
        rows.write(out, token, tokens, to);
    }
}

}  // namespace compacter::COMPACTER_ISA
