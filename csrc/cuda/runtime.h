// The launch and the versions, the only uses of the CUDA runtime in csrc/cuda. Tests replace this file
// (tests/cuda_on_cpu), or the runtime under it (tests/cuda_runtime).
#pragma once

#ifndef COMPACTER_CUDA_ON_CPU

#include <cuda_runtime.h>

#include <mutex>
#include <set>
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

// The versions of CUDA that the driver serves, and that is linked in: 1000 * major + 10 * minor.
inline int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "version of the driver");
    return version;
}
inline int runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "version of the runtime");
    return version;
}

// Lets a kernel take all the shared memory that a block of the current device may have. It is asked
// for once for each kernel and device: a launch that set its own size could take back what another
// thread needs. A multiprocessor then has as much shared memory as it can, for two resident blocks.
inline void allow_shared_memory(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    int device = 0, limit = 0;
    check(cudaGetDevice(&device), "current device");
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device})) return;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of a device");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory of a kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "shared memory of a multiprocessor");
    allowed.emplace(kernel, device);
}

// On the current device. Throws std::runtime_error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& l, Arguments&&... arguments) {
    if (l.shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel));
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
