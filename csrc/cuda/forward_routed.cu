// The forward for pairs of chunks of a routed bank. A block has a contiguous range of tiles of 8 tokens, and so few
// adapters. It serves them one after another, each as forward.cu serves its one. A tile lies whole in one group of rows, so
// its tokens are neighbours.
#include "pair_pass.h"
#include "routed.h"

namespace compacter::cuda {
namespace {

template <int N>
__global__ void __launch_bounds__(32 * Pairs<N>::most_warps, 1) forward(const RoutedPairForward r) {
    const PairForward& f = r.f;
    const PairPass<N> pass(f);
    const PairSizes& s = f.sizes;
    unsigned char* const ring = shared_memory() + f.ring + pass.group.index * s.tile_bytes();
    const int stage_bytes = pass.group.count * s.tile_bytes(), step = pass.group.count;
    const auto rows = [&](const void* tensor, int tile) {
        return static_cast<const unsigned char*>(tensor) + start_of(r.routed, tile);
    };
    const Segment segment(r.routed);
    for (bool start = true; segment.next(start); start = false) {
        const int first = segment.first(), end = segment.end();
        const bool computes = segment.has_adapter();
        const auto load = [&](int tile, int stage) {
            if (tile < end) pass.part.load(ring + stage * stage_bytes, rows(f.x, tile), tile_tokens);
            commit_copies();
        };
        load(first + pass.group.index, 0);
        if (computes) pass.prepare(of_adapter(f.factors, r.routed, segment.adapter()));
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
            if (segment.out_of_range()) pass.part.poison(at);
            __syncwarp();
            pass.part.store(at, const_cast<unsigned char*>(rows(f.out, tile)), tile_tokens);
            __syncwarp();
            load(tile + 2 * step, stage);
            stage ^= 1;
        }
    }
}

}  // namespace

void routed_pair_forward_kernel(const RoutedPairForward& r, const Launch& l) {
    if (r.f.sizes.n == 4) launch(forward<4>, l, r);
    else if (r.f.sizes.n == 8) launch(forward<8>, l, r);
    else launch(forward<12>, l, r);
}

}  // namespace compacter::cuda
