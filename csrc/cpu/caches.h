#pragma once

#include <cstdint>

namespace compacter::cpu {

// The bytes of the last-level cache that a call can use: the size that the system reports, or a
// typical one, but at most 32 MiB.
int64_t last_level_cache();

}  // namespace compacter::cpu
