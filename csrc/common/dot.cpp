// Choice of the instruction set behind dot.h.
#include "dot.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "amx.h"
#include "dot_table.h"
#include "expand.h"
#include "prefetch.h"
#include "rounded.h"

namespace tinycomp {
namespace {

struct Choice {
  const char* name;
  const DotTable* table;
  const RoundedTable* rounded;
  const ExpandTable* expansion;
  const PairsTable* pairs;
  bool runs;
};

// The fastest that runs here, or the one that TINYCOMP_CPU_INSTRUCTIONS names.
Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has_vbmi2 = has_vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  const bool has_bf16 = has_vbmi2 && __builtin_cpu_supports("avx512bf16");
  const Choice choices[] = {
      {"amx", &avx512_dot, &amx_rounded(), &avx512bf16_expand, &amx_pairs, has_bf16 && may_use_tiles()},
      {"avx512bf16", &avx512_dot, &avx512vnni_rounded, &avx512bf16_expand, &avx512_pairs, has_bf16},
      {"avx512vbmi2", &avx512_dot, &avx512vnni_rounded, &avx512vbmi2_expand, nullptr, has_vbmi2},
      {"avx512vnni", &avx512_dot, &avx512vnni_rounded, &avx512_expand, nullptr, has_vnni},
      {"avx512", &avx512_dot, &avx512_rounded, &avx512_expand, nullptr, has_avx512},
      {"avx2", &avx2_dot, &avx2_rounded, &avx2_expand, nullptr, has_avx2},
      {"portable", &portable_dot, &portable_rounded, &portable_expand, nullptr, true}};
#else
  const Choice choices[] = {{"portable", &portable_dot, &portable_rounded, &portable_expand, nullptr, true}};
#endif
  const char* variable = std::getenv("TINYCOMP_CPU_INSTRUCTIONS");
  const std::string forced = variable ? variable : "";
  std::string allowed;
  for (const Choice& choice : choices) {
    if (!choice.runs) continue;
    // Intel's products of bfloat16 run at half the rate of its float32 multiply-adds, AMD's at twice that.
    const bool fast = choice.pairs == nullptr || choice.pairs->blocks || on_amd;
    if (forced.empty() ? fast : forced == choice.name) return choice;
    allowed += (allowed.empty() ? "" : ", ") + std::string(choice.name);
  }
  throw std::runtime_error("TINYCOMP_CPU_INSTRUCTIONS: got '" + forced + "', allowed " + allowed +
                           "; choose one of these");
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

void sum_rows(Type type, const void* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
              int64_t m, float* out, int64_t ldo) {
  choice().table->sum_rows[static_cast<int>(type)](static_cast<const char*>(w), stride, rows, cols, x, ldx, m, out,
                                                   ldo);
}

void dot_pairs(const void* w, int64_t stride, int64_t rows, int64_t words, const float* x, int64_t ldx, int64_t m,
               float* out, int64_t ldo) {
  choice().pairs->dot(static_cast<const char*>(w), stride, rows, words, x, ldx, m, out, ldo);
}

bool has_pairs() { return choice().pairs != nullptr; }

void dot_interleaved(bool pairs, const void* w, int64_t stride, int64_t rows, int64_t words, const float* x, int64_t m,
                     float* out, int64_t ldo) {
  const auto groups = pairs ? choice().pairs->groups : choice().table->groups;
  groups(static_cast<const char*>(w), stride, rows, words, x, m, out, ldo);
}

void interleave(bool pairs, const char* from, int64_t distance, int64_t m, int64_t words, int64_t first, int64_t last,
                float* to) {
  (pairs ? choice().pairs->interleave : choice().table->interleave)(from, distance, m, words, first, last, to);
}

bool interleaves(bool pairs, int64_t m, int64_t words) {
  constexpr int64_t kMost = 192, kShortRow = 64, kLongRow = 1024;
  // One input meets rows that stay in cache as fast without tiles, and short ones faster.
  if (pairs && has_tiles()) return m > 1 || words >= kLongRow;
  if (choice().table->groups == nullptr || m > kMost) return false;
  // On Granite Rapids panels are as fast for few and pairs are slower.
  if (!on_amd) return !pairs && m >= 8;
  // Measured on Zen 4. Pieces that are partly zeros cost what whole ones do; pairs of 9 to 29 inputs multiply as fast
  // in rows, short ones apart.
  if (m == 3 || m == 4) return true;
  return pairs ? m >= 7 && (m <= 8 || m >= 30 || words <= kShortRow) : m >= 8;
}

bool has_tiles() { return has_pairs() && choice().pairs->blocks != nullptr; }

void dot_blocks(Type type, const void* w, const int32_t* columns, int64_t count, const float* x, int64_t ldx, int64_t m,
                float* out, int64_t ldo) {
  choice().table->blocks[static_cast<int>(type)](w, columns, count, x, ldx, m, out, ldo);
}

void dot_tile_blocks(const void* w, const int32_t* columns, int64_t count, const float* x, int64_t words, int64_t m,
                     float* out, int64_t ldo) {
  choice().pairs->blocks(static_cast<const char*>(w), columns, count, x, words, m, out, ldo);
}

void widen(Type type, const void* from, float* to, int64_t n) {
  choice().table->widen[static_cast<int>(type)](from, to, n);
}

void narrow(Type type, const float* from, void* to, int64_t n) {
  choice().table->narrow[static_cast<int>(type)](from, to, n);
}

#if defined(__x86_64__)
const bool on_amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#else
const bool on_amd = false;
#endif

const RoundedTable& rounded() { return *choice().rounded; }

const ExpandTable& expansion() { return *choice().expansion; }

const char* instruction_set() { return choice().name; }

}  // namespace tinycomp
