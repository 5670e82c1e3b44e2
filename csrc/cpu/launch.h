// Entry points of the CPU target. x is f32, bf16 or f16. May throw std::bad_alloc, before anything is written.
#pragma once

#include "../adapter.h"

namespace compacter::cpu {

void forward(const Linear& linear, void* out, int threads);
// also_x adds x besides the residual. With a norm, out gets the normed rows.
void forward(const Adapter& adapter, const void* residual, bool also_x, void* out, int threads,
             const LayerNorm* norm = nullptr);

// grad_x null, or an array of `gradients` without data: not wanted. residual_is_x adds the output's
// gradient to grad_x: grad_out, or grad_y of a norm.
void backward(const Linear& linear, const void* grad_out, void* grad_x, const Parameters& gradients, int threads);
void backward(const Adapter& adapter, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down_gradients,
              const Parameters& up_gradients, int threads, const LayerNorm* norm = nullptr);

}  // namespace compacter::cpu
