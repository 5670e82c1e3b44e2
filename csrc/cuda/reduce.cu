// The second stage of backward, which adds the rows of partials in a fixed order.
//
// A block has 32 columns. Each of its 16 warps sums every 16th row, and the first adds their sums.
#include "kernels.h"
#include "numbers.h"

namespace compacter::cuda {
namespace {

__global__ void __launch_bounds__(reduce_threads) reduce(const Reduce r) {
    constexpr int groups = reduce_threads / reduce_columns;
    float* sums = reinterpret_cast<float*>(shared_memory());  // [group][column]
    const int lane = threadIdx.x % reduce_columns, group = threadIdx.x / reduce_columns;
    const int column = blockIdx.x * reduce_columns + lane;
    wait_for_previous_kernel();
    float sum = 0.f;
    if (column < r.begin[r.count]) {
#pragma unroll 8
        for (int row = group; row < r.rows; row += groups) sum += r.partials[row * r.row + column];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group != 0 || column >= r.begin[r.count]) return;
    for (int other = 1; other < groups; ++other) sum += sums[other * reduce_columns + lane];
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < r.count && column >= r.begin[j] && column < r.begin[j + 1] && r.gradient[j].data)
            write(r.gradient[j], column - r.begin[j], sum);
}

}  // namespace

void reduce_kernel(const Reduce& r, const Launch& l) { launch(reduce, l, r); }

}  // namespace compacter::cuda
