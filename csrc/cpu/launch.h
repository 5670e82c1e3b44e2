// Entry points of the CPU target. x is f32, bf16 or f16. std::bad_alloc is thrown before any write.
#pragma once

#include "../adapter.h"

namespace compacter::cpu {

// base, or null, is added.
void forward(const Linear& linear, const void* base, void* out, int threads);
// also_x adds x besides the residual. With a norm, the normed rows are written to out.
void forward(const Adapter& adapter, const void* residual, bool also_x, void* out, int threads,
             const LayerNorm* norm = nullptr);

// grad_x, or the data of an array of `gradients`, is null if unwanted. residual_is_x adds the
// gradient of the sum, which is grad_out or the norm's grad_y, to grad_x.
void backward(const Linear& linear, const void* grad_out, void* grad_x, const Parameters& gradients, int threads);
void backward(const Adapter& adapter, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down_gradients,
              const Parameters& up_gradients, int threads, const LayerNorm* norm = nullptr);

// The adapters of a bank have the parameters and gradients of `adapter` one behind the other. Routed:
// throws std::out_of_range for an adapter that the bank has not, before any write.
void forward_routed(const Adapter& adapter, const Bank& bank, const void* residual, bool also_x, void* out, int threads);
void forward_mixed(const Adapter& adapter, const Bank& bank, const void* residual, bool also_x, void* out, int threads);
void backward_routed(const Adapter& adapter, const Bank& bank, const void* grad_out, void* grad_x, bool residual_is_x,
                     const Parameters& down_gradients, const Parameters& up_gradients, int threads);
// mix_gradient is like the mix of the bank; its data is null if it is unwanted.
void backward_mixed(const Adapter& adapter, const Bank& bank, const void* grad_out, void* grad_x, bool residual_is_x,
                    const Parameters& down_gradients, const Parameters& up_gradients, const Array& mix_gradient, int threads);

}  // namespace compacter::cpu
