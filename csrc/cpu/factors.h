// Converts the parameters of a projection for the kernels, and the gradients for the caller.
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace compacter::cpu {

int64_t staged_floats(const Projection& projection, float scale);
Factors dimensions(const Projection& projection);
void stage(const Projection& projection, float scale, Scratch& scratch, Factors& f);  // scales right and bias

int64_t staged_floats(const LayerNorm& norm, int64_t k);
Norm stage(const LayerNorm& norm, int64_t k, Scratch& scratch);

// The sums of one part are one row.
int64_t sums_floats(const Projection& projection, const Parameters& gradients);
Sums place_sums(const Projection& projection, const Parameters& gradients, float* row);

// Adds the rows in order and writes each gradient in its own dtype.
void write_gradients(const Projection& projection, const Parameters& gradients, float scale, float* rows, int64_t stride,
                     int64_t parts);

}  // namespace compacter::cpu
