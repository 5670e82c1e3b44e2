#pragma once

#include <cstdint>

namespace compacter::cpu {

// Bytes of the last-level cache that a call may count on: what the system tells, or a typical size where it does not,
// and at most 32 MiB.
int64_t last_level_cache();

}  // namespace compacter::cpu
