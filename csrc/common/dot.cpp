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
  Loops loops;
  const DotTable* table;
  const RoundedTable* rounded;
  const ExpandTable* expansion;
  const PairsTable* pairs;
  const PartsTable* parts;
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
      {"amx", Loops::avx512, &avx512_dot, &amx_rounded(), &amx_expand, &amx_pairs, amx_parts,
       has_bf16 && may_use_tiles()},
      {"avx512bf16", Loops::avx512, &avx512_dot, &avx512vnni_rounded, &avx512bf16_expand, &avx512_pairs, nullptr,
       has_bf16},
      {"avx512vbmi2", Loops::avx512, &avx512_dot, &avx512vnni_rounded, &avx512vbmi2_expand, nullptr, nullptr,
       has_vbmi2},
      {"avx512vnni", Loops::avx512, &avx512_dot, &avx512vnni_rounded, &avx512_expand, nullptr, nullptr, has_vnni},
      {"avx512", Loops::avx512, &avx512_dot, &avx512_rounded, &avx512_expand, nullptr, nullptr, has_avx512},
      {"avx2", Loops::avx2, &avx2_dot, &avx2_rounded, &avx2_expand, nullptr, nullptr, has_avx2},
      {"portable", Loops::portable, &portable_dot, &portable_rounded, &portable_expand, nullptr, nullptr, true}};
#else
  const Choice choices[] = {
      {"portable", Loops::portable, &portable_dot, &portable_rounded, &portable_expand, nullptr, nullptr, true}};
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

// Of rows that meet inputs as sums of bfloat16 numbers.
const PartsTable& parts(Type type) { return choice().parts[type == Type::f32 ? 0 : 1]; }

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

Order side_by_side(Type type, int64_t m, int64_t cols, bool cached) {
  constexpr int64_t kMost = 192, kShortRow = 128;
  const bool pairs = type == Type::bf16;
  // Few inputs of float32 take less time than it does to make parts of the rows.
  if (!pairs && has_tiles() && m >= (type == Type::f16 ? 12 : 64)) return Order::parts;
  if (pairs && has_tiles()) return m <= 1 || (!cached && meet_in_order(m, 2 * cols)) ? Order::rows : Order::beside;
  if (choice().table->groups == nullptr || type == Type::f16 || m > kMost) return Order::rows;
  bool faster = m == 3 || m == 4;
  if (!on_amd)
    faster = !pairs && m >= 8;  // on Intel's, panels are as fast for few and pairs are slower
  else if (!faster)
    // Measured on Zen 4. Pieces that are partly zeros cost what whole ones do; pairs of 9 to 29 inputs multiply as fast
    // in rows, short ones apart.
    faster = pairs ? m >= 7 && (m <= 8 || m >= 30 || cols <= kShortRow) : m >= 8;
  return faster ? Order::beside : Order::rows;
}

int64_t words_beside(Order order, Type type, int64_t cols) {
  if (order == Order::parts) return part_words(parts(type).parts, cols);
  return padded_words(type == Type::bf16 ? cols / 2 : cols);
}

void dot_beside(Order order, Type type, const void* w, int64_t stride, int64_t rows, int64_t cols, const float* x,
                int64_t m, float* out, int64_t ldo, float* squares) {
  const auto* from = static_cast<const char*>(w);
  if (order == Order::parts) return parts(type).dot(from, stride, rows, cols, x, m, out, ldo, squares);
  if (type == Type::bf16) return choice().pairs->groups(from, stride, rows, cols / 2, x, m, out, ldo);
  choice().table->groups(from, stride, rows, cols, x, m, out, ldo);
}

void interleave(Order order, Type type, Type source, const char* from, int64_t distance, int64_t m, int64_t cols,
                int64_t first, int64_t last, float* to) {
  if (order == Order::parts) return parts(type).interleave(source, from, distance, m, cols, first, last, to);
  if (type == Type::bf16) return choice().pairs->interleave(from, distance, m, cols / 2, first / 2, last / 2, to);
  choice().table->interleave(from, distance, m, cols, first, last, to);
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

Loops loops() { return choice().loops; }

const char* instruction_set() { return choice().name; }

}  // namespace tinycomp
