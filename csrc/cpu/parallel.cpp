#include "parallel.h"

#ifndef _WIN32
#include <pthread.h>
#endif

namespace compacter::cpu {
namespace {

bool forked = false;  // a forked child has no OpenMP threads and would wait for them forever

#ifndef _WIN32
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int64_t part_count(int64_t tokens, int64_t work_per_token, int threads) {
    if (forked) return 1;
    const int64_t most = std::min<int64_t>(threads, block_count(tokens));
    return std::max<int64_t>(1, std::min(most, tokens * work_per_token / work_per_part));
}

}  // namespace compacter::cpu
