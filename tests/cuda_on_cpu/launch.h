// The names of csrc/cuda/runtime.h: a launch runs to its end before it returns, and throws what has gone wrong.
#pragma once

#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ptx.h"

namespace cuda_on_cpu {

inline std::mutex one_launch;  // at a time, whatever thread it comes from

inline std::vector<int> block_order(int blocks) {
    std::vector<int> indices(blocks);
    std::iota(indices.begin(), indices.end(), 0);
    if (order == 1) std::reverse(indices.begin(), indices.end());
    if (order > 1) std::shuffle(indices.begin(), indices.end(), dice);
    return indices;
}

inline bool all_ones(const unsigned char* bytes, size_t count) {
    return !count || (*bytes == 0xff && !memcmp(bytes, bytes + 1, count - 1));
}

inline void run_grid(int blocks, int threads) {
    unsigned char* const beyond = shared + shared_bytes;
    const size_t beyond_bytes = sizeof shared - shared_bytes;
    for (int index : block_order(blocks)) {
        blockIdx.x = static_cast<unsigned>(index);
        memset(shared, 0xff, sizeof shared);
        start_race_check_of_block();
#ifdef __SANITIZE_ADDRESS__
        __asan_poison_memory_region(beyond, beyond_bytes);
#endif
        run_block(threads);
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(beyond, beyond_bytes);
#endif
        if (failure.empty() && !all_ones(beyond, beyond_bytes))
            failure = "block " + std::to_string(index) + " has written beyond its " + std::to_string(shared_bytes) +
                      " bytes of shared memory";
        if (!failure.empty()) return;
    }
}

inline void run(int blocks, int threads, int bytes, bool overlaps, std::function<void()> body) {
    std::lock_guard<std::mutex> lock(one_launch);
    if (blocks < 1) throw std::runtime_error("launch: there are " + std::to_string(blocks) + " blocks");
    if (threads < 1 || threads > most_threads)
        throw std::runtime_error("launch: a block has " + std::to_string(threads) + " threads");
    if (bytes < 0 || static_cast<size_t>(bytes) > most_shared_bytes)
        throw std::runtime_error("launch: a block has " + std::to_string(bytes) + " bytes of shared memory");
    kernel = std::move(body);
    failure.clear();
    gridDim = {static_cast<unsigned>(blocks), 1, 1};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    shared_bytes = static_cast<size_t>(bytes);
    dice.seed(order);
    any_waited = false;
    start_race_check(overlaps);
    run_grid(blocks, threads);
    // once no thread has waited, the end of this kernel does not mean that its predecessor has ended
    if (failure.empty() && overlaps && !any_waited)
        failure = "a kernel that overlaps its predecessor has not waited for it";
    if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace cuda_on_cpu

namespace compacter::cuda {

struct Launch {
    int blocks, threads;
    int shared_bytes;
    void* stream;
    bool overlaps;
};

inline int driver_version() { return 13000; }
inline int runtime_version() { return 13000; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& l, Arguments&&... arguments) {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied byte by byte");
    static_assert((sizeof(Parameters) + ... + 0) <= 4096, "parameters have 4 KiB");
    const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    cuda_on_cpu::run(l.blocks, l.threads, l.shared_bytes, l.overlaps,
                     [kernel, &parameters] { std::apply(kernel, parameters); });
}

}  // namespace compacter::cuda

extern "C" {
#define COMPACTER_EXPORTED __attribute__((used, visibility("default"))) inline
// The order of the launches to come.
COMPACTER_EXPORTED void cuda_on_cpu_order(unsigned order) { cuda_on_cpu::order = order; }
// Bank conflicts of ldmatrix since the last call.
COMPACTER_EXPORTED int cuda_on_cpu_conflicts() { return std::exchange(cuda_on_cpu::conflicts, 0); }
}
