// A projection's parameters as the kernels read them, and its gradients as the caller wants them.
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace compacter::cpu {

int64_t staged_floats(const Projection& projection, float scale);
Factors dimensions(const Projection& projection);
void stage(const Projection& projection, float scale, Scratch& scratch, Factors& f);  // right and bias times scale

int64_t staged_floats(const LayerNorm& norm, int64_t k);
Norm stage(const LayerNorm& norm, int64_t k, Scratch& scratch);

// One row of sums per part.
int64_t sums_floats(const Projection& projection, const Parameters& gradients);
Sums place_sums(const Projection& projection, const Parameters& gradients, float* row);

// Adds up the rows in order and writes each gradient in its own dtype.
void write_gradients(const Projection& projection, const Parameters& gradients, float scale, float* rows, int64_t stride,
                     int64_t parts);

}  // namespace compacter::cpu
