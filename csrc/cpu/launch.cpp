// Single projections and adapters: the tokens are divided among the threads.
#include "launch.h"

#include "factors.h"
#include "isa.h"
#include "parallel.h"
#include "work.h"

namespace compacter::cpu {
namespace {

// An adapter, staged for its kernel.
struct Staged {
    const Adapter& a;
    const LayerNorm* norm;
    Staging down{a.down, Side::down, 1.f}, up{a.up, Side::up, a.scale};

    int64_t floats() const { return down.floats() + up.floats() + (norm ? staged_floats(*norm, a.down.in) : 0); }

    void stage(Room& room, AdapterJob& job) const {
        down.stage(room, job.down);
        up.stage(room, job.up);
        if (!norm) return;
        job.norm = cpu::stage(*norm, a.down.in, room);
        job.y = norm->y;
        job.grad_y = norm->grad_y;
    }
};

}  // namespace

void forward(const Linear& l, const void* base, void* out, int threads) {
    const Projection& p = l.projection;
    const Staging staging(p, Side::up, l.scale);
    const Kernels& kernel = kernels();
    LinearJob job{staging.sizes(), l.dtype, l.x, base, nullptr, out, exceeds_caches(l.tokens, p.in + p.out, l.dtype)};

    const int64_t parts = part_count(l.tokens, work_per_token(p), threads);
    const int64_t per_part = kernel.linear_scratch(job.factors);
    Scratch scratch(staging.floats() + parts * per_part);
    staging.stage(scratch, job.factors);
    float* memory = scratch.take(parts * per_part);
    for_each_part(l.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        kernel.linear_forward(job, begin, end, memory + part * per_part);
    });
}

void backward(const Linear& l, const void* grad_out, void* grad_x, const Parameters& gradients, int threads) {
    const Projection& p = l.projection;
    const Staging staging(p, Side::up, l.scale);
    const Kernels& kernel = kernels();
    LinearJob job{staging.sizes(), l.dtype, l.x, nullptr, grad_out, grad_x,
                  exceeds_caches(l.tokens, 2 * p.in + p.out, l.dtype)};

    const int64_t parts = part_count(l.tokens, 3 * work_per_token(p), threads);
    const int64_t per_part = kernel.linear_scratch(job.factors), row = staging.sums_floats(gradients);
    Scratch scratch(staging.floats() + parts * (per_part + row));
    staging.stage(scratch, job.factors);
    float *memory = scratch.take(parts * per_part), *rows = scratch.take(parts * row);
    for_each_part(l.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        float* sums = rows + part * row;
        clear(sums, row);
        kernel.linear_backward(job, begin, end, memory + part * per_part, staging.place_sums(gradients, sums));
    });
    staging.write(gradients, rows, row, parts);
}

void forward(const Adapter& a, const void* residual, bool also_x, void* out, int threads, const LayerNorm* norm) {
    const Staged staged{a, norm};
    const Kernels& kernel = kernels();
    AdapterJob job{staged.down.sizes(), staged.up.sizes(), a.activation, a.dtype, a.x, residual, nullptr, out,
                   exceeds_caches(a.tokens, (norm ? 3 : 2) * a.down.in, a.dtype), also_x, a.down.dense()};

    const int64_t parts = part_count(a.tokens, work_per_token(a), threads);
    const int64_t per_part = kernel.adapter_scratch(job);
    Scratch scratch(staged.floats() + parts * per_part);
    staged.stage(scratch, job);
    float* memory = scratch.take(parts * per_part);
    for_each_part(a.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        kernel.adapter_forward(job, begin, end, memory + part * per_part);
    });
}

void backward(const Adapter& a, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down_gradients,
              const Parameters& up_gradients, int threads, const LayerNorm* norm) {
    const Staged staged{a, norm};
    const Kernels& kernel = kernels();
    AdapterJob job{staged.down.sizes(), staged.up.sizes(), a.activation, a.dtype, a.x, residual_is_x ? grad_out : nullptr,
                   grad_out, grad_x, exceeds_caches(a.tokens, (norm ? 5 : 3) * a.down.in, a.dtype), false, a.down.dense()};

    const int64_t parts = part_count(a.tokens, 3 * work_per_token(a), threads);
    const int64_t per_part = kernel.adapter_scratch(job);
    const int64_t down_row = staged.down.sums_floats(down_gradients), row = down_row + staged.up.sums_floats(up_gradients);
    Scratch scratch(staged.floats() + parts * (per_part + row));
    staged.stage(scratch, job);
    float *memory = scratch.take(parts * per_part), *rows = scratch.take(parts * row);
    for_each_part(a.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        float* sums = rows + part * row;
        clear(sums, row);
        kernel.adapter_backward(job, begin, end, memory + part * per_part, staged.down.place_sums(down_gradients, sums),
                                staged.up.place_sums(up_gradients, sums + down_row));
    });
    staged.down.write(down_gradients, rows, row, parts);
    staged.up.write(up_gradients, rows + down_row, row, parts);
}

}  // namespace compacter::cpu
