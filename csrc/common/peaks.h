#pragma once

#include <cstdint>
#include <string>

namespace tinycomp {

// Runs n rounds of "fma512", "fma256", "bf16_512" or "vnni512" and returns their operations (a multiply-add counts 2);
// 0 where this processor lacks the instruction.
double run_peak(const std::string& instruction, int64_t n);

}  // namespace tinycomp
