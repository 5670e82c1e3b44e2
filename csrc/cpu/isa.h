// The choice of the instruction set: the best of the processor, unless the user names another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace compacter::cpu {

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();  // those compiled that this processor has, the best last

// The first call reads $COMPACTER_KERNELS_ISA. Throws std::invalid_argument for a wrong name.
const Kernels& kernels();
void set_isa(const std::string& name);

}  // namespace compacter::cpu
