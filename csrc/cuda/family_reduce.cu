// The last kernels of a backward of the family. They add what the programs have for each adapter, and what the tokens of a
// group have for its weights of a mix, in a fixed order. An adapter that does not occur gets zeros.
#include "tiles.h"

namespace compacter::cuda {
namespace {

constexpr int reduce_threads_of_family = 256, mix_threads = 1024;

// A block has some columns of one adapter. Its threads are `groups` groups, each of which sums the rows of every groups-th
// program, and the first adds their sums.
__global__ void __launch_bounds__(reduce_threads_of_family, 1) reduce(const FamilyReduce r) {
    float* sums = reinterpret_cast<float*>(shared_memory());  // [group][column]
    const int width = reduce_threads_of_family / r.groups, blocks = (r.columns + width - 1) / width;
    const int adapter = blockIdx.x / blocks, group = threadIdx.x / width, lane = threadIdx.x - group * width;
    const Tiles tiles{r.family.tiling};
    int at = (blockIdx.x - adapter * blocks) * width + lane;
    int chosen = 0;
    while (chosen < r.count && at >= r.gradients[chosen].size) at -= r.gradients[chosen++].size;
    const bool found = chosen < r.count;
    const FamilyGradient& gradient = r.gradients[found ? chosen : 0];
    const bool computes = found && gradient.array.data && (!gradient.shared || adapter == 0);
    wait_for_previous_kernel();
    float sum = 0.f;
    if (computes) {
        const Partials& partials = gradient.wide ? r.wide : r.narrow;
        const int end = gradient.shared ? r.family.tiling.adapters : adapter + 1;
        for (int e = adapter, before = 0; e < end; ++e) {
            const Range programs = tiles.programs(partials.programs, e);
            const int first = (group + r.groups - before % r.groups) % r.groups;
#pragma unroll 4
            for (int p = programs.begin + first; p < programs.end; p += r.groups)
                sum += partials.of(r.family, p, e)[gradient.begin + at];
            before += programs.end - programs.begin;
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group != 0 || !computes) return;
    for (int other = 1; other < r.groups; ++other) sum += sums[other * width + lane];
    write(gradient.array, gradient.shared ? at : int64_t{adapter} * gradient.size + at, sum);
}

// A block has 32 adapters of one group.
__global__ void __launch_bounds__(mix_threads) reduce_mix(const MixReduce r) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = mix_threads / 32, blocks = (r.adapters + 31) / 32;
    const int group = blockIdx.x / blocks, adapter = (blockIdx.x - group * blocks) * 32 + lane;
    float sum = 0.f;
    if (adapter < r.adapters)
#pragma unroll 8
        for (int token = warp; token < r.group; token += warps)
            sum += r.tokens[(int64_t{group} * r.group + token) * r.adapters + adapter];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp != 0 || adapter >= r.adapters) return;
    for (int other = 1; other < warps; ++other) sum += sums[other * 32 + lane];
    write(r.gradient, int64_t{group} * r.adapters + adapter, sum);
}

}  // namespace

void family_reduce_kernel(const FamilyReduce& r, const Launch& l) { launch(reduce, l, r); }
void mix_reduce_kernel(const MixReduce& r, const Launch& l) { launch(reduce_mix, l, r); }

}  // namespace compacter::cuda
