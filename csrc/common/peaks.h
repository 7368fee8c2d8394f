#pragma once

#include <cstdint>
#include <string>

namespace tinycomp {

// Runs n rounds of "fma512", "fma256", "bf16_512" or "vnni512" and returns their operations (a multiply-add counts 2);
// 0 where this processor lacks the instruction.
double run_peak(const std::string& instruction, int64_t n);

// The sum of n floats (of whole blocks of 8 rows of 4096), read as memory gives them fastest: several streams side by
// side, the next lines asked for where that helps.
double read_memory(const float* from, int64_t n);

}  // namespace tinycomp
