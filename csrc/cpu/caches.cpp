#include "caches.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace compacter::cpu {
namespace {

// A larger cache serves many cores and holds mostly their data. With two cores and 260 MiB,
// a limit of 32 MiB was as fast as a copy from memory, and a larger limit was slower.
constexpr int64_t largest_share = int64_t{32} << 20;

// The size that Linux reports. On some machines sysconf adds the caches of all cores instead.
int64_t ask() {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t size = 0;
    std::string unit;
    if (!(file >> size >> unit) || size <= 0) return int64_t{16} << 20;
    return unit == "M" ? size << 20 : size << 10;
}

}  // namespace

int64_t last_level_cache() {
    static const int64_t bytes = std::min(ask(), largest_share);
    return bytes;
}

}  // namespace compacter::cpu
