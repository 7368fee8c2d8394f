// The loops behind dot.h, written once against a vector type V. Each instruction set includes this file after defining
// TINYCOMP_TARGET (the function attribute that enables its instructions) and V.
//
// V has: Vec, width, inputs (2 or 6 input rows per tile, so that accumulators stay in registers), zero(), fma(a, b, c),
// sum4(four vectors, out), sum(vector), load(const T*) widening T to float32, load_first(const T*, n) with zeros after
// the first n < width, store(float*, vector), and where `narrows` also store to 16-bit
// types.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "dot.h"
#include "dot_table.h"

namespace tinycomp {
namespace {

// Bytes between a load and the prefetch that goes with it, tried at 512, 1024 and 2048.
constexpr int64_t kAhead = 512;

// Columns per pass over many inputs: as many as keep the inputs in the second-level cache and four rows in the first.
constexpr int64_t kInputFloats = 128 * 1024, kLeastColumns = 256, kMostColumns = 2048;

template <class T>
TINYCOMP_TARGET inline float scalar(T v) {
  return static_cast<float>(v);
}

// Sums of M x R accumulators; `add`: onto what is there.
template <class V, int R, int M>
TINYCOMP_TARGET inline void finish(const typename V::Vec (&acc)[M][R], float* out, int64_t ldo, bool add) {
  for (int j = 0; j < M; ++j) {
    float total[4];
    if constexpr (R == 4) {
      V::sum4(acc[j][0], acc[j][1], acc[j][2], acc[j][3], total);
    } else {
      for (int r = 0; r < R; ++r) total[r] = V::sum(acc[j][r]);
    }
    for (int r = 0; r < R; ++r) out[j * ldo + r] = add ? out[j * ldo + r] + total[r] : total[r];
  }
}

// R weight rows against M inputs, all M R accumulators in registers.
template <class V, class T, int R, int M>
TINYCOMP_TARGET void tile(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* out,
                          int64_t ldo, bool add) {
  using Vec = typename V::Vec;
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const T*>(w + r * stride);
  Vec acc[M][R];
  for (int j = 0; j < M; ++j)
    for (int r = 0; r < R; ++r) acc[j][r] = V::zero();
  int64_t c = 0;
  for (; c + V::width <= cols; c += V::width) {
    Vec v[R];
    for (int r = 0; r < R; ++r) {
      v[r] = V::load(row[r] + c);
      __builtin_prefetch(reinterpret_cast<const char*>(row[r] + c) + kAhead);
    }
    for (int j = 0; j < M; ++j) {
      const Vec input = V::load(x + j * ldx + c);
      for (int r = 0; r < R; ++r) acc[j][r] = V::fma(v[r], input, acc[j][r]);
    }
  }
  if (c < cols) {
    Vec v[R];
    for (int r = 0; r < R; ++r) v[r] = V::load_first(row[r] + c, cols - c);
    for (int j = 0; j < M; ++j) {
      const Vec input = V::load_first(x + j * ldx + c, cols - c);
      for (int r = 0; r < R; ++r) acc[j][r] = V::fma(v[r], input, acc[j][r]);
    }
  }
  finish<V, R, M>(acc, out, ldo, add);
}

// R rows against all inputs in tiles of equal size: the rows stay in the nearest cache while the inputs pass by.
template <class V, class T, int R>
TINYCOMP_TARGET void all_inputs(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, int64_t m,
                                float* out, int64_t ldo, bool add) {
  for (int64_t j = 0; j < m;) {
    const int64_t left = m - j, passes = (left + V::inputs - 1) / V::inputs, take = (left + passes - 1) / passes;
    const float* from = x + j * ldx;
    float* to = out + j * ldo;
    switch (take) {
      case 1:
        tile<V, T, R, 1>(w, stride, cols, from, ldx, to, ldo, add);
        break;
      case 2:
        tile<V, T, R, 2>(w, stride, cols, from, ldx, to, ldo, add);
        break;
      default:
        if constexpr (V::inputs > 2) {
          if (take == 3) tile<V, T, R, 3>(w, stride, cols, from, ldx, to, ldo, add);
          if (take == 4) tile<V, T, R, 4>(w, stride, cols, from, ldx, to, ldo, add);
          if (take == 5) tile<V, T, R, 5>(w, stride, cols, from, ldx, to, ldo, add);
          if (take == 6) tile<V, T, R, 6>(w, stride, cols, from, ldx, to, ldo, add);
        }
    }
    j += take;
  }
}

template <class V, class T>
TINYCOMP_TARGET void widen_typed(const void* from, float* to, int64_t n);

// More inputs than one tile takes: narrow weights are widened once, a few rows at a time, and read from cache.
template <class V, class T, int R>
TINYCOMP_TARGET void rows_against_all(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx,
                                      int64_t m, float* out, int64_t ldo, bool add) {
  if constexpr (!std::is_same_v<T, float>) {
    if (m > V::inputs) {
      alignas(64) float wide[R * kMostColumns];
      for (int r = 0; r < R; ++r) widen_typed<V, T>(w + r * stride, wide + r * cols, cols);
      all_inputs<V, float, R>(reinterpret_cast<const char*>(wide), cols * 4, cols, x, ldx, m, out, ldo, add);
      return;
    }
  }
  all_inputs<V, T, R>(w, stride, cols, x, ldx, m, out, ldo, add);
}

template <class V, class T>
TINYCOMP_TARGET void dot_typed(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                               int64_t m, float* out, int64_t ldo) {
  int64_t pass = cols;
  if (m > V::inputs) pass = std::clamp(kInputFloats / m / 64 * 64, kLeastColumns, kMostColumns);
  for (int64_t c = 0, n; c == 0 || c < cols; c += std::max<int64_t>(n, 1)) {
    n = std::min(pass, cols - c);
    const char* from = w + c * static_cast<int64_t>(sizeof(T));
    int64_t i = 0;
    for (; i + kBlockRows <= rows; i += kBlockRows)
      rows_against_all<V, T, kBlockRows>(from + i * stride, stride, n, x + c, ldx, m, out + i, ldo, c > 0);
    for (; i < rows; ++i) rows_against_all<V, T, 1>(from + i * stride, stride, n, x + c, ldx, m, out + i, ldo, c > 0);
  }
}

template <class V, class T>
TINYCOMP_TARGET void widen_typed(const void* from, float* to, int64_t n) {
  const T* source = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(to + i, V::load(source + i));
  for (; i < n; ++i) to[i] = scalar(source[i]);
}

template <class V, class T>
TINYCOMP_TARGET void narrow_typed(const float* from, void* to, int64_t n) {
  T* target = static_cast<T*>(to);
  int64_t i = 0;
  if constexpr (V::narrows)
    for (; i + V::width <= n; i += V::width) V::store(target + i, V::load(from + i));
  for (; i < n; ++i) target[i] = static_cast<T>(from[i]);
}

template <class V>
DotTable make_table() {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  return {
      {dot_typed<V, float>, dot_typed<V, BFloat16>, dot_typed<V, Half>},
      {widen_typed<V, float>, widen_typed<V, BFloat16>, widen_typed<V, Half>},
      {narrow_typed<V, float>, narrow_typed<V, BFloat16>, narrow_typed<V, Half>},
  };
}

}  // namespace
}  // namespace tinycomp
