// The kernels of one instruction set, COMPACTER_ISA. CMake compiles this file once for each.
#include "adapter_kernel.h"

namespace compacter::COMPACTER_ISA {

template <class Body>
COMPACTER_INLINE void with_element(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f32: return body(float{});
        case DType::bf16: return body(bf16{});
        case DType::f16: return body(f16{});
        case DType::f64: return;  // refused by the launcher
    }
}

inline void run_linear_forward(const LinearJob& job, int64_t begin, int64_t end, float* scratch) {
    with_element(job.dtype, [&](auto zero) { linear_forward<decltype(zero)>(job, begin, end, scratch); });
}

inline void run_linear_backward(const LinearJob& job, int64_t begin, int64_t end, float* scratch, const Sums& sums) {
    with_element(job.dtype, [&](auto zero) { linear_backward<decltype(zero)>(job, begin, end, scratch, sums); });
}

inline void run_adapter_forward(const AdapterJob& job, int64_t begin, int64_t end, float* scratch) {
    with_element(job.dtype, [&](auto zero) { adapter_forward<decltype(zero)>(job, begin, end, scratch); });
}

inline void run_adapter_backward(const AdapterJob& job, int64_t begin, int64_t end, float* scratch, const Sums& down,
                                 const Sums& up) {
    with_element(job.dtype, [&](auto zero) { adapter_backward<decltype(zero)>(job, begin, end, scratch, down, up); });
}

#define COMPACTER_NAME_(name) #name
#define COMPACTER_NAME(name) COMPACTER_NAME_(name)

extern const cpu::Kernels kernels;
const cpu::Kernels kernels{
    COMPACTER_NAME(COMPACTER_ISA), linear_scratch,     run_linear_forward,   run_linear_backward,
    adapter_scratch,               run_adapter_forward, run_adapter_backward,
};

}  // namespace compacter::COMPACTER_ISA
