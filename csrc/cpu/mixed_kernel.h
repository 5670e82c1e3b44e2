// out = sum_e w_e up_e(act(down_e(x))) + residual [+ x] and the gradients, block by block. x, and g
// in backward, is read once: the wide factors of all adapters stand side by side as one factor of
// count * m rows. With dV2_e, the contraction of g with the factors of adapter e alone,
//     dw_e = sum_{q,c} V2_e[q,c] dV2_e[q,c] + sum_u g[u] b2_e[u]
// and everything else sees w_e dV2_e and w_e V2_e.
#pragma once

#include "adapter_kernel.h"
#include "group_bias.h"

namespace compacter::COMPACTER_ISA {

using cpu::MixedJob;

// The adapters of a job, one by one. Offsets are those of tensors that lie one behind the other.
struct EachAdapter {
    const MixedJob& job;

    Factors down(int64_t e) const { return factors(job.first.down, job.shared_rule_down ? 0 : e, e); }
    Factors up(int64_t e) const { return factors(job.first.up, job.shared_rule_up ? 0 : e, e); }
    Sums down(const Sums& sums, int64_t e) const { return sums_of(job.first.down, sums, job.shared_rule_down ? 0 : e, e); }
    Sums up(const Sums& sums, int64_t e) const { return sums_of(job.first.up, sums, job.shared_rule_up ? 0 : e, e); }

private:
    static int64_t rule(const Factors& f) { return f.rank ? f.m / f.rank * f.n_in * f.n_out : 0; }

    template <class P>
    static P* after(P* p, int64_t floats) { return p ? p + floats : nullptr; }

    static Factors factors(Factors f, int64_t of_rule, int64_t e) {
        f.rule = after(f.rule, of_rule * rule(f));
        f.left = after(f.left, e * f.m * f.in_chunk());
        f.right = after(f.right, e * f.m * f.out_chunk());
        f.bias = after(f.bias, e * f.out);
        return f;
    }

    static Sums sums_of(const Factors& f, const Sums& sums, int64_t of_rule, int64_t e) {
        return {after(sums.rule, of_rule * rule(f)), after(sums.left, e * f.m * f.in_chunk()),
                after(sums.right, e * f.m * f.out_chunk()), after(sums.bias, e * f.out)};
    }
};

// The quantities of all adapters side by side, in the lane layout: rows [chunk][e][c].
struct SideBySide {
    float* all;
    int64_t chunks, m, count;

    static int64_t size(int64_t chunks, int64_t m, int64_t count) { return chunks * m * count * lanes; }

    // one[chunk][c] = all[chunk][e][c]
    void take(int64_t e, float* one) const {
        for_each(e, one, [](float* whole, float* part) { store(part, load(whole)); });
    }

    // all[chunk][e][c] = one[chunk][c]
    void put(int64_t e, float* one) const {
        for_each(e, one, [](float* whole, float* part) { store(whole, load(part)); });
    }

private:
    template <class Body>
    void for_each(int64_t e, float* one, const Body& body) const {
        for (int64_t p = 0; p < chunks; ++p)
            for (int64_t j = 0; j < m * lanes; j += W) body(all + (p * count + e) * m * lanes + j, one + p * m * lanes + j);
    }
};

template <class Middle>
struct MixedScratch {
    Factors down, up;  // of the adapter whose turn it is
    int64_t all_m, all_m2;
    WideScratch wide;
    float *b_contraction, *b_gradient, *bias, *weights, *gb;
    SideBySide z, v2, dv2, dz;
    Middle middle;

    MixedScratch(const MixedJob& job, Arena& arena)
        : down(job.first.down), up(job.first.up), all_m(job.count * down.m), all_m2(job.count * up.m),
          wide({down.n_in, all_m, down.in_chunk()}, {up.n_out, all_m2, up.out_chunk()}, arena),
          b_contraction(arena.take(Contraction<float>::size(job.count, up.out))),
          b_gradient(arena.take(WeightGradient<float>::size(1, job.count, up.out))),
          bias(arena.take(up.out)),
          weights(arena.take(job.count * lanes)),
          gb(arena.take(job.count * lanes)),
          z(beside(job, arena, down.n_in, down.m)), v2(beside(job, arena, up.n_out, up.m)),
          dv2(beside(job, arena, up.n_out, up.m)), dz(beside(job, arena, down.n_in, down.m)),
          middle(down, up, job.first.activation, arena) {}

    // The weights of the tokens, in the lane layout [e][token]; 0 behind the last token. Returns whether
    // they are those of one group.
    bool load_weights(const MixedJob& job, int64_t token, int64_t tokens) const {
        const int64_t first = token / job.per_group;
        const bool one_group = (token + tokens - 1) / job.per_group == first;
        for (int64_t t = 0; t < lanes; ++t) {
            const float* of_token = job.mix + (one_group ? first : (token + t) / job.per_group) * job.count;
            for (int64_t e = 0; e < job.count; ++e) weights[e * lanes + t] = t < tokens ? of_token[e] : 0.f;
        }
        return one_group;
    }

    // rows[j] *= w_e
    void scale(int64_t e, float* rows, int64_t count) const {
        for (int64_t j = 0; j < count; ++j)
            for (int l = 0; l < lanes; l += W) store(rows + j * lanes + l, load(rows + j * lanes + l) * load(weights + e * lanes + l));
    }

private:
    static SideBySide beside(const MixedJob& job, Arena& arena, int64_t chunks, int64_t m) {
        return {arena.take(SideBySide::size(chunks, m, job.count)), chunks, m, job.count};
    }
};

template <class Middle>
int64_t mixed_scratch(const MixedJob& job) {
    Arena arena(nullptr);
    MixedScratch<Middle>(job, arena);
    return arena.floats();
}

template <class T, class Middle>
void mixed_forward(const MixedJob& job, int64_t begin, int64_t end, float* memory) {
    const AdapterJob& first = job.first;
    const EachAdapter adapters{job};
    Arena arena(memory);
    MixedScratch<Middle> scratch(job, arena);
    Factors &down = scratch.down, &up = scratch.up;
    const int64_t k = down.in;
    const T *x = static_cast<const T*>(first.x), *residual = static_cast<const T*>(first.residual);
    T* out = static_cast<T*>(first.out);
    const bool streaming = first.streaming && can_stream(out, up.out_chunk());
    const Contraction<T> contract_x(down.n_in, scratch.all_m, down.in_chunk(), down.left, scratch.wide.x_contraction);
    Expansion<T> expand{up.n_out, scratch.all_m2, up.out_chunk(), first.up.right, nullptr, streaming};
    expand.pack(scratch.wide.expansion, end - begin);
    const GroupBias biases{job.count, up.out, first.up.bias, scratch.weights};

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const T *x_rows = x + token * k, *x_next = rows_after(x, token, end, k);
        T* out_rows = out + token * k;
        const bool one_group = scratch.load_weights(job, token, tokens);
        if (first.up.bias) {
            if (one_group) biases.sum(scratch.bias);
            expand.bias = one_group ? scratch.bias : first.up.bias;
            expand.biases = one_group ? 0 : job.count;
        }
        contract_x(x_rows, tokens, scratch.z.all, streaming ? x_next : out_rows);
        for (int64_t e = 0; e < job.count; ++e) {
            down = adapters.down(e);
            up = adapters.up(e);
            scratch.z.take(e, scratch.middle.z());
            float* v2 = scratch.middle.forward();
            scratch.scale(e, v2, up.n_out * up.m);
            scratch.v2.put(e, v2);
        }
        expand(scratch.v2.all, residual ? residual + token * k : nullptr, first.also_x ? x_rows : nullptr, out_rows, tokens,
               streaming ? nullptr : x_next, scratch.weights);
    }
    if (streaming) stream_fence();
}

template <class T, class Middle>
void mixed_backward(const MixedJob& job, int64_t begin, int64_t end, float* memory, const Sums& down_sums, const Sums& up_sums) {
    const AdapterJob& first = job.first;
    const EachAdapter adapters{job};
    Arena arena(memory);
    MixedScratch<Middle> scratch(job, arena);
    Factors &down = scratch.down, &up = scratch.up;
    Middle& middle = scratch.middle;
    const int64_t k = down.in;
    const T *x = static_cast<const T*>(first.x), *g = static_cast<const T*>(first.grad_out);
    T* grad_x = static_cast<T*>(first.out);
    const bool streaming = first.streaming && can_stream(grad_x, down.in_chunk());
    const Contraction<T> contract_x(down.n_in, scratch.all_m, down.in_chunk(), down.left, scratch.wide.x_contraction);
    const Contraction<T> contract_g(up.n_out, scratch.all_m2, up.out_chunk(), up.right, scratch.wide.g_contraction);
    const Contraction<T> contract_b(1, up.bias ? job.count : 0, k, up.bias, scratch.b_contraction);
    WeightGradient<T> left_gradient(down.n_in, scratch.all_m, down.in_chunk(), down_sums.left, nullptr,
                                    scratch.wide.x_gradient, end - begin, contract_x.pairs());
    WeightGradient<T> right_gradient(up.n_out, scratch.all_m2, up.out_chunk(), up_sums.right, nullptr,
                                     scratch.wide.g_gradient, end - begin, contract_g.pairs());
    WeightGradient<T> bias_gradient(1, job.count, k, up_sums.bias, nullptr, scratch.b_gradient, end - begin, false);
    Expansion<T> expand{down.n_in, scratch.all_m, down.in_chunk(), down.left, nullptr, streaming};
    expand.pack(scratch.wide.expansion, end - begin);
    const bool of_weights = down_sums.rule || down_sums.left || down_sums.right || down_sums.bias || up_sums.rule || up_sums.left;
    const GroupBias biases{job.count, k, first.up.bias, scratch.weights};
    float* const gb = job.grad_mix && up.bias ? scratch.gb : nullptr;

    for (int64_t token = begin; token < end; token += lanes) {
        const int64_t tokens = block_size(token, end);
        const T *x_rows = x + token * k, *g_rows = g + token * k;
        const bool one_group = scratch.load_weights(job, token, tokens);
        contract_x(x_rows, tokens, scratch.z.all, rows_after(x, token, end, k));
        contract_g(g_rows, tokens, scratch.dv2.all, rows_after(g, token, end, k));
        if (one_group) {
            if (gb || up_sums.bias) biases.gradients(g_rows, tokens, up_sums.bias, gb, scratch.bias);
        } else {
            if (gb) contract_b(g_rows, tokens, gb);
            if (up_sums.bias) bias_gradient(scratch.weights, g_rows, tokens, nullptr);
        }
        for (int64_t e = 0; e < job.count; ++e) {
            down = adapters.down(e);
            up = adapters.up(e);
            const int64_t numbers = up.n_out * up.m;
            scratch.z.take(e, middle.z());
            float* v2 = middle.forward_with_slopes();
            float* dv2 = middle.dv2();
            scratch.dv2.take(e, dv2);
            if (job.grad_mix)
                for (int l = 0; l < lanes; l += W) {
                    Vec sum = gb ? load(gb + e * lanes + l) : Vec{};
                    for (int64_t j = 0; j < numbers; ++j) sum += load(v2 + j * lanes + l) * load(dv2 + j * lanes + l);
                    for (int64_t t = l; t < l + W && t < tokens; ++t) job.grad_mix[(token + t) * job.count + e] = sum[t - l];
                }
            if (up_sums.right) {
                scratch.scale(e, v2, numbers);
                scratch.v2.put(e, v2);
            }
            if (!of_weights && !grad_x) continue;
            scratch.scale(e, dv2, numbers);
            const Sums of_down = adapters.down(down_sums, e), of_up = adapters.up(up_sums, e);
            scratch.dz.put(e, middle.backward(of_down, of_up));
            middle.flush(of_down, of_up);
        }
        if (down_sums.left) left_gradient(scratch.dz.all, x_rows, tokens, nullptr);
        if (up_sums.right) right_gradient(scratch.v2.all, g_rows, tokens, nullptr);
        if (grad_x) expand(scratch.dz.all, first.residual ? g_rows : nullptr, nullptr, grad_x + token * k, tokens, nullptr);
    }
    left_gradient.flush();
    right_gradient.flush();
    bias_gradient.flush();
    if (streaming) stream_fence();
}

}  // namespace compacter::COMPACTER_ISA
