// The folded backward of a routed bank. A block has a contiguous range of tiles of 8 tokens, and so few adapters. It serves
// them one after another, each as backward.cu serves its one, and writes a row of partials for each. The kernel is left out for
// architectures on which it would take more registers than there are.
#include "folded_pass.h"
#include "routed.h"

namespace compacter::cuda {
namespace {

#if defined(COMPACTER_CUDA_ON_CPU) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define COMPACTER_ROUTED_BACKWARD
#endif

// dx of tiles without an adapter: g if the residual is x, else 0; NaN if the route is out of range.
[[maybe_unused]] COMPACTER_DEVICE void without_adapter(const RoutedBackward& r, int first, int end, bool poison) {
    const int vectors = r.routed.width / 8;  // of a token
    for (int e = threadIdx.x; e < (end - first) * 8 * vectors; e += blockDim.x) {
        const int tile = e / (8 * vectors);
        const int64_t at = start_of(r.routed, first + tile) + (e - tile * 8 * vectors) * 16;
        uint4 four = make_uint4(0, 0, 0, 0);
        if (poison) four = make_uint4(0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff);
        else if (r.b.residual_is_x) four = load_constant(reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(r.b.grad_out) + at));
        *reinterpret_cast<uint4*>(static_cast<unsigned char*>(r.b.grad_x) + at) = four;
    }
}

template <class S>
__global__ void __launch_bounds__(256, 1) backward(const RoutedBackward r) {
#ifdef COMPACTER_ROUTED_BACKWARD
    const Backward& b = r.b;
    const Segment segment(r.routed);
    for (bool start = true; segment.next(start); start = false) {
        if (!segment.has_adapter()) {
            if (b.grad_x) without_adapter(r, segment.first(), segment.end(), segment.out_of_range());
            continue;
        }
        const FoldedPass<S> pass(b);
        const int step = pass.group.count;
        int tile = segment.first() + pass.group.index;
        const auto valid = [] { return S::tokens; };
        const auto load = [&](int tile, int stage) {
            if (tile < segment.end()) pass.load_from([&] { return start_of(r.routed, tile); }, valid, stage);
            commit_copies();
        };
        pass.in_turn(S::group > 1 ? 1 : 2, [&] { load(tile, 0); });
        stage_parameters<S>(of_adapter(b.factors, r.routed, segment.adapter()));
        if (b.stages == 2) load(tile + step, 1);
        __syncthreads();
        form_folded<S>();
        __syncthreads();
        Sums<S> sums = {};
        int stage = 0;
        for (; tile < segment.end(); tile += step) {
            if (b.stages == 2) wait_copies<1>();
            else wait_copies<0>();
            __syncwarp();
            unsigned char* x = pass.rows(stage);
            pass.tile(x, x + S::tokens * S::row, sums);
            __syncwarp();
            if (b.grad_x) pass.store_to([&] { return start_of(r.routed, tile); }, valid, stage);
            __syncwarp();
            load(tile + b.stages * step, stage);
            stage = b.stages - 1 - stage;
        }
        FoldedPass<S>(b).finish(sums, [&] { return int64_t{block_anew()} + segment.adapter(); });
    }
    let_next_kernel_start();
#endif
}

}  // namespace

void routed_folded_backward_kernel(const RoutedBackward& r, const Launch& l) {
    with_shape(r.b.sizes, [&](auto shape) { launch(backward<decltype(shape)>, l, r); });
}

}  // namespace compacter::cuda
