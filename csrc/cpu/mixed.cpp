// Mixed banks: each part has all adapters for its tokens.
#include "convert.h"
#include "factors.h"
#include "isa.h"
#include "launch.h"
#include "parallel.h"
#include "work.h"

namespace compacter::cpu {
namespace {

struct Mixed {
    const Adapter& a;
    const Bank& bank;
    Staging down{a.down, Side::down, 1.f, bank.count, bank.shared_rule_down};
    Staging up{a.up, Side::up, a.scale, bank.count, bank.shared_rule_up};

    int64_t mix_numbers() const { return bank.groups * bank.count; }
    int64_t floats() const { return down.floats() + up.floats() + Scratch::padded(mix_numbers()); }

    MixedJob job(const void* residual, const void* grad_out, void* out, bool streaming, bool also_x) const {
        const AdapterJob first{down.sizes(), up.sizes(), a.activation, a.dtype, a.x, residual, grad_out, out, streaming, also_x,
                               a.down.dense()};
        return {first, bank.count, bank.shared_rule_down, bank.shared_rule_up, nullptr, a.tokens / std::max<int64_t>(bank.groups, 1),
                nullptr};
    }

    void stage(Room& room, MixedJob& job) const {
        down.stage(room, job.first.down);
        up.stage(room, job.first.up);
        float* mix = room.take(mix_numbers());
        with_number(bank.mix.dtype, [&](auto zero) {
            const auto* from = static_cast<const decltype(zero)*>(bank.mix.data);
            for (int64_t j = 0; j < mix_numbers(); ++j) mix[j] = from[j].get();
        });
        job.mix = mix;
    }

    // The sum over the tokens of each group.
    void write_mix(const Array& gradient, const float* of_tokens) const {
        const int64_t per_group = a.tokens / std::max<int64_t>(bank.groups, 1);
        with_number(gradient.dtype, [&](auto zero) {
            auto* to = static_cast<decltype(zero)*>(gradient.data);
            for (int64_t group = 0; group < bank.groups; ++group)
                for (int64_t e = 0; e < bank.count; ++e) {
                    double sum = 0.;
                    for (int64_t t = group * per_group; t < (group + 1) * per_group; ++t) sum += of_tokens[t * bank.count + e];
                    to[group * bank.count + e].set(static_cast<float>(sum));
                }
        });
    }
};

}  // namespace

void forward_mixed(const Adapter& a, const Bank& bank, const void* residual, bool also_x, void* out, int threads) {
    const Mixed mixed{a, bank};
    const Kernels& kernel = kernels();
    MixedJob job = mixed.job(residual, nullptr, out, exceeds_caches(a.tokens, 2 * a.down.in, a.dtype), also_x);
    const int64_t parts = part_count(a.tokens, bank.count * work_per_token(a), threads);
    const int64_t per_part = kernel.mixed_scratch(job);
    Scratch scratch(mixed.floats() + parts * per_part);
    mixed.stage(scratch, job);
    float* memory = scratch.take(parts * per_part);
    for_each_part(a.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        kernel.mixed_forward(job, begin, end, memory + part * per_part);
    });
}

void backward_mixed(const Adapter& a, const Bank& bank, const void* grad_out, void* grad_x, bool residual_is_x,
                    const Parameters& down_gradients, const Parameters& up_gradients, const Array& mix_gradient, int threads) {
    const Mixed mixed{a, bank};
    const Kernels& kernel = kernels();
    MixedJob job = mixed.job(residual_is_x ? grad_out : nullptr, grad_out, grad_x,
                             exceeds_caches(a.tokens, 3 * a.down.in, a.dtype), false);
    const int64_t parts = part_count(a.tokens, 3 * bank.count * work_per_token(a), threads);
    const int64_t per_part = kernel.mixed_scratch(job), of_mix = mix_gradient.data ? a.tokens * bank.count : 0;
    const int64_t down_row = mixed.down.sums_floats(down_gradients), row = down_row + mixed.up.sums_floats(up_gradients);
    Scratch scratch(mixed.floats() + parts * (per_part + row) + Scratch::padded(of_mix));
    mixed.stage(scratch, job);
    float *memory = scratch.take(parts * per_part), *rows = scratch.take(parts * row), *tokens = scratch.take(of_mix);
    job.grad_mix = mix_gradient.data ? tokens : nullptr;
    for_each_part(a.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        float* sums = rows + part * row;
        clear(sums, row);
        kernel.mixed_backward(job, begin, end, memory + part * per_part, mixed.down.place_sums(down_gradients, sums),
                              mixed.up.place_sums(up_gradients, sums + down_row));
    });
    mixed.down.write(down_gradients, rows, row, parts);
    mixed.up.write(up_gradients, rows + down_row, row, parts);
    if (mix_gradient.data) mixed.write_mix(mix_gradient, tokens);
}

}  // namespace compacter::cpu
