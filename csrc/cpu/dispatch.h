// Which instruction set runs: found once, from what the CPU and the operating system offer; EDGECOLBERT_ISA overrides.
#pragma once

#include <string>
#include <vector>

#include "../abi.h"

namespace edgecolbert {

std::vector<std::string> built_isas();      // compiled in, best first
std::vector<std::string> available_isas();  // of these, what this CPU runs

// The kernels in use. Throws std::runtime_error when EDGECOLBERT_ISA names what cannot run.
const Kernels& kernels();

// Forces an instruction set; "" reads the environment again. Throws std::invalid_argument when it cannot run.
void set_isa(const std::string& name);

}  // namespace edgecolbert
