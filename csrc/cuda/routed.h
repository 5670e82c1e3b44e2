// A routed bank in the kernels for adapters of rank 1 whose sizes they know: tiles of 8 tokens, which are neighbours.
#pragma once

#include "tiles.h"

namespace compacter::cuda {

// The parameters of an adapter, from those of the first.
COMPACTER_DEVICE Factors of_adapter(Factors f, const Routed& r, int64_t adapter) {
    const auto advance = [&](Array& array, int size) {
        const int bytes = array.dtype == DType::f64 ? 8 : array.dtype == DType::f32 ? 4 : 2;
        if (array.data) array.data = static_cast<unsigned char*>(array.data) + adapter * size * bytes;
    };
    if (!r.shared_rule) advance(f.rule, r.cube);
    if (!r.shared_rule2) advance(f.rule2, r.cube);
    advance(f.left, r.width);
    advance(f.right, r.bottleneck);
    advance(f.bias, r.bottleneck);
    advance(f.left2, r.bottleneck);
    advance(f.right2, r.width);
    advance(f.bias2, r.width);
    return f;
}

// The bytes from the start of x to a tile.
COMPACTER_DEVICE int64_t start_of(const Routed& r, int tile) {
    const Tiles tiles{r.tiling};
    return int64_t{tiles.token(tiles.at(tile).first)} * r.width * 2;
}

// The tiles of one adapter in the contiguous range of a block, in shared memory, so that no register holds them.
struct Segment {
    const Routed& r;
    volatile int* note;  // adapter, first tile, end

    COMPACTER_DEVICE explicit Segment(const Routed& r) : r(r), note(reinterpret_cast<int*>(shared_memory() + r.note)) {}

    COMPACTER_DEVICE int adapter() const { return note[0]; }
    COMPACTER_DEVICE int first() const { return note[1]; }
    COMPACTER_DEVICE int end() const { return note[2]; }
    COMPACTER_DEVICE bool has_adapter() const { return adapter() < r.tiling.adapters; }
    COMPACTER_DEVICE bool out_of_range() const { return adapter() > r.tiling.adapters; }

    // Goes to the first segment, or to the one behind this. Returns whether there is one. The threads of the block have done
    // with the segment before.
    COMPACTER_DEVICE bool next(bool start) const {
        __syncthreads();
        if (threadIdx.x == 0) {
            const Tiles tiles{r.tiling};
            const int share = tiles.share(gridDim.x), begin = start ? static_cast<int>(blockIdx.x) * share : note[2];
            const int range = (static_cast<int>(blockIdx.x) + 1) * share, last = range < tiles.count() ? range : tiles.count();
            const int adapter = begin < last ? tiles.at(begin).adapter : 0;
            const int next = begin < last ? r.tiling.table[r.tiling.starts() + adapter + 1] : begin;
            note[0] = adapter;
            note[1] = begin;
            note[2] = next < last ? next : last > begin ? last : begin;
        }
        __syncthreads();
        return note[1] < note[2];
    }
};

}  // namespace compacter::cuda
