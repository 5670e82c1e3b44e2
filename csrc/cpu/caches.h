#pragma once

#include <cstdint>

namespace compacter::cpu {

// Bytes of the last-level cache, as the system tells them; a typical size where it does not.
int64_t last_level_cache();

}  // namespace compacter::cpu
