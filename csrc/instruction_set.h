// The choice among the kernels compiled per instruction set; see also kernels() in attention_cpu.h.
#pragma once

#include <string>
#include <vector>

#include "attention_cpu.h"

namespace fastattn {

// What this processor can run, the widest first.
std::vector<std::string> instruction_sets();

// Make later calls use one of them; false for a name that instruction_sets() does not list.
bool use_instruction_set(const std::string& name);

}  // namespace fastattn
