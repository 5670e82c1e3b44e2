// What the launcher hands to the kernels of one instruction set, and their table.
#pragma once

#include "../adapter.h"

namespace compacter::cpu {

// Tokens that a kernel takes at a time: they sit in vector lanes between x and the output.
constexpr int64_t block_tokens = 16;

// One projection, its parameters as fp32. The rank index is folded into c = (i, rho), c < m = n * rank.
struct Factors {
    int64_t n, rank, m, in, out;
    const float* rule;   // [n][n][n]
    const float* left;   // [m][in / n]
    const float* right;  // [m][out / n]
    const float* bias;   // [out], or null

    int64_t in_chunk() const { return in / n; }
    int64_t out_chunk() const { return out / n; }
};

// Sums over tokens, in the layout of Factors; null where the gradient is not wanted (right and bias come together).
struct Sums {
    float *rule, *left, *right, *bias;
};

struct LinearJob {
    Factors factors;
    DType dtype;
    const void *x, *grad_out;
    void* out;  // forward: the output; backward: the gradient of x, or null
    bool streaming;
};

// A layer norm's parameters as fp32, [k]; null: no norm.
struct Norm {
    const float *weight, *bias;
    float eps;
};

struct AdapterJob {
    Factors down, up;
    Activation activation;
    DType dtype;
    const void *x, *residual, *grad_out;  // residual: null, x, or another tensor; backward: any, if x was one
    void* out;                            // forward: the output; backward: the gradient of x, or null
    bool streaming, also_x;               // also_x: forward, add x besides the residual
    Norm norm{};
    void *y = nullptr, *grad_y = nullptr;  // with a norm: what is normed; backward: room for its gradient
};

// A part is a range of tokens that starts at a multiple of block_tokens. `scratch` has as many floats as the
// *_scratch function says, aligned to 64 bytes.
// The sizes of scratch depend on the dimensions alone, not on the pointers.
struct Kernels {
    const char* isa;
    int64_t (*linear_scratch)(const Factors&);
    void (*linear_forward)(const LinearJob&, int64_t begin, int64_t end, float* scratch);
    void (*linear_backward)(const LinearJob&, int64_t begin, int64_t end, float* scratch, const Sums&);
    int64_t (*adapter_scratch)(const Factors& down, const Factors& up);
    void (*adapter_forward)(const AdapterJob&, int64_t begin, int64_t end, float* scratch);
    void (*adapter_backward)(const AdapterJob&, int64_t begin, int64_t end, float* scratch, const Sums& down,
                             const Sums& up);
};

}  // namespace compacter::cpu
