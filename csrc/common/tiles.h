// What products in tiles of AMX share. The includer defines TINYCOMP_TARGET first.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "amx.h"
#include "transpose_avx512.h"

namespace tinycomp {
namespace {

constexpr int64_t kWord = sizeof(float);

// Words [first, last) of up to 16 inputs, `words` long and zeros after that, in the order of a tile: all inputs' first
// words, then their second ones, `width` apart.
TINYCOMP_TARGET inline void interleave_block(const char* from, int64_t distance, int64_t inputs, int64_t words,
                                             int64_t first, int64_t last, float* to) {
  const int64_t width = tile_width(inputs), end = last == words ? padded_words(words) : last;
  const auto these = static_cast<__mmask16>((1u << width) - 1);
  for (int64_t w = first; w < end; w += kTile) {
    const auto there = static_cast<__mmask16>((1u << std::clamp<int64_t>(last - w, 0, kTile)) - 1);
    __m512i some[kTile];
    for (int64_t j = 0; j < kTile; ++j)
      some[j] = j < inputs ? _mm512_maskz_loadu_epi32(there, from + j * distance + w * kWord) : _mm512_setzero_si512();
    if (width == 1) {
      _mm512_mask_storeu_epi32(to + w, static_cast<__mmask16>((1u << std::min(kTile, end - w)) - 1), some[0]);
      continue;
    }
    transpose16(some);
    for (int64_t k = 0; k < kTile && w + k < end; ++k) _mm512_mask_storeu_epi32(to + (w + k) * width, these, some[k]);
  }
}

// Up to 32 rows against up to 32 inputs, as tiles hold them.
struct Part {
  int64_t rows, inputs;
  static int64_t first(int64_t n) { return std::min(n, kTile); }
  static int64_t second(int64_t n) { return std::max<int64_t>(n - kTile, 0); }
};

// Tiles 0 to 3 are sums, rows by inputs; 4 and 5 weights; 6 and 7 inputs.
TINYCOMP_TARGET inline void set_shapes(const Part& part) {
  const int64_t rows[] = {Part::first(part.rows), Part::second(part.rows)};
  const int64_t inputs[] = {Part::first(part.inputs), Part::second(part.inputs)};
  TileShapes shapes;
  for (int r = 0; r < 2; ++r)
    for (int p = 0; p < 2; ++p) shapes.set(2 * r + p, rows[r], inputs[p]);
  for (int k = 0; k < 2; ++k) shapes.set(4 + k, rows[k], kTile), shapes.set(6 + k, inputs[k] ? kTile : 0, inputs[k]);
  shapes.use();
}

// A tile of sums, turned, to results of each input, or added to those.
TINYCOMP_TARGET inline void store_turned(const float* sums, int64_t rows, int64_t inputs, float* out, int64_t ldo,
                                         bool add) {
  __m512i some[kTile];
  for (int64_t r = 0; r < kTile; ++r) some[r] = r < rows ? _mm512_load_si512(sums + r * kTile) : _mm512_setzero_si512();
  transpose16(some);
  const auto these = static_cast<__mmask16>((1u << rows) - 1);
  for (int64_t j = 0; j < inputs; ++j, out += ldo) {
    const __m512 before = add ? _mm512_maskz_loadu_ps(these, out) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(out, these, _mm512_add_ps(before, _mm512_castsi512_ps(some[j])));
  }
}

template <int R, int P>
TINYCOMP_TARGET inline void begin_sums() {
  _tile_zero(0);
  if constexpr (P == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && P == 2) _tile_zero(3);
}

// Rows that memory is asked for meanwhile, a cache line of each with every step; or as many lines, in the order of
// memory, which may be read if they are `there`.
struct Ahead {
  const char* w;
  int64_t rows;
  bool in_order = false, there = false;
};

// The sums of a part, to its results or added to those.
template <int R, int P>
TINYCOMP_TARGET inline void store_sums(const Part& part, float* out, int64_t ldo, bool add) {
  alignas(64) float sums[kTile * kTile];
  const auto put = [&](int64_t r, int64_t p) {
    store_turned(sums, std::min(kTile, part.rows - r * kTile), std::min(kTile, part.inputs - p * kTile),
                 out + p * kTile * ldo + r * kTile, ldo, add);
  };
  _tile_stored(0, sums, kTile * kWord);
  put(0, 0);
  if constexpr (P == 2) {
    _tile_stored(1, sums, kTile * kWord);
    put(0, 1);
  }
  if constexpr (R == 2) {
    _tile_stored(2, sums, kTile * kWord);
    put(1, 0);
  }
  if constexpr (R == 2 && P == 2) {
    _tile_stored(3, sums, kTile * kWord);
    put(1, 1);
  }
}

}  // namespace
}  // namespace tinycomp
