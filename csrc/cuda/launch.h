// Asynchronous entry points of the CUDA target for x in f32, bf16, f16, on the current device.
#pragma once

#include <cstdint>
#include <string>

#include "../adapter.h"

namespace compacter::cuda {

// The facts about a device that a plan needs.
struct Device {
    int multiprocessors;
    int shared_limit;        // bytes of shared memory that a block may use (the opt-in limit)
    int shared_per_multiprocessor;
    int capability;          // 10 * major + minor
};

// Why forward or backward cannot serve this problem on this device; empty if both can.
std::string refuses(const Linear& linear, const Device& device);
std::string refuses(const Adapter& adapter, const Device& device);

// The floats that forward needs beside its result, of which most problems need none, and backward for its sums.
int64_t space_of_forward(const Linear& linear, const Device& device);
int64_t space_of_forward(const Adapter& adapter, const Device& device);
int64_t workspace(const Linear& linear, const Device& device);
int64_t workspace(const Adapter& adapter, const Device& device);

// How backward divides its tokens: its blocks, the tokens of a tile, and the tiles of a block that
// shared memory holds at once.
struct Division {
    int blocks, tokens, stages;
};
Division division(const Linear& linear, const Device& device);
Division division(const Adapter& adapter, const Device& device);

// The versions of CUDA that the driver serves, and with which this was built: 1000 * major + 10 *
// minor. Throws std::runtime_error.
struct Versions {
    int driver, runtime;
};
Versions versions();

// base: null or what is added. residual: null, x or another tensor. Throws std::runtime_error with the message of CUDA.
void forward(const Linear& linear, const void* base, void* out, float* workspace, const Device& device, void* stream);
void forward(const Adapter& adapter, const void* residual, void* out, float* workspace, const Device& device, void* stream);

// grad_x or the data of a gradient is null if unwanted. residual_is_x adds grad_out to grad_x.
void backward(const Linear& linear, const void* grad_out, void* grad_x, const Parameters& gradients, float* workspace,
              const Device& device, void* stream);
void backward(const Adapter& adapter, const void* grad_out, void* grad_x, bool residual_is_x,
              const Parameters& down_gradients, const Parameters& up_gradients, float* workspace, const Device& device,
              void* stream);

// The kernels for the whole family (family.h), which the functions above call for an adapter of dense projections, and for a
// projection whose rule has sizes that they do not know. They alone serve a bank: null, or that of the adapter.
std::string refuses_family(const Linear& linear, const Device& device);
std::string refuses_family(const Adapter& adapter, const Bank* bank, const Device& device);

// The floats that they need beside their results. weights, mix: whether any gradient of the parameters, or that of the
// weights of a mix, is wanted.
int64_t forward_workspace(const Linear& linear, const Device& device);
int64_t forward_workspace(const Adapter& adapter, const Bank* bank, const Device& device);
int64_t backward_workspace(const Linear& linear, const Device& device);
int64_t backward_workspace(const Adapter& adapter, const Bank* bank, bool weights, bool mix, const Device& device);

void forward_family(const Linear& linear, const void* base, void* out, float* workspace, const Device& device, void* stream);
void forward_family(const Adapter& adapter, const Bank* bank, const void* residual, void* out, float* workspace,
                    const Device& device, void* stream);
void backward_family(const Linear& linear, const void* grad_out, void* grad_x, const Parameters& gradients, float* workspace,
                     const Device& device, void* stream);
void backward_family(const Adapter& adapter, const Bank* bank, const void* grad_out, void* grad_x, bool residual_is_x,
                     const Parameters& down_gradients, const Parameters& up_gradients, const Array& grad_mix,
                     float* workspace, const Device& device, void* stream);

}  // namespace compacter::cuda
