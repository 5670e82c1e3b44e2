#include "launch.h"

#include "caches.h"
#include "factors.h"
#include "isa.h"
#include "parallel.h"

namespace compacter::cpu {
namespace {

int64_t work_per_token(const Projection& p) { return (p.in + p.out + p.n * p.n) * p.n * p.rank; }

// Whether the output leaves the caches before it is read. Other work takes half of them.
bool exceeds_caches(int64_t tokens, int64_t numbers_per_token, DType dtype) {
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    return tokens * numbers_per_token * size > last_level_cache() / 2;
}

void clear(float* floats, int64_t count) { std::fill_n(floats, count, 0.f); }

int64_t adapter_floats(const Adapter& a, const LayerNorm* norm) {
    return staged_floats(a.down, 1.f) + staged_floats(a.up, a.scale) + (norm ? staged_floats(*norm, a.down.in) : 0);
}

void stage_adapter(const Adapter& a, const LayerNorm* norm, Scratch& scratch, AdapterJob& job) {
    stage(a.down, 1.f, scratch, job.down);
    stage(a.up, a.scale, scratch, job.up);
    if (!norm) return;
    job.norm = stage(*norm, a.down.in, scratch);
    job.y = norm->y;
    job.grad_y = norm->grad_y;
}

}  // namespace

void forward(const Linear& l, void* out, int threads) {
    const Projection& p = l.projection;
    const Kernels& kernel = kernels();
    LinearJob job{dimensions(p), l.dtype, l.x, nullptr, out, exceeds_caches(l.tokens, p.in + p.out, l.dtype)};

    const int64_t parts = part_count(l.tokens, work_per_token(p), threads);
    const int64_t per_part = kernel.linear_scratch(job.factors);
    Scratch scratch(staged_floats(p, 1.f) + parts * per_part);
    stage(p, 1.f, scratch, job.factors);
    float* memory = scratch.take(parts * per_part);
    for_each_part(l.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        kernel.linear_forward(job, begin, end, memory + part * per_part);
    });
}

void backward(const Linear& l, const void* grad_out, void* grad_x, const Parameters& gradients, int threads) {
    const Projection& p = l.projection;
    const Kernels& kernel = kernels();
    LinearJob job{dimensions(p), l.dtype, l.x, grad_out, grad_x, exceeds_caches(l.tokens, 2 * p.in + p.out, l.dtype)};

    const int64_t parts = part_count(l.tokens, 3 * work_per_token(p), threads);
    const int64_t per_part = kernel.linear_scratch(job.factors), row = sums_floats(p, gradients);
    Scratch scratch(staged_floats(p, 1.f) + parts * (per_part + row));
    stage(p, 1.f, scratch, job.factors);
    float *memory = scratch.take(parts * per_part), *rows = scratch.take(parts * row);
    for_each_part(l.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        float* sums = rows + part * row;
        clear(sums, row);
        kernel.linear_backward(job, begin, end, memory + part * per_part, place_sums(p, gradients, sums));
    });
    write_gradients(p, gradients, 1.f, rows, row, parts);
}

void forward(const Adapter& a, const void* residual, bool also_x, void* out, int threads, const LayerNorm* norm) {
    const Kernels& kernel = kernels();
    AdapterJob job{dimensions(a.down), dimensions(a.up), a.activation, a.dtype, a.x, residual, nullptr, out,
                   exceeds_caches(a.tokens, (norm ? 3 : 2) * a.down.in, a.dtype), also_x};

    const int64_t parts = part_count(a.tokens, work_per_token(a.down) + work_per_token(a.up), threads);
    const int64_t per_part = kernel.adapter_scratch(job.down, job.up);
    Scratch scratch(adapter_floats(a, norm) + parts * per_part);
    stage_adapter(a, norm, scratch, job);
    float* memory = scratch.take(parts * per_part);
    for_each_part(a.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        kernel.adapter_forward(job, begin, end, memory + part * per_part);
    });
}

void backward(const Adapter& a, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down_gradients,
              const Parameters& up_gradients, int threads, const LayerNorm* norm) {
    const Kernels& kernel = kernels();
    AdapterJob job{dimensions(a.down), dimensions(a.up), a.activation, a.dtype, a.x, residual_is_x ? grad_out : nullptr,
                   grad_out, grad_x, exceeds_caches(a.tokens, (norm ? 5 : 3) * a.down.in, a.dtype), false};

    const int64_t parts = part_count(a.tokens, 3 * (work_per_token(a.down) + work_per_token(a.up)), threads);
    const int64_t per_part = kernel.adapter_scratch(job.down, job.up);
    const int64_t down_row = sums_floats(a.down, down_gradients), row = down_row + sums_floats(a.up, up_gradients);
    Scratch scratch(adapter_floats(a, norm) + parts * (per_part + row));
    stage_adapter(a, norm, scratch, job);
    float *memory = scratch.take(parts * per_part), *rows = scratch.take(parts * row);
    for_each_part(a.tokens, parts, [&](int64_t part, int64_t begin, int64_t end) {
        float* sums = rows + part * row;
        clear(sums, row);
        kernel.adapter_backward(job, begin, end, memory + part * per_part, place_sums(a.down, down_gradients, sums),
                                place_sums(a.up, up_gradients, sums + down_row));
    });
    write_gradients(a.down, down_gradients, 1.f, rows, row, parts);
    write_gradients(a.up, up_gradients, a.scale, rows + down_row, row, parts);
}

}  // namespace compacter::cpu
