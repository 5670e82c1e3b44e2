// The forward for pairs of chunks of a routed bank. A block has a contiguous range of tiles of 8 tokens, and so few
// adapters. It serves them one after another, each as forward.cu serves its one. A tile lies whole in one group of rows, so
// its tokens are neighbours.
#include "pair_pass.h"
#include "tiles.h"

namespace compacter::cuda {
namespace {

// The parameters of an adapter.
COMPACTER_DEVICE Factors of_adapter(const RoutedPairForward& r, int64_t adapter) {
    Factors f = r.f.factors;
    const PairSizes& s = r.f.sizes;
    const auto advance = [&](Array& array, int size) {
        const int bytes = array.dtype == DType::f64 ? 8 : array.dtype == DType::f32 ? 4 : 2;
        if (array.data) array.data = static_cast<unsigned char*>(array.data) + adapter * size * bytes;
    };
    if (!r.shared_rule) advance(f.rule, s.cube());
    if (!r.shared_rule2) advance(f.rule2, s.cube());
    advance(f.left, s.width);
    advance(f.right, s.bottleneck);
    advance(f.bias, s.bottleneck);
    advance(f.left2, s.bottleneck);
    advance(f.right2, s.width);
    advance(f.bias2, s.width);
    return f;
}

template <int N>
__global__ void __launch_bounds__(32 * Pairs<N>::most_warps, 1) forward(const RoutedPairForward r) {
    const PairForward& f = r.f;
    const PairPass<N> pass(f);
    const PairSizes& s = f.sizes;
    const Tiles tiles{r.tiling};
    unsigned char* const ring = shared_memory() + f.ring + pass.group.index * s.tile_bytes();
    const int stage_bytes = pass.group.count * s.tile_bytes(), step = pass.group.count;
    const auto rows = [&](const void* tensor, int tile) {
        return static_cast<const unsigned char*>(tensor) + int64_t{tiles.token(tiles.at(tile).first)} * s.width * 2;
    };

    const int share = tiles.share(gridDim.x), begin = blockIdx.x * share;
    const int last = begin + share < tiles.count() ? begin + share : tiles.count();
    for (int first = begin; first < last;) {
        const int adapter = tiles.at(first).adapter, next = r.tiling.table[r.tiling.starts() + adapter + 1];
        const int end = next < last ? next : last;
        const bool computes = adapter < r.tiling.adapters, poison = adapter > r.tiling.adapters;
        const auto load = [&](int tile, int stage) {
            if (tile < end) pass.part.load(ring + stage * stage_bytes, rows(f.x, tile), tile_tokens);
            commit_copies();
        };
        __syncthreads();  // all have done with the adapter before
        load(first + pass.group.index, 0);
        if (computes) pass.prepare(of_adapter(r, adapter));
        load(first + pass.group.index + step, 1);

        int stage = 0;
        for (int tile = first + pass.group.index; tile < end; tile += step) {
            unsigned char* const at = ring + stage * stage_bytes;
            wait_copies<1>();
            __syncwarp();
            typename PairPass<N>::Expanded v{};
            if (computes) {
                pass.contract(at);
                pass.bottleneck();
                v = pass.mix();
            }
            if (f.residual != f.x) {  // takes the place of x; without one, zeros do
                __syncwarp();
                pass.part.load(at, rows(f.residual ? f.residual : f.x, tile), f.residual ? tile_tokens : 0);
                commit_copies();
                wait_copies<0>();
                __syncwarp();
            }
            if (computes) pass.expand(at, v);
            if (poison) pass.part.poison(at);
            __syncwarp();
            pass.part.store(at, const_cast<unsigned char*>(rows(f.out, tile)), tile_tokens);
            __syncwarp();
            load(tile + 2 * step, stage);
            stage ^= 1;
        }
        first = end;
    }
}

}  // namespace

void routed_pair_forward_kernel(const RoutedPairForward& r, const Launch& l) {
    if (r.f.sizes.n == 4) launch(forward<4>, l, r);
    else if (r.f.sizes.n == 8) launch(forward<8>, l, r);
    else launch(forward<12>, l, r);
}

}  // namespace compacter::cuda
