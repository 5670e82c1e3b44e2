// The plan of a problem on a device: the tiles, the layout of shared memory, the grid.
#pragma once

#include "element.h"
#include "kernels.h"

namespace compacter::cuda {

// Calls body(T{}) with the type of the numbers of x.
template <class Body>
auto with_element(DType dtype, const Body& body) {
    if (dtype == DType::bf16) return body(bf16{});
    if (dtype == DType::f16) return body(f16{});
    return body(f32{});
}

// One problem for the kernels: an adapter, or one projection (up == nullptr).
struct Problem {
    const Projection *down, *up;
    DType dtype;
    float scale;
    Activation activation;
    int64_t tokens;
};

Problem problem_of(const Linear& linear);
Problem problem_of(const Adapter& adapter);

// The sizes of a problem whose numbers X[c] are n for each token. in_vectors and out_vectors: whether rows begin at multiples of
// 16 bytes.
Sizes sizes_of(const Problem& problem, int tokens, int n);

// The gradients of a backward in a row of partials, of which an absent bias has none.
struct Row {
    int64_t floats;
    int begin[9];
    int count;
};

Row row_of(const Problem& problem);
Factors factors_of(const Problem& problem);

// The arguments of a kernel, without pointers, and its launch, which may exceed the shared memory.
struct PlannedForward {
    Forward arguments;
    Launch launch;
};
struct PlannedBackward {
    Backward arguments;
    Launch launch;
};

struct PlannedPairForward {
    PairForward arguments;
    Launch launch;
};

PlannedForward plan_forward(const Problem& problem, const Device& device);
// aligned: all tensors that backward reads or writes, but the gradients of parameters, begin at multiples of 16 bytes.
PlannedBackward plan_backward(const Problem& problem, const Device& device, bool aligned = true);

// Whether the kernels for pairs of chunks have these sizes; addresses must be multiples of 16 too.
bool pairs_serve(const Problem& problem);
PlannedPairForward plan_pair_forward(const Problem& problem, const Device& device);

}  // namespace compacter::cuda
