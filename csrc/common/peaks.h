#pragma once

#include <cstdint>
#include <string>

namespace tinycomp {

// Runs n rounds of "fma512", "fma256", "bf16_512" or "vnni512" and returns their operations (a multiply-add counts 2);
// 0 where this processor lacks the instruction.
double run_peak(const std::string& instruction, int64_t n);

// The sum of n words, read as memory gives them fastest: in order of address, or with as many `rows` of 16 KB side by
// side, what comes next asked for either way. Which is faster depends on the machine. Many words are shared out among
// torch's threads.
uint32_t read_words(const uint32_t* from, int64_t n, int64_t rows);

}  // namespace tinycomp
