// Backward of an adapter in bf16 whose sizes are known (shapes.h). The products are in folded_pass.h.
#include "folded_pass.h"

namespace compacter::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(256, 1) backward(const Backward b) {
    const FoldedPass<S> pass(b);
    const int tiles = pass.tiles(), step = pass.group.count;
    int tile = pass.group.index;
    const auto load = [&](int tile, int stage) {
        if (tile < tiles) pass.load(tile, stage);
        commit_copies();
    };
    pass.in_turn(S::group > 1 ? 1 : 2, [&] { load(tile, 0); });  // so that the first tile is there long before the last
    stage_parameters<S>(b.factors);
    if (b.stages == 2) load(tile + step, 1);
    __syncthreads();
    form_folded<S>();
    __syncthreads();
    Sums<S> sums = {};
    int stage = 0;
    for (; tile < tiles; tile += step) {
        if (b.stages == 2) wait_copies<1>();
        else wait_copies<0>();
        __syncwarp();
        unsigned char* x = pass.rows(stage);
        pass.tile(x, x + S::tokens * S::row, sums);
        __syncwarp();
        if (b.grad_x) pass.store(tile, stage);
        __syncwarp();
        load(tile + b.stages * step, stage);
        stage = b.stages - 1 - stage;
    }
    let_next_kernel_start();
    FoldedPass<S>(b).finish(sums, [] { return blockIdx.x; });  // reads the number of the warp anew
}

}  // namespace

void folded_backward_kernel(const Backward& b, const Launch& l) {
    with_shape(b.sizes, [&](auto shape) { launch(backward<decltype(shape)>, l, b); });
}

}  // namespace compacter::cuda
