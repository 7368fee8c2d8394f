// The loops of rounded.h for AVX-512 F, BW, DQ and VL. A file that includes this defines TINYCOMP_TARGET and
// TINYCOMP_VNNI, 1 where VNNI is there as well.
#include <immintrin.h>

#include <array>
#include <utility>

#include "rounded_kernels.h"
#include "sums_x86.h"
#include "transpose_avx512.h"

namespace tinycomp {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Int = __m512i;
  static constexpr int width = 16, bytes = 64, inputs = 3;

  TINYCOMP_TARGET static __mmask16 lanes(int64_t n) {
    return n >= 16 ? static_cast<__mmask16>(-1) : static_cast<__mmask16>((1u << n) - 1);
  }
  TINYCOMP_TARGET static Vec zero() { return _mm512_setzero_ps(); }
  TINYCOMP_TARGET static Vec set1(float v) { return _mm512_set1_ps(v); }
  TINYCOMP_TARGET static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  TINYCOMP_TARGET static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  TINYCOMP_TARGET static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  TINYCOMP_TARGET static float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  TINYCOMP_TARGET static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    sum_each(halve(a), halve(b), halve(c), halve(d), out);
  }
  TINYCOMP_TARGET static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  TINYCOMP_TARGET static Vec load_i8(const uint8_t* p, int64_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
  }
  TINYCOMP_TARGET static void load_u4(const uint8_t* p, int64_t n, Vec& low, Vec& high) {
    // A table look-up by the low four bits of each lane is the mask, the subtraction and the conversion at once.
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p));
    low = _mm512_permutexvar_ps(wide, levels);
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), levels);
  }
  TINYCOMP_TARGET static Int no_sums() { return _mm512_setzero_si512(); }
  TINYCOMP_TARGET static Int load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  TINYCOMP_TARGET static void store_sums(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
  TINYCOMP_TARGET static Int set_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
#if TINYCOMP_VNNI
  // Not the intrinsic: GCC 12 keeps its sums on the stack.
  TINYCOMP_TARGET static Int dot(Int sums, Int levels, Int inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(levels), "v"(inputs));
    return sums;
  }
  TINYCOMP_TARGET static Int dot_halves(Int sums, Int v, Int even, Int odd) {
    return dot(dot(sums, low(v), even), high(v), odd);
  }
#else
  // Signed bytes of even and odd place in 16 bits each: products of pairs of them fit in 32 bits, of 8-bit ones in 16
  // they need not.
  TINYCOMP_TARGET static Int even_inputs(Int v) { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); }
  TINYCOMP_TARGET static Int odd_inputs(Int v) { return _mm512_srai_epi16(v, 8); }
  TINYCOMP_TARGET static Int dot_split(Int sums, Int levels, Int even, Int odd) {
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_and_si512(levels, _mm512_set1_epi16(255)), even));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_srli_epi16(levels, 8), odd));
  }
  TINYCOMP_TARGET static Int dot(Int sums, Int levels, Int inputs) {
    return dot_split(sums, levels, even_inputs(inputs), odd_inputs(inputs));
  }
  // Four products of levels below 16 fit in 16 bits.
  TINYCOMP_TARGET static Int dot_halves(Int sums, Int v, Int even, Int odd) {
    const Int four = _mm512_add_epi16(_mm512_maddubs_epi16(low(v), even), _mm512_maddubs_epi16(high(v), odd));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(four, _mm512_set1_epi16(1)));
  }
#endif
  TINYCOMP_TARGET static Int load_bytes(const uint8_t* p, int64_t n) {
    return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << n) - 1, p);
  }
  TINYCOMP_TARGET static Int offset(Int v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  TINYCOMP_TARGET static Int low(Int v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  TINYCOMP_TARGET static Int high(Int v) { return low(_mm512_srli_epi16(v, 4)); }
  TINYCOMP_TARGET static Vec to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  TINYCOMP_TARGET static float largest(const float* x, int64_t n) {
    Vec most = zero();
    int64_t i = 0;
    for (; i + width <= n; i += width) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    if (i < n) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i)));
    return _mm512_reduce_max_ps(most);
  }
  TINYCOMP_TARGET static void round(const float* x, float factor, int64_t n, int8_t* levels) {
    int64_t i = 0;
    for (; i + width <= n; i += width) {
      const __m512i wide = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), set1(factor)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + i), _mm512_cvtsepi32_epi8(wide));
    }
    if (i == n) return;
    const Vec scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i), set1(factor));
    _mm512_mask_cvtsepi32_storeu_epi8(levels + i, lanes(n - i), _mm512_cvtps_epi32(scaled));
  }
};

// Many inputs: the levels of a group, four to a lane and a row to each lane, meet inputs four levels at a time, as in
// the panels of dot_kernels.h.
constexpr int kPanelRows = 32, kPanelInputs = TINYCOMP_VNNI ? 12 : 8;

// 16 rows of 64 stored bytes into 16 steps; 4-bit levels into 16 for even inputs and, `odd` later, 16 for odd ones.
TINYCOMP_TARGET void fill_steps(const RoundedRows& w, const uint8_t* from, int64_t n, int64_t left, __m512i* to,
                                int64_t odd) {
  __m512i v[16];
  for (int r = 0; r < 16; ++r) v[r] = r < n ? Avx512::load_bytes(from + r * w.stride, left) : _mm512_setzero_si512();
  transpose16(v);
  for (int s = 0; s < 16; ++s) {
    to[2 * s] = w.four_bits ? Avx512::low(v[s]) : Avx512::offset(v[s]);
    if (w.four_bits) to[2 * (odd + s)] = Avx512::high(v[s]);
  }
}

// J inputs against the steps of a group. Meanwhile memory is asked for `ahead`: a line of two rows with each step.
template <int J>
TINYCOMP_TARGET void group_tile(const RoundedRows& w, const __m512i* panel, const __m512* row_scales, const int8_t* x,
                                const float* scales, const int32_t* sums, const uint8_t* ahead, __m512* totals) {
  const auto ask = [ahead, stride = w.stride](int64_t s) {
    const uint8_t* at = ahead + 2 * (s % 16) * stride + s / 16 * 64;
    __builtin_prefetch(at, 0, 2), __builtin_prefetch(at + stride, 0, 2);
  };
  const int64_t width = group_width(w), steps = width / 4;
  __m512i acc[J][2];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) acc[j][0] = acc[j][1] = _mm512_set1_epi32(-(w.four_bits ? 8 : 128) * sums[j]);
#if TINYCOMP_VNNI
  Lines<int8_t, J> inputs(x, width);
  for (int64_t s = 0; s < steps; ++s, inputs.move(4)) {
    ask(s);
    const __m512i low = panel[2 * s], high = panel[2 * s + 1];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      int32_t four;
      __builtin_memcpy(&four, inputs.line(j), 4);
      const __m512i input = _mm512_set1_epi32(four);
      acc[j][0] = Avx512::dot(acc[j][0], low, input);
      acc[j][1] = Avx512::dot(acc[j][1], high, input);
    }
  }
#else
  // 16 steps of inputs are split at a time. Groups are padded to whole ones.
  alignas(64) int32_t even[J][16], odd[J][16];
  for (int64_t first = 0; first < steps; first += 16) {
    for (int j = 0; j < J; ++j) {
      const __m512i inputs = _mm512_loadu_si512(x + j * width + 4 * first);
      _mm512_store_si512(even[j], Avx512::even_inputs(inputs));
      _mm512_store_si512(odd[j], Avx512::odd_inputs(inputs));
    }
    for (int64_t s = 0; s < 16; ++s) {
      ask(first + s);
      const __m512i low = panel[2 * (first + s)], high = panel[2 * (first + s) + 1];
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        const __m512i pair = _mm512_set1_epi32(even[j][s]), other = _mm512_set1_epi32(odd[j][s]);
        acc[j][0] = Avx512::dot_split(acc[j][0], low, pair, other);
        acc[j][1] = Avx512::dot_split(acc[j][1], high, pair, other);
      }
    }
  }
#endif
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[j][h]), row_scales[h]);
      totals[2 * j + h] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scales[j]), totals[2 * j + h]);
    }
}

template <int... J>
constexpr auto group_tiles(std::integer_sequence<int, J...>) {
  return std::array{group_tile<J + 1>...};
}

// The steps of one group of 32 rows and the scales of these rows.
TINYCOMP_TARGET void fill_group(const RoundedRows& w, int64_t n, int64_t g, __m512i* panel, __m512 (&row_scales)[2]) {
  const int64_t stored = w.four_bits ? (w.size(g) + 1) / 2 : w.size(g), half = half_width(w) / 4;
  const uint8_t* from = group_of(w, g);
  for (int h = 0; h < 2; ++h) {
    for (int64_t b = 0; b < half_width(w); b += 64)
      fill_steps(w, from + 16 * h * w.stride + b, n - 16 * h, std::max<int64_t>(0, stored - b), panel + b / 2 + h,
                 half);
    alignas(64) float some[16] = {};
    for (int64_t r = 0; r < 16 && r + 16 * h < n; ++r)
      some[r] = w.scales[(r + 16 * h) * w.scale_groups + (w.scale_groups == 1 ? 0 : g)];
    row_scales[h] = _mm512_load_ps(some);
  }
}

TINYCOMP_TARGET void dot_many_levels(const RoundedRows& w, int64_t rows, const RoundedLevels& inputs, int64_t m,
                                     float* out, int64_t ldo) {
  static constexpr auto tiles = group_tiles(std::make_integer_sequence<int, kPanelInputs>());
  // One allocation for both, on a cache line: std::vector does not align these types.
  const int64_t panel_size = group_width(w) / 2;
  std::vector<char> memory(64 * (panel_size + 2 * m + 1));
  auto* panel = reinterpret_cast<__m512i*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  auto* totals = reinterpret_cast<__m512*>(panel + panel_size);
  for (int64_t i = 0; i < rows; i += kPanelRows) {
    const int64_t n = std::min<int64_t>(kPanelRows, rows - i);
    const RoundedRows some = from_row(w, i);
    std::fill_n(totals, 2 * m, _mm512_setzero_ps());
    for (int64_t g = 0; g < w.groups; ++g) {
      __m512 row_scales[2];
      fill_group(some, n, g, panel, row_scales);
      const uint8_t* ahead = g + 1 < w.groups ? group_of(some, g + 1) : group_of(from_row(w, i + kPanelRows), 0);
      const int8_t* levels = inputs.levels + g * inputs.group_step;
      const float* scales = inputs.scales + g * inputs.scale_step;
      const int32_t* sums = inputs.sums + g * inputs.scale_step;
      for (int64_t j = 0, take; j < m; j += take) {
        const int64_t left = m - j, passes = (left + kPanelInputs - 1) / kPanelInputs;
        take = (left + passes - 1) / passes;
        tiles[take - 1](some, panel, row_scales, levels + j * group_width(w), scales + j, sums + j, ahead,
                        totals + 2 * j);
      }
    }
    for (int64_t j = 0; j < m; ++j) std::copy_n(reinterpret_cast<const float*>(totals + 2 * j), n, out + j * ldo + i);
  }
}

// Sixteen numbers rounded to bfloat16, in the upper halves of their lanes.
TINYCOMP_TARGET __m512i rounded_halves(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  return _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits);
}

TINYCOMP_TARGET void rebuild_pairs(const RoundedRows& w, int64_t rows, uint16_t* out, int64_t distance) {
  const __m512 nibbles = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  alignas(64) uint16_t places[32];  // of the upper halves of the lanes of two vectors
  for (int k = 0; k < 32; ++k) places[k] = 2 * k + 1;
  const __m512i upper = _mm512_load_si512(places);
  const bool scaled = w.scale_groups > 1;
  const int64_t half = half_width(w);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t g = 0; g < w.groups; ++g) {
      const __m512 scale = _mm512_set1_ps(scaled ? w.scales[i * w.scale_groups + g] : 1.0f);
      const uint8_t* from = group_of(w, g) + i * w.stride;
      uint16_t* to = out + i * distance + g * group_width(w);
      const int64_t stored = w.four_bits ? (w.size(g) + 1) / 2 : w.size(g);
      // A table by the lowest five bits, of which the fifth must not matter.
      const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_halves(_mm512_mul_ps(nibbles, scale)), 16));
      const __m512i table = _mm512_broadcast_i64x4(words);
      for (int64_t b = 0; b < half; b += 32) {
        const int64_t left = std::max<int64_t>(0, stored - b);
        const __m256i bytes = left >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + b))
                                         : _mm256_maskz_loadu_epi8((1u << left) - 1, from + b);
        if (w.four_bits) {
          const __m512i wide = _mm512_cvtepu8_epi16(bytes);
          _mm512_storeu_si512(to + b, _mm512_permutexvar_epi16(wide, table));
          _mm512_storeu_si512(to + half + b, _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table));
          continue;
        }
        const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
        const __m512i a = scaled ? rounded_halves(_mm512_mul_ps(first, scale)) : _mm512_castps_si512(first);
        const __m512i c = scaled ? rounded_halves(_mm512_mul_ps(second, scale)) : _mm512_castps_si512(second);
        _mm512_storeu_si512(to + b, _mm512_permutex2var_epi16(a, upper, c));
      }
    }
}

RoundedTable make_avx512_rounded() {
  return {round_inputs<Avx512>, order_inputs<Avx512>, dot_levels<Avx512>, dot_many_levels,
          dot_floats<Avx512>,   rebuild<Avx512>,      rebuild_pairs};
}

}  // namespace
}  // namespace tinycomp
