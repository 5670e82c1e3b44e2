// The problem of each native target, in sizes and pointers, without torch and Python. A sum of
// Kronecker products (PHM: Compacter, arXiv 2106.04647, section 3) of a token's x, n_in chunks, is
//     Z[p,i] = sum_u x[p,u] s_i[u]    V[q,i] = sum_p A_i[p,q] Z[p,i]
//     y[q,v] = sum_i V[q,i] t_i[v] + b[q,v]
#pragma once

#include <cstdint>

namespace compacter {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

enum class Activation : int {
    identity = 0, relu = 1, gelu = 2, gelu_new = 3, silu = 4, tanh = 5, sigmoid = 6,
    leaky_relu = 7, mish = 8, relu2 = 9, quick_gelu = 10,
};
constexpr int activations = 11;

// A contiguous tensor of any float dtype. data == nullptr: an absent bias or an unwanted gradient.
struct Array {
    void* data = nullptr;
    DType dtype = DType::f32;
};

// rule (terms, n_in, n_out), left (terms, in/n_in, rank), right (terms, rank, out/n_out), and bias
// (out,) or none. A dense projection has only left, its weight (in, out), and bias.
struct Parameters {
    Array rule, left, right, bias;
};

// A PHM projection has terms = n_in = n_out. A dense one has no terms, one chunk on either side and
// rank 0; if it is transposed, its weight lies in memory as (out, in).
struct Projection {
    int64_t terms, n_in, n_out, rank, in, out;
    bool transposed;
    Parameters weights;

    bool dense() const { return terms == 0; }
};

// out = base + scale * phm(x): x (tokens, in), out and base (tokens, out), all contiguous in `dtype`
// (f32, bf16 or f16).
struct Linear {
    Projection projection;
    DType dtype;
    int64_t tokens;
    const void* x;
    float scale = 1.f;
};

// out = scale * up(act(down(x))) + residual with down k -> d and up d -> k, which may differ in n
// and rank. x, residual and out are (tokens, k), contiguous in `dtype`.
struct Adapter {
    Projection down, up;
    Activation activation;
    float scale;
    DType dtype;
    int64_t tokens;
    const void* x;
};

// `count` adapters, whose tensors lie one behind the other. The rows of x are `groups` groups of
// equally many rows. Either route [groups] has the adapter of each, -1 for none, or mix
// [groups][count] has its weights of all adapters.
struct Bank {
    int64_t count;
    bool shared_rule_down, shared_rule_up;
    int64_t groups;
    const int64_t* route;
    Array mix;
};

// The norm (y - mean) / sqrt(variance + eps) * weight + bias of each row y of an adapter's output.
// weight and bias are (k,); y and grad_y are (tokens, k), contiguous in the dtype of x.
struct LayerNorm {
    Array weight, bias;
    float eps;
    void* y;       // forward writes it and backward reads it; it may be the memory of the normed rows
    void* grad_y;  // backward writes the gradient of y, also that of a residual; it may be y
};

}  // namespace compacter
