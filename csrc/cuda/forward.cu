// The forward of an adapter of rank 1 on bf16; forward_general.cu serves everything else. It reads x once
// and writes the output once. A group of warps has a tile of 8 tokens, and each warp some of its chunks.
// The products are in pair_pass.h.
#include "pair_pass.h"

namespace compacter::cuda {
namespace {

template <int N>
__global__ void __launch_bounds__(32 * Pairs<N>::most_warps, 1) forward(const PairForward f) {
    const PairPass<N> pass(f);
    const PairSizes& s = f.sizes;
    const int64_t tiles = (f.tokens + tile_tokens - 1) / tile_tokens, step = static_cast<int64_t>(gridDim.x) * pass.group.count;
    const int64_t begin = blockIdx.x + static_cast<int64_t>(gridDim.x) * pass.group.index;
    unsigned char* const ring = shared_memory() + f.ring + pass.group.index * s.tile_bytes();
    const int stage_bytes = pass.group.count * s.tile_bytes();
    const auto valid = [&](int64_t tile) { return static_cast<int>(min(f.tokens - tile * tile_tokens, int64_t{tile_tokens})); };
    const auto rows = [&](const void* tensor, int64_t tile) {
        return static_cast<const unsigned char*>(tensor) + tile * tile_tokens * s.width * 2;
    };
    const auto load = [&](int64_t tile, int stage) {
        if (tile < tiles) pass.part.load(ring + stage * stage_bytes, rows(f.x, tile), valid(tile));
        commit_copies();
    };
    load(begin, 0);
    pass.prepare(f.factors);
    load(begin + step, 1);

    int stage = 0;
    for (int64_t tile = begin; tile < tiles; tile += step) {
        unsigned char* const at = ring + stage * stage_bytes;
        wait_copies<1>();
        __syncwarp();
        pass.contract(at);
        pass.bottleneck();
        const auto v = pass.mix();
        if (f.residual != f.x) {  // takes the place of x; without one, zeros do
            __syncwarp();
            pass.part.load(at, rows(f.residual ? f.residual : f.x, tile), f.residual ? valid(tile) : 0);
            commit_copies();
            wait_copies<0>();
            __syncwarp();
        }
        pass.expand(at, v);
        __syncwarp();
        pass.part.store(at, const_cast<unsigned char*>(rows(f.out, tile)), valid(tile));
        __syncwarp();
        load(tile + 2 * step, stage);
        stage ^= 1;
    }
}

}  // namespace

void pair_forward_kernel(const PairForward& f, const Launch& l) {
    if (f.sizes.n == 4) launch(forward<4>, l, f);
    else if (f.sizes.n == 8) launch(forward<8>, l, f);
    else launch(forward<12>, l, f);
}

}  // namespace compacter::cuda
