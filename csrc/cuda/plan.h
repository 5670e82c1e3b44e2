// How a problem is cut on a device: the tiles, what lies where in shared memory, the grid.
#pragma once

#include "element.h"
#include "kernels.h"

namespace compacter::cuda {

// body(T{}) with the type of x's numbers.
template <class Body>
auto with_element(DType dtype, const Body& body) {
    if (dtype == DType::bf16) return body(bf16{});
    if (dtype == DType::f16) return body(f16{});
    return body(f32{});
}

// One problem as the kernels see it: an adapter, or a single projection (up == nullptr).
struct Problem {
    const Projection *down, *up;
    DType dtype;
    float scale;
    Activation activation;
    int64_t tokens;
};

Problem problem_of(const Linear& linear);
Problem problem_of(const Adapter& adapter);

// What a backward writes, in the order of a row of partials.
struct Row {
    int64_t floats;
    int begin[9];
    int count;
};

Row row_of(const Problem& problem);
Factors factors_of(const Problem& problem);

// A kernel's arguments, without pointers, and its launch. shared_bytes may be more than the device has.
struct PlannedForward {
    Forward arguments;
    Launch launch;
};
struct PlannedBackward {
    Backward arguments;
    Launch launch;
};

PlannedForward plan_forward(const Problem& problem, const Device& device);
PlannedBackward plan_backward(const Problem& problem, const Device& device);

}  // namespace compacter::cuda
