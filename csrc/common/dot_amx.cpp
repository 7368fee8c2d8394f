// dot.h for AMX: tiles of 16 rows of weights, read as they lie, against 16 inputs side by side, in pairs of bfloat16.
#include "amx.h"

#if TINYCOMP_HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16,avx2,fma")))

#include "dot.h"
#include "dot_table.h"
#include "tiles.h"

namespace tinycomp {
namespace {

TINYCOMP_TARGET void interleave_tiles(const char* from, int64_t distance, int64_t m, int64_t words, int64_t first,
                                      int64_t last, float* to) {
  for (int64_t j = 0; j < m; j += kTile, to += kTile * padded_words(words))
    interleave_block(from + j * distance, distance, std::min(kTile, m - j), words, first, last, to);
}

// Weights and inputs that a step of 16 words begins with; `rows` between the two blocks of weights.
struct Step {
  const char* w;
  int64_t stride, rows;
  const float *x, *second;
  int64_t width, second_width;
};

template <int R, int P>
TINYCOMP_TARGET inline void multiply(const Step& s) {
  _tile_loadd(6, s.x, s.width * kWord);
  _tile_loadd(4, s.w, s.stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (R == 2) {
    _tile_loadd(5, s.w + s.rows, s.stride);
    _tile_dpbf16ps(2, 5, 6);
  }
  if constexpr (P == 2) {
    _tile_loadd(7, s.second, s.second_width * kWord);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// Reads 32 lines, and asks memory for what comes 16 KB later: reading keeps the processor from running ahead of that.
// Lines that may not be there are only asked for.
TINYCOMP_TARGET inline void read_lines(const char* from, bool there) {
  constexpr int64_t kLine = 64, kAhead = 16384;
  for (int64_t k = 0; k < 2 * kTile; ++k, from += kLine) {
    char byte;
    if (there) asm volatile("movb %1, %0" : "=r"(byte) : "m"(*from));
    __builtin_prefetch(there ? from + kAhead : from, 0, 2);
  }
}

// A part's results.
template <int R, int P>
TINYCOMP_TARGET void run_part(const Part& part, const char* w, int64_t stride, int64_t words, const float* x,
                              const Ahead& ahead, float* out, int64_t ldo) {
  begin_sums<R, P>();
  const int64_t width = tile_width(Part::first(part.inputs)), other = tile_width(Part::second(part.inputs));
  Step step{w, stride, kTile * stride, x, x + kTile * padded_words(words), width, other};
  int64_t c = 0;
  for (; c + kTile <= words; c += kTile) {
    if (ahead.in_order)
      read_lines(ahead.w + 2 * kTile * c * kWord, ahead.there);
    else
      for (int64_t r = 0; r < ahead.rows; ++r) __builtin_prefetch(ahead.w + c * kWord + r * stride);
    multiply<R, P>(step);
    step.w += kTile * kWord, step.x += kTile * width, step.second += kTile * other;
  }
  if (c < words) {
    alignas(64) char last[2 * kTile * kTile * kWord];
    const auto there = static_cast<__mmask16>((1u << (words - c)) - 1);
    for (int64_t r = 0; r < part.rows; ++r)
      _mm512_store_si512(last + r * kTile * kWord, _mm512_maskz_loadu_epi32(there, step.w + r * stride));
    tiles_read(last);
    step.w = last, step.stride = kTile * kWord, step.rows = kTile * kTile * kWord;
    multiply<R, P>(step);
  }
  store_sums<R, P>(part, out, ldo, false);
}

TINYCOMP_TARGET void dot_tiles(const char* w, int64_t stride, int64_t rows, int64_t words, const float* x, int64_t m,
                               float* out, int64_t ldo) {
  constexpr int64_t kTwo = 2 * kTile, kShortRow = 1024;
  const int64_t passes = (m + kTwo - 1) / kTwo;
  // The processor asks memory for long rows by itself, unless many inputs make it forget them, and for short ones
  // rather then (measured on Granite Rapids). Short ones that follow one another are read in the order of memory first,
  // the next 32 while these are multiplied.
  const bool asks = (words > kShortRow) == (passes > 1), in_order = asks && passes == 1 && stride == words * kWord;
  Part part{0, 0};
  for (int64_t i = 0; i < rows; i += kTwo, w += kTwo * stride)
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t j = pass * kTwo;
      const Part next{std::min(kTwo, rows - i), std::min(kTwo, m - j)};
      if (next.rows != part.rows || next.inputs != part.inputs) part = next, set_shapes(part);
      const auto run = part.rows > kTile ? (part.inputs > kTile ? run_part<2, 2> : run_part<2, 1>)
                                         : (part.inputs > kTile ? run_part<1, 2> : run_part<1, 1>);
      // A share of the next rows in every pass; a call is for few rows, those after them are asked for as well.
      const int64_t first = pass * kTwo / passes, end = (pass + 1) * kTwo / passes;
      const Ahead ahead{w + (kTwo + first) * stride, asks ? end - first : 0, in_order, i + 2 * kTwo <= rows};
      run(part, w, stride, words, x + j * padded_words(words), ahead, out + j * ldo + i, ldo);
    }
  _tile_release();
}

// Blocks of 32 x 32 against one or two tiles of inputs.
template <int P>
TINYCOMP_TARGET void run_blocks(const Part& part, const char* w, const int32_t* columns, int64_t count, const float* x,
                                int64_t words, float* out, int64_t ldo) {
  static_assert(kBlock == 2 * kTile);
  constexpr int64_t kRow = kTile * kWord;
  const int64_t width = tile_width(Part::first(part.inputs)), other = tile_width(Part::second(part.inputs));
  begin_sums<2, P>();
  for (int64_t k = 0; k < count; ++k, w += kBlock * kRow) {
    const int64_t at = columns[k] * kTile;
    multiply<2, P>({w, kRow, kTile * kRow, x + at * width, x + kTile * padded_words(words) + at * other, width, other});
  }
  store_sums<2, P>(part, out, ldo, false);
}

TINYCOMP_TARGET void dot_tile_blocks(const char* w, const int32_t* columns, int64_t count, const float* x,
                                     int64_t words, int64_t m, float* out, int64_t ldo) {
  Part part{0, 0};
  for (int64_t j = 0; j < m; j += kBlock) {
    const Part next{kBlock, std::min(kBlock, m - j)};
    if (next.inputs != part.inputs) part = next, set_shapes(part);
    const auto run = part.inputs > kTile ? run_blocks<2> : run_blocks<1>;
    run(part, w, columns, count, x + j * padded_words(words), words, out + j * ldo, ldo);
  }
  _tile_release();
}

}  // namespace

bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTiles | kInt8;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const PairsTable amx_pairs = {avx512_pairs.dot, dot_tiles, interleave_tiles, dot_tile_blocks};

}  // namespace tinycomp
#elif defined(__x86_64__)
#include "dot_table.h"

namespace tinycomp {

bool may_use_tiles() { return false; }
const PairsTable amx_pairs = {};

}  // namespace tinycomp
#endif
