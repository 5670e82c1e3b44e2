// Copies the rows of a tile to shared memory, in whole segments padded with zeros.
#pragma once

#include "columns.h"

namespace compacter::cuda {

// The bytes of a row, an odd multiple of 16, so that eight consecutive rows are in different banks.
template <class T>
COMPACTER_BOTH constexpr int row_bytes(int width) {
    return segments(width) * segment * static_cast<int>(sizeof(T)) + 16;
}

// All threads of the block start the copy, which is complete after wait_copies and a barrier.
template <class T>
COMPACTER_DEVICE void copy_rows(unsigned char* to, int stride, int rows, const T* first, int valid, int width, bool vectors) {
    if (vectors) {
        constexpr int numbers = 16 / sizeof(T);
        const int pieces = segments(width) * segment / numbers;
        for (int e = threadIdx.x; e < rows * pieces; e += blockDim.x) {
            const int row = e / pieces, column = (e - row * pieces) * numbers;
            const bool real = row < valid && column < width;
            copy_async(to + row * stride + column * static_cast<int>(sizeof(T)),
                       first + (real ? static_cast<int64_t>(row) * width + column : 0), real);
        }
        return;
    }
    const int eights = segments(width) * segment / 8;
    for (int e = threadIdx.x; e < rows * eights; e += blockDim.x) {
        const int row = e / eights, column = (e - row * eights) * 8, count = row < valid ? width - column : 0;
        const Eight<T> numbers = load_eight(first + static_cast<int64_t>(row) * width + column, count, false);
        auto* at = reinterpret_cast<uint4*>(to + row * stride + column * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int v = 0; v < Eight<T>::vectors; ++v) at[v] = numbers.raw[v];
    }
}

}  // namespace compacter::cuda
