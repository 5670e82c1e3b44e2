// The arguments of the kernels of one instruction set, and the table of these kernels.
#pragma once

#include "../adapter.h"

namespace compacter::cpu {

// The tokens that a kernel computes at once, in the lanes of vectors between x and the output.
constexpr int64_t block_tokens = 16;

// One projection with parameters in fp32. c = (i, rho) < m = terms * rank joins slice and rank. A
// dense projection has no rule; down has m = out and left [m][in], and up has m = in and right
// [m][out], with one chunk on its wide side.
struct Factors {
    int64_t n_in, n_out, rank, m, in, out;
    const float* rule;   // [terms][n_in][n_out]
    const float* left;   // [m][in / n_in]
    const float* right;  // [m][out / n_out]
    const float* bias;   // [out], or null

    int64_t in_chunk() const { return in / n_in; }
    int64_t out_chunk() const { return out / n_out; }
    const float* rule_of(int64_t c) const { return rule + c / rank * n_in * n_out; }
};

// Sums over tokens, like Factors; null for an unwanted gradient. With right of a wide side, bias
// is wanted alike.
struct Sums {
    float *rule, *left, *right, *bias;
};

struct LinearJob {
    Factors factors;
    DType dtype;
    const void *x, *base, *grad_out;
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
    bool dense;
    Norm norm{};
    void *y = nullptr, *grad_y = nullptr;  // with a norm: its input; backward: memory for the gradient of it
    const int64_t* rows = nullptr;         // the row of each token, or null: token t is row t; not with a norm
};

// A weighted sum of `count` adapters. The Factors are those of the first; the tensors of the others
// follow one behind the other, except those of a shared rule.
struct MixedJob {
    AdapterJob first;
    int64_t count;
    bool shared_rule_down, shared_rule_up;
    const float* mix;  // [groups][count]
    int64_t per_group;
    float* grad_mix;  // backward: [tokens][count], or null
};

// A part is a range of tokens that starts at a multiple of block_tokens. Its `scratch`, aligned to
// 64 bytes, has the floats that *_scratch returns, which depend on the dimensions alone.
struct Kernels {
    const char* isa;
    int64_t (*linear_scratch)(const Factors&);
    void (*linear_forward)(const LinearJob&, int64_t begin, int64_t end, float* scratch);
    void (*linear_backward)(const LinearJob&, int64_t begin, int64_t end, float* scratch, const Sums&);
    int64_t (*adapter_scratch)(const AdapterJob&);
    void (*adapter_forward)(const AdapterJob&, int64_t begin, int64_t end, float* scratch);
    void (*adapter_backward)(const AdapterJob&, int64_t begin, int64_t end, float* scratch, const Sums& down,
                             const Sums& up);
    // The tokens of no adapter, forward or backward: out is the sum of what is added.
    void (*adapter_skip)(const AdapterJob&, int64_t begin, int64_t end, float* scratch);
    int64_t (*mixed_scratch)(const MixedJob&);
    void (*mixed_forward)(const MixedJob&, int64_t begin, int64_t end, float* scratch);
    void (*mixed_backward)(const MixedJob&, int64_t begin, int64_t end, float* scratch, const Sums& down, const Sums& up);
};

}  // namespace compacter::cpu
