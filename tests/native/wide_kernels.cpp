// The wide kernels of one instruction set, COMPACTER_ISA. CMake compiles this file once for each. Like the kernels, it calls
// nothing of the standard library.
#include "wide_kernels.h"

#include "../../csrc/cpu/rows.h"
#include "../../csrc/cpu/wide.h"

namespace compacter::COMPACTER_ISA {
namespace {

using check::WideJob;

struct Memory {
    float *contraction, *expansion, *gradient;

    Memory(const WideJob& job, Arena& arena)
        : contraction(arena.take(Contraction<float>::size(job.m, job.chunk))),
          expansion(arena.take(packed_size(job.m, job.chunk))),
          gradient(arena.take(WeightGradient<float>::size(job.n, job.m, job.chunk))) {}
};

int64_t scratch(const WideJob& job) {
    Arena arena(nullptr);
    Memory(job, arena);
    return arena.floats();
}

template <class T>
void run_as(const WideJob& job, float* scratch) {
    Arena arena(scratch);
    const Memory memory(job, arena);
    const int64_t row = job.n * job.chunk;
    const T *x = static_cast<const T*>(job.x), *residual = static_cast<const T*>(job.residual), *also = static_cast<const T*>(job.also);
    T* out = static_cast<T*>(job.out);
    const bool streaming = can_stream(out, job.chunk);
    const Contraction<T> contract(job.n, job.m, job.chunk, job.basis, memory.contraction);
    Expansion<T> expand{job.n, job.m, job.chunk, job.basis, job.bias, streaming};
    expand.pack(memory.expansion, job.tokens);
    WeightGradient<T> add(job.n, job.m, job.chunk, job.sum, job.bias_sum, memory.gradient, job.tokens, contract.pairs());
    for (int64_t token = 0; token < job.tokens; token += lanes) {
        const int64_t tokens = block_size(token, job.tokens), at = token * row, lane = token * job.n * job.m;
        const T* next = rows_after(x, token, job.tokens, row);
        contract(x + at, tokens, job.z + lane, next);
        expand(job.v + lane, residual ? residual + at : nullptr, also ? also + at : nullptr, out + at, tokens, next);
        add(job.v + lane, x + at, tokens, next);
    }
    add.flush();
    if (streaming) stream_fence();
}

void run(const WideJob& job, float* scratch) {
    switch (job.dtype) {
        case DType::f32: return run_as<float>(job, scratch);
        case DType::bf16: return run_as<bf16>(job, scratch);
        case DType::f16: return run_as<f16>(job, scratch);
        case DType::f64: return;
    }
}

}  // namespace

extern const check::WideKernels wide_kernels;
const check::WideKernels wide_kernels{scratch, run};

}  // namespace compacter::COMPACTER_ISA
