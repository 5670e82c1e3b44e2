// Entry points of the CPU target. x is f32, bf16 or f16. std::bad_alloc is thrown before any write.
#pragma once

#include "../adapter.h"

namespace compacter::cpu {

void forward(const Linear& linear, void* out, int threads);
// also_x adds x besides the residual. With a norm, the normed rows are written to out.
void forward(const Adapter& adapter, const void* residual, bool also_x, void* out, int threads,
             const LayerNorm* norm = nullptr);

// grad_x, or the data of an array of `gradients`, is null if unwanted. residual_is_x adds the
// gradient of the sum, which is grad_out or the norm's grad_y, to grad_x.
void backward(const Linear& linear, const void* grad_out, void* grad_x, const Parameters& gradients, int threads);
void backward(const Adapter& adapter, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down_gradients,
              const Parameters& up_gradients, int threads, const LayerNorm* norm = nullptr);

}  // namespace compacter::cpu
