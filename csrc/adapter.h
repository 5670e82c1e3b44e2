// The problem that every native target solves: sizes and plain pointers, no torch and no Python header.
//
//     Z[p,i] = sum_u x[p,u] s_i[u]        V[q,i] = sum_p A_i[p,q] Z[p,i]        y[q,v] = sum_i V[q,i] t_i[v] + b[q,v]
//
// is one PHM projection of a token's row x, cut into n chunks of in/n numbers (Compacter, arXiv 2106.04647, section 3).
#pragma once

#include <cstdint>

namespace compacter {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

enum class Activation : int {
    identity = 0, relu = 1, gelu = 2, gelu_new = 3, silu = 4, tanh = 5, sigmoid = 6,
    leaky_relu = 7, mish = 8, relu2 = 9, quick_gelu = 10,
};

// A contiguous tensor of any float dtype. data == nullptr: no such tensor (no bias, gradient not wanted).
struct Array {
    void* data = nullptr;
    DType dtype = DType::f32;
};

// rule (n, n, n) | left (n, in/n, rank) | right (n, rank, out/n) | bias (out,) or none
struct Parameters {
    Array rule, left, right, bias;
};

struct Projection {
    int64_t n, rank, in, out;
    Parameters weights;
};

// out = phm(x): x (tokens, in), out (tokens, out), both contiguous in `dtype` (f32, bf16 or f16).
struct Linear {
    Projection projection;
    DType dtype;
    int64_t tokens;
    const void* x;
};

// out = scale * up(act(down(x))) + residual: x, residual, out (tokens, k), contiguous in `dtype`; down k -> d, up d -> k.
// The two projections may differ in n and rank.
struct Adapter {
    Projection down, up;
    Activation activation;
    float scale;
    DType dtype;
    int64_t tokens;
    const void* x;
};

// The layer norm behind an adapter: normed = (y - mean) / sqrt(variance + eps) * weight + bias over each row y of k numbers
// that the adapter gives, its residuals added. weight and bias (k,); the others (tokens, k), contiguous in the dtype of x.
struct LayerNorm {
    Array weight, bias;
    float eps;
    void* y;       // forward writes it, for backward to read; may be where the normed rows go
    void* grad_y;  // backward writes it: the gradient of y, which is also that of a residual; may be y
};

}  // namespace compacter
