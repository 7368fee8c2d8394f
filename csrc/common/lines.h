// Lines of numbers that a loop reads side by side. The includer defines TINYCOMP_TARGET first.
#pragma once

#include <cstdint>

namespace tinycomp {
namespace {

// N lines, `ld` apart, read at one place that moves on. A pointer for every fourth, the others are an addressing mode
// away: compilers would rather keep one for each, more than there are registers.
template <class T, int N>
struct Lines {
  static constexpr int kPointers = (N + 3) / 4;
  const T* every_fourth[kPointers];
  int64_t ld, three;

  TINYCOMP_TARGET Lines(const T* x, int64_t ld) : ld(ld), three(3 * ld) {
#pragma GCC unroll 4
    for (int k = 0; k < kPointers; ++k) every_fourth[k] = x + 4 * k * ld;
  }
  TINYCOMP_TARGET const T* line(int j) const { return every_fourth[j / 4] + (j % 4 == 3 ? three : j % 4 * ld); }
  TINYCOMP_TARGET void move(int64_t n) {
#pragma GCC unroll 4
    for (int k = 0; k < kPointers; ++k) {
      every_fourth[k] += n;
      asm("" : "+r"(every_fourth[k]));
    }
  }
};

}  // namespace
}  // namespace tinycomp
