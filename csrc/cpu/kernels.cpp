// The kernels of one instruction set, COMPACTER_ISA. CMake compiles this file once for each.
#include "adapter_kernel.h"
#include "linear_kernel.h"
#include "mixed_kernel.h"

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

template <class Middle>
struct Kind {
    using Chosen = Middle;
};

// body(a number of x's type, Kind<the middle>)
template <class Body>
COMPACTER_INLINE void with_kind(const AdapterJob& job, const Body& body) {
    with_element(job.dtype, [&](auto zero) {
        if (job.dense)
            body(zero, Kind<DenseMiddle>{});
        else
            body(zero, Kind<KroneckerMiddle>{});
    });
}

inline void run_linear_forward(const LinearJob& job, int64_t begin, int64_t end, float* scratch) {
    with_element(job.dtype, [&](auto zero) { linear_forward<decltype(zero)>(job, begin, end, scratch); });
}

inline void run_linear_backward(const LinearJob& job, int64_t begin, int64_t end, float* scratch, const Sums& sums) {
    with_element(job.dtype, [&](auto zero) { linear_backward<decltype(zero)>(job, begin, end, scratch, sums); });
}

inline int64_t run_adapter_scratch(const AdapterJob& job) {
    int64_t floats = 0;
    with_kind(job, [&](auto zero, auto kind) { floats = adapter_scratch<decltype(zero), typename decltype(kind)::Chosen>(job); });
    return floats;
}

inline void run_adapter_forward(const AdapterJob& job, int64_t begin, int64_t end, float* scratch) {
    with_kind(job, [&](auto zero, auto kind) {
        adapter_forward<decltype(zero), typename decltype(kind)::Chosen>(job, begin, end, scratch);
    });
}

inline void run_adapter_backward(const AdapterJob& job, int64_t begin, int64_t end, float* scratch, const Sums& down,
                                 const Sums& up) {
    with_kind(job, [&](auto zero, auto kind) {
        adapter_backward<decltype(zero), typename decltype(kind)::Chosen>(job, begin, end, scratch, down, up);
    });
}

inline void run_adapter_skip(const AdapterJob& job, int64_t begin, int64_t end, float* scratch) {
    with_element(job.dtype, [&](auto zero) { adapter_skip<decltype(zero)>(job, begin, end, scratch); });
}

inline int64_t run_mixed_scratch(const MixedJob& job) {
    int64_t floats = 0;
    with_kind(job.first, [&](auto, auto kind) { floats = mixed_scratch<typename decltype(kind)::Chosen>(job); });
    return floats;
}

inline void run_mixed_forward(const MixedJob& job, int64_t begin, int64_t end, float* scratch) {
    with_kind(job.first, [&](auto zero, auto kind) {
        mixed_forward<decltype(zero), typename decltype(kind)::Chosen>(job, begin, end, scratch);
    });
}

inline void run_mixed_backward(const MixedJob& job, int64_t begin, int64_t end, float* scratch, const Sums& down,
                               const Sums& up) {
    with_kind(job.first, [&](auto zero, auto kind) {
        mixed_backward<decltype(zero), typename decltype(kind)::Chosen>(job, begin, end, scratch, down, up);
    });
}

#define COMPACTER_NAME_(name) #name
#define COMPACTER_NAME(name) COMPACTER_NAME_(name)

extern const cpu::Kernels kernels;
const cpu::Kernels kernels{
    COMPACTER_NAME(COMPACTER_ISA), linear_scratch,       run_linear_forward, run_linear_backward, run_adapter_scratch,
    run_adapter_forward,           run_adapter_backward, run_adapter_skip,   run_mixed_scratch,   run_mixed_forward,
    run_mixed_backward,
};

}  // namespace compacter::COMPACTER_ISA
