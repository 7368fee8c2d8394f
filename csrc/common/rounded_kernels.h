// The loops behind rounded.h, written once against a vector type V, as in dot_kernels.h.
//
// V has: Vec (float32), width, zero(), set1(f), fma(a, b, c), mul(a, b), sum(v), sum4(four vectors, out), load(p),
// store(p, v), load_i8(p, n) and load_u4(p, n, low, high) of n <= width entries with zero levels (-8 for u4) after
// them; Int (32-bit sums), bytes (levels per step), inputs (per tile), no_sums(), load_sums(p), store_sums(p, sums),
// set_bytes(v), dot(sums, unsigned levels, signed levels), dot_halves(sums, v, even, odd) of the low halves of v with
// even, the high ones with odd, load_bytes(p, n) with zeros after n <= bytes, offset(v) adding 128 to signed levels,
// to_float(sums); largest(x, n) of magnitudes, round(x, factor, n, levels) to int8.

#include <algorithm>
#include <cmath>
#include <vector>

#include "lines.h"
#include "prefetch.h"
#include "rounded.h"

namespace tinycomp {
namespace {

// Bytes from a row to those that a tile of R rows asks for meanwhile, at the same place: the next ones, on AMD whole
// tiles further on, at least 16 KB (see prefetch.h and dot_kernels.h).
inline int64_t rows_ahead(const RoundedRows& w, int64_t rows) {
  constexpr int64_t kFar = 16384;
  const int64_t next = rows * w.stride;
  return on_amd && next > 0 ? (kFar + next - 1) / next * next : next;
}

// x in the order of rounded.h; the padding is written too.
template <class T>
TINYCOMP_TARGET void arrange(const RoundedRows& w, int64_t size, const T* x, T* to) {
  const int64_t half = half_width(w);
  if (!w.four_bits) {
    std::fill(std::copy_n(x, size, to), to + half, T(0));
    return;
  }
  for (int64_t i = 0; i < size / 2; ++i) to[i] = x[2 * i], to[half + i] = x[2 * i + 1];
  if (size % 2) to[size / 2] = x[size - 1];
  std::fill(to + (size + 1) / 2, to + half, T(0));
  std::fill(to + half + size / 2, to + 2 * half, T(0));
}

template <class V>
TINYCOMP_TARGET void round_inputs(const RoundedRows& w, const float* x, const RoundedLevels& inputs, int32_t* starts) {
  std::vector<int8_t> plain(w.four_bits ? w.group : 0);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t size = w.size(g);
    const float* from = x + g * w.group;
    const float largest = V::largest(from, size);
    inputs.scales[g * inputs.scale_step] = largest / 127.0f;
    const float factor = largest == 0 ? 0.0f : 127.0f / largest;
    int8_t* to = inputs.levels + g * inputs.group_step;
    if (!w.four_bits) {
      V::round(from, factor, size, to);
      std::fill(to + size, to + group_width(w), int8_t(0));
    } else {
      V::round(from, factor, size, plain.data());
      arrange(w, size, static_cast<const int8_t*>(plain.data()), to);
    }
    const typename V::Int one = V::set_bytes(1);
    typename V::Int sums = V::no_sums();
    for (int64_t b = 0; b < group_width(w); b += V::bytes)
      sums = V::dot(sums, one, V::load_bytes(reinterpret_cast<const uint8_t*>(to) + b, V::bytes));
    int32_t lanes[kLanes] = {}, sum = 0;
    V::store_sums(lanes, sums);
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
    inputs.sums[g * inputs.scale_step] = sum;
    for (int64_t l = 0; l < kLanes && starts != nullptr; ++l)
      starts[g * kLanes + l] = -(w.four_bits ? 8 : 128) * lanes[l];
  }
}

template <class V>
TINYCOMP_TARGET void order_inputs(const RoundedRows& w, const float* x, float* ordered, float* sums) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* from = x + g * w.group;
    arrange(w, w.size(g), from, ordered + g * group_width(w));
    if (sums == nullptr) continue;
    float sum = 0;
    for (int64_t i = 0; i < w.size(g); ++i) sum += from[i];
    sums[g] = sum;
  }
}

TINYCOMP_TARGET inline float scale_of(const RoundedRows& w, int r, int64_t g) {
  return w.scale_groups == 1 ? 1.0f : w.scales[r * w.scale_groups + g];
}

template <class V, int R, int M>
TINYCOMP_TARGET inline void finish(const RoundedRows& w, const typename V::Vec (&total)[M][R], float* out,
                                   int64_t ldo) {
  for (int j = 0; j < M; ++j) {
    float* to = out + j * ldo;
    if constexpr (R % 4 == 0) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r += 4) V::sum4(total[j][r], total[j][r + 1], total[j][r + 2], total[j][r + 3], to + r);
    } else {
      for (int r = 0; r < R; ++r) to[r] = V::sum(total[j][r]);
    }
    for (int r = 0; r < R && w.scale_groups == 1; ++r) to[r] *= w.scales[r];
  }
}

// R rows against M rounded inputs.
template <class V, int R, int M, bool four_bits>
TINYCOMP_TARGET void tile_levels(const RoundedRows& w, const int8_t* levels, const float* scales, const int32_t* starts,
                                 float* out, int64_t ldo) {
  using Int = typename V::Int;
  const int64_t width = input_width(w), half = half_width(w), ahead = rows_ahead(w, R);
  typename V::Vec total[M][R];
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[j][r] = V::zero();
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t size = w.size(g), stored = four_bits ? (size + 1) / 2 : size;
    const uint8_t* from = group_of(w, g);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(levels) + g * group_width(w);
    Int acc[M][R];
    for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[j][r] = V::load_sums(starts + (j * w.groups + g) * kLanes);
    Lines<uint8_t, R> row(from, w.stride), later(from + ahead, w.stride);
    // Whole steps need no masks, which cost more than the products.
    const auto step = [&](int64_t left) TINYCOMP_TARGET __attribute__((always_inline)) {
      Int v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        v[r] = V::load_bytes(row.line(r), left);
        R == 8 ? __builtin_prefetch(later.line(r), 0, 2) : prefetch(later.line(r));
        if (!four_bits) v[r] = V::offset(v[r]);
      }
      for (int j = 0; j < M; ++j) {
        const Int even = V::load_bytes(x + j * width, V::bytes);
        const Int odd = four_bits ? V::load_bytes(x + j * width + half, V::bytes) : even;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          acc[j][r] = four_bits ? V::dot_halves(acc[j][r], v[r], even, odd) : V::dot(acc[j][r], v[r], even);
      }
      row.move(V::bytes), later.move(V::bytes), x += V::bytes;
    };
    int64_t b = 0;
    for (; b + V::bytes <= stored; b += V::bytes) step(V::bytes);
    if (b < stored) step(stored - b);
    for (int j = 0; j < M; ++j) {
      const float scale = scales[j * w.groups + g];
      const auto same = V::set1(scale);
      if (w.scale_groups == 1) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[j][r] = V::fma(V::to_float(acc[j][r]), same, total[j][r]);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          total[j][r] = V::fma(V::to_float(acc[j][r]), V::set1(scale * w.scales[r * w.scale_groups + g]), total[j][r]);
      }
    }
  }
  finish<V, R, M>(w, total, out, ldo);
}

// R rows against M ordered float32 inputs.
template <class V, int R, int M>
TINYCOMP_TARGET void tile_floats(const RoundedRows& w, const float* ordered, float* out, int64_t ldo) {
  using Vec = typename V::Vec;
  const int64_t width = input_width(w), half = half_width(w), ahead = rows_ahead(w, R);
  Vec total[M][R];
  for (int j = 0; j < M; ++j)
    for (int r = 0; r < R; ++r) total[j][r] = V::zero();
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t size = w.size(g), stored = w.four_bits ? (size + 1) / 2 : size;
    const uint8_t* from = group_of(w, g);
    const float* x = ordered + g * group_width(w);
    Vec acc[M][R];
    for (int j = 0; j < M; ++j)
      for (int r = 0; r < R; ++r) acc[j][r] = V::zero();
    for (int64_t b = 0; b < stored; b += V::width) {
      Vec low[R], high[R];
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = from + r * w.stride + b;
        if (w.four_bits)
          V::load_u4(at, stored - b, low[r], high[r]);
        else
          low[r] = V::load_i8(at, stored - b);
        prefetch(at + ahead);
      }
      for (int j = 0; j < M; ++j) {
        const Vec even = V::load(x + j * width + b);
        for (int r = 0; r < R; ++r) acc[j][r] = V::fma(low[r], even, acc[j][r]);
        if (!w.four_bits) continue;
        const Vec odd = V::load(x + j * width + half + b);
        for (int r = 0; r < R; ++r) acc[j][r] = V::fma(high[r], odd, acc[j][r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const Vec scale = V::set1(scale_of(w, r, g));
      for (int j = 0; j < M; ++j) total[j][r] = V::fma(acc[j][r], scale, total[j][r]);
    }
  }
  finish<V, R, M>(w, total, out, ldo);
}

inline RoundedRows from_row(const RoundedRows& w, int64_t i) {
  RoundedRows rest = w;
  rest.data += i * w.stride;
  rest.scales += i * w.scale_groups;
  return rest;
}

template <class V, int R, bool four_bits>
TINYCOMP_TARGET void levels_against(const RoundedRows& w, const int8_t* levels, const float* scales,
                                    const int32_t* starts, int64_t m, float* out, int64_t ldo) {
  const int64_t width = input_width(w), groups = w.groups;
  for (int64_t j = 0, take; j < m; j += take) {
    const int64_t left = m - j;
    take = V::inputs == 3 && left >= 3 && left != 4 ? 3 : std::min<int64_t>(left, 2);
    const auto tile = take == 1   ? tile_levels<V, R, 1, four_bits>
                      : take == 2 ? tile_levels<V, R, 2, four_bits>
                                  : tile_levels < V,
               R, V::inputs == 3 ? 3 : 2, four_bits > ;
    tile(w, levels + j * width, scales + j * groups, starts + j * groups * kLanes, out + j * ldo, ldo);
  }
}

template <class V, int R>
TINYCOMP_TARGET void floats_against(const RoundedRows& w, const float* x, int64_t m, float* out, int64_t ldo) {
  const int64_t width = input_width(w);
  int64_t j = 0;
  for (; j + 2 <= m; j += 2) tile_floats<V, R, 2>(w, x + j * width, out + j * ldo, ldo);
  if (j < m) tile_floats<V, R, 1>(w, x + j * width, out + j * ldo, ldo);
}

template <class V, bool four_bits>
TINYCOMP_TARGET void dot_all_levels(const RoundedRows& w, int64_t rows, const int8_t* levels, const float* scales,
                                    const int32_t* starts, int64_t m, float* out, int64_t ldo) {
  int64_t i = 0;
  // More rows that stream from memory side by side, where registers are enough; not tried on Intel's.
  if constexpr (V::width == 16)
    for (; on_amd && m == 1 && i + 8 <= rows; i += 8)
      tile_levels<V, 8, 1, four_bits>(from_row(w, i), levels, scales, starts, out + i, ldo);
  for (; i + 4 <= rows; i += 4)
    levels_against<V, 4, four_bits>(from_row(w, i), levels, scales, starts, m, out + i, ldo);
  for (; i < rows; ++i) levels_against<V, 1, four_bits>(from_row(w, i), levels, scales, starts, m, out + i, ldo);
}

template <class V>
TINYCOMP_TARGET void dot_levels(const RoundedRows& w, int64_t rows, const int8_t* levels, const float* scales,
                                const int32_t* starts, int64_t m, float* out, int64_t ldo) {
  const auto dot = w.four_bits ? dot_all_levels<V, true> : dot_all_levels<V, false>;
  dot(w, rows, levels, scales, starts, m, out, ldo);
}

template <class V>
TINYCOMP_TARGET void dot_floats(const RoundedRows& w, int64_t rows, const float* x, int64_t m, float* out,
                                int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) floats_against<V, 4>(from_row(w, i), x, m, out + i, ldo);
  for (; i < rows; ++i) floats_against<V, 1>(from_row(w, i), x, m, out + i, ldo);
}

template <class V>
TINYCOMP_TARGET void rebuild(const RoundedRows& w, int64_t rows, float* out) {
  const int64_t half = half_width(w);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t g = 0; g < w.groups; ++g) {
      const auto scale = V::set1(w.scales[i * w.scale_groups + (w.scale_groups == 1 ? 0 : g)]);
      const uint8_t* from = group_of(w, g) + i * w.stride;
      float* to = out + i * input_width(w) + g * group_width(w);
      const int64_t stored = w.four_bits ? (w.size(g) + 1) / 2 : w.size(g);
      for (int64_t b = 0; b < half; b += V::width) {
        const int64_t left = std::max<int64_t>(0, stored - b);
        if (!w.four_bits) {
          V::store(to + b, V::mul(scale, V::load_i8(from + b, left)));
          continue;
        }
        typename V::Vec low, high;
        V::load_u4(from + b, left, low, high);
        V::store(to + b, V::mul(scale, low)), V::store(to + half + b, V::mul(scale, high));
      }
    }
}

template <class V>
RoundedTable make_rounded() {
  return {round_inputs<V>, order_inputs<V>, dot_levels<V>, nullptr, dot_floats<V>, rebuild<V>, nullptr};
}

}  // namespace
}  // namespace tinycomp
