// The arguments of the kernels of one instruction set, and the table of these kernels.
#pragma once

#include "../adapter.h"

namespace compacter::cpu {

// The tokens that a kernel computes at once, in the lanes of vectors between x and the output.
constexpr int64_t block_tokens = 16;

// One projection with parameters in fp32. c = (i, rho) < m = n * rank joins slice and rank.
struct Factors {
    int64_t n, rank, m, in, out;
    const float* rule;   // [n][n][n]
    const float* left;   // [m][in / n]
    const float* right;  // [m][out / n]
    const float* bias;   // [out], or null

    int64_t in_chunk() const { return in / n; }
    int64_t out_chunk() const { return out / n; }
};

// Sums over tokens, like Factors; null for an unwanted gradient, with right and bias alike.
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

// The parameters of a layer norm in fp32, [k]; null if there is none.
struct Norm {
    const float *weight, *bias;
    float eps;
};

struct AdapterJob {
    Factors down, up;
    Activation activation;
    DType dtype;
    const void *x, *residual, *grad_out;  // residual: x, another tensor or null; backward: not null if x was one
    void* out;                            // forward: the output; backward: the gradient of x, or null
    bool streaming, also_x;               // also_x: forward adds x besides the residual
    Norm norm{};
    void *y = nullptr, *grad_y = nullptr;  // with a norm: its input; backward: memory for the gradient of it
};

// A part is a range of tokens that starts at a multiple of block_tokens. Its `scratch`, aligned to
// 64 bytes, has the floats that *_scratch returns, which depend on the dimensions alone.
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
