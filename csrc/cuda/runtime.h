// The launch, the only use of the CUDA runtime in csrc/cuda. Tests replace it (tests/cuda_on_cpu).
#pragma once

#ifndef COMPACTER_CUDA_ON_CPU

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace compacter::cuda {

struct Launch {
    int blocks, threads;
    int shared_bytes;
    void* stream;
    bool overlaps;  // may start before the previous kernel of the stream has ended (sm_90 on)
};

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// On the current device. Throws std::runtime_error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& l, Arguments&&... arguments) {
    // More than 48 KiB must be requested once for a kernel and device; repeating it is free.
    if (l.shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes),
              "shared memory of a kernel");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(l.blocks);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = static_cast<cudaStream_t>(l.stream);
    config.attrs = &attribute;
    config.numAttrs = l.overlaps ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch of a kernel");
}

}  // namespace compacter::cuda

#endif
