// dot.h for AMX, rows in float32 and float16: numbers as sums of bfloat16 numbers, three and two of them, whose
// products are exact in float32. The product of two such sums is four products of tiles for float16; for float32 six,
// without those that are below its rounding.
#include "amx.h"

#if TINYCOMP_HAS_AMX
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16,avx2,fma,f16c")))

#include "dot.h"
#include "dot_table.h"
#include "tiles.h"

namespace tinycomp {
namespace {

constexpr int64_t kColumns = 2 * kTile, kTileFloats = kTile * kTile;  // of a step, of a tile
constexpr int64_t kSteps = 16;  // whose sums stay in tiles: in longer chains float32 would miss the tolerance rule

// Parts of a number, and which of the weight's meet which of the input's: small products first.
template <Type>
struct Parts {
  static constexpr int count = 3, products = 6, weight[] = {0, 0, 1, 1, 2, 0}, input[] = {2, 1, 1, 0, 0, 0};
};
template <>
struct Parts<Type::f16> {
  static constexpr int count = 2, products = 4, weight[] = {0, 1, 1, 0}, input[] = {1, 1, 0, 0};
};

struct Numbers {
  __m512 low, high;
};

// 32 numbers, or n and zeros after them.
template <Type type>
TINYCOMP_TARGET inline Numbers load(const char* from, int64_t n = kColumns) {
  const auto mask = static_cast<uint32_t>((uint64_t{1} << std::min(n, kColumns)) - 1);
  if constexpr (type == Type::f32)
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kTile), from + kTile * kWord)};
  const __m512i all = _mm512_maskz_loadu_epi16(mask, from);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(all)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1))};
}

TINYCOMP_TARGET inline __m512i upper_halves(const Numbers& v) {
  alignas(64) static constexpr uint16_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(v.low), _mm512_load_si512(kOdd), _mm512_castps_si512(v.high));
}

constexpr int kUpper = -0x10000, kHalf = 0x8000;

// The nearest bfloat16 number, half way away from zero. What is not finite, or is not any more then, becomes anything,
// and its rest something that is not finite.
TINYCOMP_TARGET inline __m512 rounded_part(__m512 v) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(kHalf));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(kUpper)));
}

template <int P>
TINYCOMP_TARGET inline void split(Numbers rest, __m512i* parts) {
#pragma GCC unroll 2
  for (int q = 0; q + 1 < P; ++q) {
    const Numbers part{rounded_part(rest.low), rounded_part(rest.high)};
    parts[q] = upper_halves(part);
    rest = {_mm512_sub_ps(rest.low, part.low), _mm512_sub_ps(rest.high, part.high)};
  }
  parts[P - 1] = upper_halves(rest);
}

// The same of inputs: parts of any number sum up to it again. One that is not finite is its own first part.
TINYCOMP_TARGET inline __m512 first_part(__m512 v, __m512* rest) {
  constexpr int kInfinity = 0x7f800000, kQuiet = 0x400000;
  const __m512i bits = _mm512_castps_si512(v), size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 large = _mm512_cmpge_epu32_mask(size, _mm512_set1_epi32(kInfinity - kHalf));
  const __mmask16 finite = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(kInfinity));
  __m512i part = _mm512_castps_si512(rounded_part(v));
  part = _mm512_mask_and_epi32(part, large, bits, _mm512_set1_epi32(kUpper));
  part = _mm512_mask_or_epi32(part, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), part, _mm512_set1_epi32(kQuiet));
  *rest = _mm512_maskz_sub_ps(finite, v, _mm512_castsi512_ps(part));
  return _mm512_castsi512_ps(part);
}

template <int P>
TINYCOMP_TARGET inline void split_input(const Numbers& v, __m512i* parts) {
  Numbers first, rest;
  first.low = first_part(v.low, &rest.low), first.high = first_part(v.high, &rest.high);
  parts[0] = upper_halves(first);
  split<P - 1>(rest, parts + 1);
}

// Columns [first, last) of up to 16 inputs of type S, of which P parts make P tiles a step.
template <Type S, int P>
TINYCOMP_TARGET void interleave_parts(const char* from, int64_t distance, int64_t inputs, int64_t first, int64_t last,
                                      float* to) {
  constexpr int64_t kSize = S == Type::f32 ? 4 : 2;
  const int64_t width = tile_width(inputs);
  const auto these = static_cast<__mmask16>((1u << width) - 1);
  to += first / kColumns * P * kTile * width;
  for (int64_t c = first; c < last; c += kColumns) {
    __m512i some[P][kTile] = {}, parts[P];
    for (int64_t j = 0; j < inputs; ++j) {
      split_input<P>(load<S>(from + j * distance + c * kSize, last - c), parts);
      for (int q = 0; q < P; ++q) some[q][j] = parts[q];
    }
    for (auto& part : some) {
      transpose16(part);
      for (int64_t k = 0; k < kTile; ++k, to += width) _mm512_mask_storeu_epi32(to, these, part[k]);
    }
  }
}

template <Type type>
TINYCOMP_TARGET void interleave(Type source, const char* from, int64_t distance, int64_t m, int64_t cols, int64_t first,
                                int64_t last, float* to) {
  constexpr int P = Parts<type>::count;
  const auto some = source == Type::f32 ? interleave_parts<Type::f32, P> : interleave_parts<Type::f16, P>;
  for (int64_t j = 0; j < m; j += kTile, to += kTile * part_words(P, cols))
    some(from + j * distance, distance, std::min(kTile, m - j), first, last, to);
}

// Column c of input j.
TINYCOMP_TARGET float restored(const float* x, int64_t stride, int64_t m, int P, int64_t j, int64_t c) {
  const int64_t group = j / kTile * kTile, width = tile_width(std::min(kTile, m - group));
  const float* at = x + group * stride + (c / kColumns * P * kTile + c % kColumns / 2) * width + j % kTile;
  float sum = 0;
  for (int q = 0; q < P; ++q, at += kTile * width) {
    uint32_t word;
    __builtin_memcpy(&word, at, kWord);
    word = c % 2 ? word & 0xffff0000 : word << 16;
    float part;
    __builtin_memcpy(&part, &word, kWord);
    sum += part;
  }
  return sum;
}

// A multiple of 16 before which all of n numbers are finite; n or more: all are.
TINYCOMP_TARGET int64_t first_not_finite(const float* from, int64_t n) {
  constexpr int kNanOrInfinity = 0x99;
  int64_t i = 0;
  for (; i < n; i += kTile) {
    const auto there = static_cast<__mmask16>((1u << std::min(kTile, n - i)) - 1);
    if (_mm512_fpclass_ps_mask(_mm512_maskz_loadu_ps(there, from + i), kNanOrInfinity) != 0) break;
  }
  return i;
}

// Results that are not finite, once more without tiles: in parts infinity times anything is no number.
template <Type type>
TINYCOMP_TARGET void mend(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t m,
                          float* out, int64_t ldo) {
  constexpr int64_t kSome = 64;
  constexpr int P = Parts<type>::count;
  for (int64_t j = 0; j < m; ++j) {
    const int64_t first = first_not_finite(out + j * ldo, rows);
    if (first >= rows) continue;
    const Scratch line(kTileSlot, cols);
    for (int64_t c = 0; c < cols; ++c) line.data()[c] = restored(x, part_words(P, cols), m, P, j, c);
    float found[kSome];
    for (int64_t i = first; i < rows; i += kSome) {
      const int64_t n = std::min(kSome, rows - i);
      avx512_dot.dot[static_cast<int>(type)](w + i * stride, stride, n, cols, line.data(), 0, 1, found, kSome);
      for (int64_t r = 0; r < n; ++r)
        if (float& result = out[j * ldo + i + r]; !std::isfinite(result)) result = found[r];
    }
  }
}

// Up to 32 rows, of which `left` columns remain, and where their parts are or, in the first pass, come to be: `apart`
// floats between the tiles of the first 16 and of the others. The first pass adds to `squares`, 16 for each row, if
// there are any.
struct Panel {
  const char* w;
  int64_t stride, left, steps;
  float* made;
  int64_t apart;
  float* squares;
};

template <Type type>
constexpr int64_t kStepBytes = kColumns * (type == Type::f32 ? 4 : 2);  // of a row

// Memory is asked for a step of row r of those that come next.
template <Type type>
inline void ask(const Ahead& ahead, int64_t stride, int64_t r, int64_t s) {
  const char* from = ahead.w + r * stride + s * kStepBytes<type>;
  for (int64_t c = 0; c < kStepBytes<type>; c += 64) __builtin_prefetch(from + c, 0, 2);
}

// Step s of a panel in parts.
template <Type type>
TINYCOMP_TARGET inline void make_step(const Panel& p, int64_t rows, int64_t s, const Ahead& ahead) {
  constexpr int P = Parts<type>::count;
  const int64_t left = p.left - s * kColumns;
  const char* w = p.w + s * kStepBytes<type>;
  for (int64_t r = 0; r < rows; ++r, w += p.stride) {
    if (r < ahead.rows) ask<type>(ahead, p.stride, r, s);
    __m512i parts[P];
    const Numbers numbers = left >= kColumns ? load<type>(w) : load<type>(w, left);
    split<P>(numbers, parts);
    if (p.squares != nullptr) {
      float* const sum = p.squares + r * kTile;
      const __m512 low = _mm512_fmadd_ps(numbers.low, numbers.low, _mm512_loadu_ps(sum));
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(numbers.high, numbers.high, low));
    }
    float* to = p.made + r / kTile * p.apart + (s * P * kTile + r % kTile) * kTile;
    for (int q = 0; q < P; ++q) _mm512_store_si512(to + q * kTileFloats, parts[q]);
  }
  tiles_read(p.made);
}

// Inputs of a part, and its second 16.
struct Beside {
  const float *x, *second;
  int64_t width, second_width;
};

template <Type type, int R, int Q, bool First>
TINYCOMP_TARGET void run_panel(const Part& part, const Panel& p, Beside b, const Ahead& ahead, float* out, int64_t ldo,
                               bool add) {
  using Its = Parts<type>;
  constexpr int64_t kStepFloats = Its::count * kTileFloats;
  begin_sums<R, Q>();
  if (First && p.steps > 0) make_step<type>(p, part.rows, 0, ahead);
  const float* w = p.made;
  for (int64_t s = 0; s < p.steps; ++s, w += kStepFloats) {
    if (First && s + 1 < p.steps) make_step<type>(p, part.rows, s + 1, ahead);
    // A write that waits for memory holds up what follows it.
    for (int64_t j = 2 * s; j < std::min(2 * s + 2, part.inputs); ++j)
      for (int64_t r = 0; r < part.rows; r += kTile) __builtin_prefetch(out + j * ldo + r, 1);
    for (int64_t r = 0; !First && r < ahead.rows; ++r) ask<type>(ahead, p.stride, r, s);
#pragma GCC unroll 6
    for (int i = 0; i < Its::products; ++i) {
      if (i == 0 || Its::weight[i] != Its::weight[i - 1]) {
        _tile_loadd(4, w + Its::weight[i] * kTileFloats, kTile * kWord);
        if constexpr (R == 2) _tile_loadd(5, w + p.apart + Its::weight[i] * kTileFloats, kTile * kWord);
      }
      if (i == 0 || Its::input[i] != Its::input[i - 1]) {
        _tile_loadd(6, b.x + Its::input[i] * kTile * b.width, b.width * kWord);
        if constexpr (Q == 2) _tile_loadd(7, b.second + Its::input[i] * kTile * b.second_width, b.second_width * kWord);
      }
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Q == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (R == 2 && Q == 2) _tile_dpbf16ps(3, 5, 7);
    }
    b.x += Its::count * kTile * b.width, b.second += Its::count * kTile * b.second_width;
  }
  store_sums<R, Q>(part, out, ldo, add);
}

template <Type type, bool First>
TINYCOMP_TARGET void run_panel(const Part& part, const Panel& p, const Beside& b, const Ahead& ahead, float* out,
                               int64_t ldo, bool add) {
  const auto run = part.rows > kTile
                       ? (part.inputs > kTile ? run_panel<type, 2, 2, First> : run_panel<type, 2, 1, First>)
                       : (part.inputs > kTile ? run_panel<type, 1, 2, First> : run_panel<type, 1, 1, First>);
  run(part, p, b, ahead, out, ldo, add);
}

template <Type type>
TINYCOMP_TARGET void dot_parts(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t m,
                               float* out, int64_t ldo, float* squares) {
  constexpr int P = Parts<type>::count;
  constexpr int64_t kTwo = 2 * kTile, kSize = type == Type::f32 ? 4 : 2, kBlockColumns = kSteps * kColumns;
  const int64_t words = part_words(P, cols), passes = (m + kTwo - 1) / kTwo;
  std::vector<float> sums(squares != nullptr ? rows * kTile : 0);
  {
    const Scratch panel(kTileSlot, kTwo * kSteps * P * kTile);
    Part part{0, 0};
    for (int64_t c = 0; c == 0 || c < cols; c += kBlockColumns)
      for (int64_t i = 0; i < rows; i += kTwo) {
        const int64_t steps = std::min(kSteps, (cols - c + kColumns - 1) / kColumns), n = std::min(kTwo, rows - i);
        const char* at = w + i * stride + c * kSize;
        float* const some = squares != nullptr ? sums.data() + i * kTile : nullptr;
        const Panel these{at, stride, cols - c, steps, panel.data(), steps * P * kTileFloats, some};
        const char* next = i + kTwo < rows            ? at + kTwo * stride
                           : c + kBlockColumns < cols ? w + (c + kBlockColumns) * kSize
                                                      : w + rows * stride;
        for (int64_t pass = 0; pass < passes; ++pass) {
          const int64_t j = pass * kTwo, done = c / kColumns * P * kTile;  // words of an input
          const Part then{n, std::min(kTwo, m - j)};
          if (then.rows != part.rows || then.inputs != part.inputs) part = then, set_shapes(part);
          const int64_t width = tile_width(Part::first(part.inputs)), other = tile_width(Part::second(part.inputs));
          const Beside inputs{x + j * words + done * width, x + (j + kTile) * words + done * other, width, other};
          const int64_t first = pass * kTwo / passes, end = (pass + 1) * kTwo / passes;
          const Ahead ahead{next + first * stride, end - first};
          (pass == 0 ? run_panel<type, true> : run_panel<type, false>)(part, these, inputs, ahead, out + j * ldo + i,
                                                                       ldo, c > 0);
        }
      }
    _tile_release();
  }
  for (int64_t i = 0; i < rows && squares != nullptr; ++i)
    squares[i] = _mm512_reduce_add_ps(_mm512_loadu_ps(sums.data() + i * kTile));
  mend<type>(w, stride, rows, cols, x, m, out, ldo);
}

}  // namespace

const PartsTable amx_parts[] = {{dot_parts<Type::f32>, interleave<Type::f32>, Parts<Type::f32>::count},
                                {dot_parts<Type::f16>, interleave<Type::f16>, Parts<Type::f16>::count}};

}  // namespace tinycomp
#elif defined(__x86_64__)
#include "dot_table.h"

namespace tinycomp {

const PartsTable amx_parts[2] = {};

}  // namespace tinycomp
#endif
