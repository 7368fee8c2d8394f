// Choice of the instruction set behind dot.h.
#include "dot.h"

#include "dot_table.h"

namespace tinycomp {
namespace {

struct Choice {
  const DotTable* table;
  const char* name;
};

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return {&avx512_dot, "avx512"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {&avx2_dot, "avx2"};
#endif
  return {&portable_dot, "portable"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

void dot(Type type, const void* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx, int64_t m,
         float* out, int64_t ldo) {
  choice().table->dot[static_cast<int>(type)](static_cast<const char*>(w), stride, rows, cols, x, ldx, m, out, ldo);
}

void widen(Type type, const void* from, float* to, int64_t n) {
  choice().table->widen[static_cast<int>(type)](from, to, n);
}

const char* instruction_set() { return choice().name; }

}  // namespace tinycomp
