// The small factors of the adapters of a tile in shared memory, and the sums of their gradients, for a block.
#pragma once

#include "slabs.h"

namespace compacter::cuda {

COMPACTER_DEVICE SharedFactors of_slot(SharedFactors at, int bytes) {
    for (int* offset : {&at.rule, &at.rule2, &at.right, &at.left2, &at.bias}) *offset += bytes;
    return at;
}
COMPACTER_DEVICE SharedSums of_slot(SharedSums at, int bytes) {
    for (int* offset : {&at.rule, &at.rule2, &at.right, &at.left2, &at.bias}) *offset += bytes;
    return at;
}

COMPACTER_DEVICE void clear(int from, int to) {
    for (int e = from / 16 + threadIdx.x; e < to / 16; e += blockDim.x) vectors_at(0)[e] = make_uint4(0, 0, 0, 0);
}

// The places of the numbers of the small factors of one adapter in its slot, in floats, in the order of their tensors.
struct SmallPlaces {
    const Family& f;

    COMPACTER_DEVICE int rule(int e) const {
        const int matrix = f.n_in * f.n_out, i = e / matrix, p = (e - i * matrix) / f.n_out;
        return i * f.middle.rule_stride + p * f.middle.n + e - i * matrix - p * f.n_out;
    }
    // stride: from one c to the next, inner_stride for the factors and inner for the sums.
    COMPACTER_DEVICE int right(int e, int stride) const {
        const int c = f.middle.by_inner.quotient(e);
        return c * stride + e - c * f.middle.inner;
    }
    COMPACTER_DEVICE int left2(int e, int stride) const {  // [i][v][rho]
        const int rank = f.middle.rank, row = e / rank, i = f.middle.by_inner.quotient(row);
        return (i * rank + e - row * rank) * stride + row - i * f.middle.inner;
    }
    COMPACTER_DEVICE int bias(int e) const {
        if (f.dense) return e;
        const int q = f.middle.by_inner.quotient(e);
        return (e - q * f.middle.inner) * f.middle.n + q;
    }
};

// The image of a tile's adapter.
COMPACTER_DEVICE const unsigned char* image_of(const Family& f, const Images& images, int adapter) {
    return images.first + (f.mixed ? 0 : adapter) * images.bytes;
}

// Copies the small factors of all slots.
COMPACTER_DEVICE void stage_small(const Family& f, const FamilyPlaces& places, int adapter) {
    copy_bytes(places.factors.rule, image_of(f, places.images, adapter), places.images.small);
    commit_copies();
    wait_copies<0>();
}

// Writes the sums of all slots to the rows of a program, each in the order of its tensor.
COMPACTER_DEVICE void store_small(const Family& f, const SharedSums& sums, int bytes, const Partials& partials, int adapter) {
    const SmallPlaces place{f};
    for (int slot = 0; slot < f.slots; ++slot) {
        const SharedSums from = of_slot(sums, slot * bytes);
        float* to = partials.of(f, blockIdx.x, f.mixed ? slot : adapter);
        const int size = f.rule_size(), inner = f.inner_size(), bias = f.bias_size();
        if (!f.dense)
            for (int j = threadIdx.x; j < size; j += blockDim.x) {
                to[j] = floats_at(from.rule)[place.rule(j)];
                if (f.middle.inner) to[size + inner + bias + j] = floats_at(from.rule2)[place.rule(j)];
            }
        for (int j = threadIdx.x; j < bias; j += blockDim.x) to[size + inner + j] = floats_at(from.bias)[place.bias(j)];
        for (int j = threadIdx.x; j < inner; j += blockDim.x) {
            to[size + j] = floats_at(from.right)[place.right(j, f.middle.inner)];
            to[size + inner + bias + size + j] = floats_at(from.left2)[place.left2(j, f.middle.inner)];
        }
    }
}

// The ones that pick the row of the bias, times the weight of a slot, [slot][token], in rows c = `first` on: those of slot and q
// have them in the rows q of the tokens. All other numbers of these c are 0 already.
template <class T, class Weight>
COMPACTER_DEVICE void store_ones(const Parts& to, int first, const Family& f, const Weight& weight) {
    const int rows = f.middle.tokens * f.n_out;
    for (int e = threadIdx.x; e < rows * f.slots; e += blockDim.x) {
        const int slot = e / rows, row = e - slot * rows, token = f.by_n_out.quotient(row), q = row - token * f.n_out;
        store_parts<T>(to, first + slot * f.n_out + q, row, weight(slot, token));
    }
}

}  // namespace compacter::cuda
