// The tiles of a routed bank: a stable counting sort of the groups of rows by their adapters, by one block.
//
// Each warp counts the adapters in its own groups. The counts of the warps before give each adapter's groups their places,
// so the groups of an adapter stay in their order, and no result depends on which thread comes first. A number that is out
// of range has a bucket of its own, and so has -1.
#include "family.h"

namespace compacter::cuda {
namespace {

constexpr int table_threads = 1024;

struct Sort {
    const FamilyTable& t;
    int* counts;          // [warp][bucket]: then of the warps before it
    int *starts, *tiles;  // [bucket]: the first place, the first tile
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, buckets;

    COMPACTER_DEVICE explicit Sort(const FamilyTable& t)
        : t(t), counts(reinterpret_cast<int*>(shared_memory())), starts(counts + t.warps * t.tiling.buckets()),
          tiles(starts + t.tiling.buckets() + 1), buckets(t.tiling.buckets()) {}

    // body(group, bucket, lanes of the same bucket) for the groups of this warp, 32 at a time; then it counts them.
    template <class Body>
    COMPACTER_DEVICE void for_each_group(const Body& body) const {
        if (warp >= t.warps) return;
        const int share = (t.groups + t.warps - 1) / t.warps, begin = warp * share;
        const int end = begin + share < t.groups ? begin + share : t.groups;
        for (int first = begin; first < end; first += 32) {
            const int group = first + lane, adapters = t.tiling.adapters;
            const int64_t wanted = group < end ? t.route[group] : 0;
            const bool known = wanted >= 0 && wanted < adapters;
            const int bucket = group < end ? known ? static_cast<int>(wanted) : wanted == -1 ? adapters : adapters + 1 : -1;
            const uint32_t same = lanes_with(bucket);
            if (bucket >= 0) body(group, bucket, same);
            __syncwarp();
            if (bucket >= 0 && bits_of(same & ((1u << lane) - 1)) == 0) counts[warp * buckets + bucket] += bits_of(same);
            __syncwarp();
        }
    }

    // From the sizes of the buckets, in starts, to where they and their tiles start; by one warp.
    COMPACTER_DEVICE void sum_up() const {
        int places = 0, tiles_before = 0;
        for (int first = 0; first <= buckets; first += 32) {
            const int bucket = first + lane, size = bucket < buckets ? starts[bucket] : 0;
            const int of_bucket = (size * t.tiling.group + t.tiling.tokens - 1) / t.tiling.tokens;
            int place = size, tile = of_bucket;
            for (int step = 1; step < 32; step *= 2) {
                const int place_before = __shfl_up_sync(0xffffffff, place, step), tile_before = __shfl_up_sync(0xffffffff, tile, step);
                if (lane >= step) place += place_before;
                if (lane >= step) tile += tile_before;
            }
            if (bucket <= buckets) {
                starts[bucket] = places + place - size;
                tiles[bucket] = tiles_before + tile - of_bucket;
            }
            places += __shfl_sync(0xffffffff, place, 31);
            tiles_before += __shfl_sync(0xffffffff, tile, 31);
        }
    }

    // The last bucket whose first tile is not behind this one.
    COMPACTER_DEVICE int bucket_of(int tile) const {
        int low = 0, high = buckets;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (tiles[middle] <= tile) low = middle;
            else high = middle;
        }
        return low;
    }
};

__global__ void __launch_bounds__(table_threads) make_table(const FamilyTable t) {
    const Sort sort(t);
    const Tiling& to = t.tiling;
    for (int e = threadIdx.x; e < t.warps * sort.buckets; e += blockDim.x) sort.counts[e] = 0;
    __syncthreads();
    sort.for_each_group([](int, int, uint32_t) {});
    __syncthreads();
    for (int bucket = threadIdx.x; bucket < sort.buckets; bucket += blockDim.x) {
        int sum = 0;
        for (int warp = 0; warp < t.warps; ++warp) {
            int& count = sort.counts[warp * sort.buckets + bucket];
            sum += count;
            count = sum - count;
        }
        sort.starts[bucket] = sum;
    }
    __syncthreads();
    if (sort.warp == 0) sort.sum_up();
    __syncthreads();
    sort.for_each_group([&](int group, int bucket, uint32_t same) {
        const int before = bits_of(same & ((1u << sort.lane) - 1));
        t.table[to.order() + sort.starts[bucket] + sort.counts[sort.warp * sort.buckets + bucket] + before] = group;
    });
    const int tiles = sort.tiles[sort.buckets];
    if (threadIdx.x == 0) t.table[0] = tiles;
    for (int bucket = threadIdx.x; bucket <= sort.buckets; bucket += blockDim.x) t.table[to.starts() + bucket] = sort.tiles[bucket];
    for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
        const int bucket = sort.bucket_of(tile), first = sort.starts[bucket] * to.group + (tile - sort.tiles[bucket]) * to.tokens;
        const int left = sort.starts[bucket + 1] * to.group - first;
        int* entry = t.table + to.tiles() + 3 * tile;
        entry[0] = bucket;
        entry[1] = first;
        entry[2] = left < to.tokens ? left : to.tokens;
    }
}

}  // namespace

void family_table_kernel(const FamilyTable& t, const Launch& l) { launch(make_table, l, t); }

}  // namespace compacter::cuda
