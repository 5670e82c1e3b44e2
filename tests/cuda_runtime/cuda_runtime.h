// A stand-in for the CUDA runtime that csrc/cuda/runtime.h uses. It keeps, for each kernel and device, the attributes
// that were set, and refuses a launch with more shared memory than they allow.
#pragma once

#include <cstddef>
#include <map>
#include <utility>

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9;
constexpr int cudaSharedmemCarveoutMaxShared = 100;
constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 6;

struct dim3 {
    unsigned x;
    dim3(unsigned x = 1) : x(x) {}
};
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline int current_device = 0, attributes_set = 0;
inline const int limits[] = {232448, 101376};  // of two devices
inline std::map<std::pair<const void*, int>, std::map<int, int>> attributes;

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int device) { return *value = limits[device], cudaSuccess; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > limits[current_device])
        return cudaErrorInvalidValue;
    ++attributes_set;
    attributes[{reinterpret_cast<const void*>(kernel), current_device}][attribute] = value;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&...) {
    auto& set = attributes[{reinterpret_cast<const void*>(kernel), current_device}];
    const std::size_t allowed = set.count(cudaFuncAttributeMaxDynamicSharedMemorySize)
                               ? set[cudaFuncAttributeMaxDynamicSharedMemorySize]
                               : 48 * 1024;
    return config->dynamicSmemBytes > allowed ? cudaErrorInvalidValue : cudaSuccess;
}
