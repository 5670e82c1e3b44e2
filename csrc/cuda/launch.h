// Entry points of the CUDA target. x is f32, bf16 or f16; all pointers are of the current device. Nothing synchronises.
#pragma once

#include <cstdint>
#include <string>

#include "../adapter.h"

namespace compacter::cuda {

// What a plan has to know of a device.
struct Device {
    int multiprocessors;
    int shared_limit;        // bytes of shared memory that a block may have (the opt-in limit)
    int shared_per_multiprocessor;
    int capability;          // 10 * major + minor
};

// Why the kernels cannot serve this problem on this device, forward and backward; empty where they can.
std::string refuses(const Linear& linear, const Device& device);
std::string refuses(const Adapter& adapter, const Device& device);

// Floats that a backward of so many tokens needs for its sums.
int64_t workspace(const Linear& linear, const Device& device);
int64_t workspace(const Adapter& adapter, const Device& device);

// residual: null, x itself or another tensor. Throws std::runtime_error with CUDA's own message.
void forward(const Linear& linear, void* out, const Device& device, void* stream);
void forward(const Adapter& adapter, const void* residual, void* out, const Device& device, void* stream);

// grad_x null, or an array of `gradients` without data: not wanted. residual_is_x adds grad_out to grad_x.
void backward(const Linear& linear, const void* grad_out, void* grad_x, const Parameters& gradients, float* workspace,
              const Device& device, void* stream);
void backward(const Adapter& adapter, const void* grad_out, void* grad_x, bool residual_is_x,
              const Parameters& down_gradients, const Parameters& up_gradients, float* workspace, const Device& device,
              void* stream);

}  // namespace compacter::cuda
