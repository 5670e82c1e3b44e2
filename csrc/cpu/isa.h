// Which instruction set serves: the best that the processor has, unless told otherwise.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace compacter::cpu {

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();  // compiled, and this processor has them; the best last

// The first call takes $COMPACTER_KERNELS_ISA into account. Throws std::invalid_argument for a name not supported.
const Kernels& kernels();
void set_isa(const std::string& name);

}  // namespace compacter::cpu
