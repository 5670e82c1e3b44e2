// The static division of tokens among OpenMP threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace compacter::cpu {

// The multiplications for which it pays to wake a thread. ThreadSanitizer shall see every call on several.
#ifdef __SANITIZE_THREAD__
constexpr int64_t work_per_part = 1;
#else
constexpr int64_t work_per_part = 1 << 17;
#endif

// The number of parts of `tokens`: the threads, fewer for little work, and one in a forked child.
int64_t part_count(int64_t tokens, int64_t work_per_token, int threads);

inline int64_t block_count(int64_t tokens) { return (tokens + block_tokens - 1) / block_tokens; }

// body(part), which must not throw, for each part on a thread of its own.
template <class Body>
void for_each_part(int64_t parts, const Body& body) {
    if (parts == 1) return body(0);
#ifdef __SANITIZE_THREAD__  // which knows these threads, and takes the waiting in OpenMP for races
    std::vector<std::thread> threads;
    for (int64_t part = 0; part < parts; ++part) threads.emplace_back(body, part);
    for (std::thread& thread : threads) thread.join();
#else
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(parts))
    for (int64_t part = 0; part < parts; ++part) body(part);
#endif
}

// body(part, begin, end). The parts, and so their sums, depend on tokens and parts alone, and not
// on the thread that runs a part.
template <class Body>
void for_each_part(int64_t tokens, int64_t parts, const Body& body) {
    const int64_t blocks = block_count(tokens);
    const auto start = [&](int64_t part) { return std::min(tokens, blocks * part / parts * block_tokens); };
    for_each_part(parts, [&](int64_t part) { body(part, start(part), start(part + 1)); });
}

}  // namespace compacter::cpu
