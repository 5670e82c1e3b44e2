#include "caches.h"

#ifdef __linux__
#include <unistd.h>
#endif

namespace compacter::cpu {
namespace {

int64_t ask() {
#ifdef _SC_LEVEL3_CACHE_SIZE
    if (const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE); bytes > 0) return bytes;
#endif
    return int64_t{16} << 20;
}

}  // namespace

int64_t last_level_cache() {
    static const int64_t bytes = ask();
    return bytes;
}

}  // namespace compacter::cpu
