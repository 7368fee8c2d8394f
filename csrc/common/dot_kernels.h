// The loops behind dot.h, written once against a vector type V. Each instruction set includes this file after defining
// TINYCOMP_TARGET (the function attribute that enables its instructions) and V.
//
// V has: Vec, width, inputs (2 or 6 input rows per tile, so that accumulators stay in registers), panel_inputs (the
// same for panels), zero(), set1(v), add(a, b), fma(a, b, c), transpose(width vectors), sum4(four vectors, out),
// sum(vector), load(const T*) widening T to float32, load_first(const T*, n) with zeros after the first n < width,
// store(float*, vector), and where `narrows` also store to 16-bit types.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "dot.h"
#include "dot_table.h"
#include "prefetch.h"

namespace tinycomp {
namespace {

// Bytes between a load and the prefetch that goes with it, to the nearest cache (tried at 512, 1024 and 2048) and to
// the one behind it.
constexpr int64_t kAhead = 512, kFarAhead = 16384;
// The prefetch goes to the next rows instead where they are this near: short rows would begin unfetched.
constexpr int64_t kNear = 16384, kFarNear = 65536;

template <class T>
TINYCOMP_TARGET inline float scalar(T v) {
  return static_cast<float>(v);
}

template <class V, int R, int M>
TINYCOMP_TARGET inline void finish(const typename V::Vec (&acc)[M][R], float* out, int64_t ldo) {
  for (int j = 0; j < M; ++j) {
    float total[4];
    if constexpr (R == 4) {
      V::sum4(acc[j][0], acc[j][1], acc[j][2], acc[j][3], total);
    } else {
      for (int r = 0; r < R; ++r) total[r] = V::sum(acc[j][r]);
    }
    for (int r = 0; r < R; ++r) out[j * ldo + r] = total[r];
  }
}

// R weight rows against M inputs, all M R accumulators in registers.
template <class V, class T, int R, int M>
TINYCOMP_TARGET void tile(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* out,
                          int64_t ldo) {
  using Vec = typename V::Vec;
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const T*>(w + r * stride);
  Vec acc[M][R];
  for (int j = 0; j < M; ++j)
    for (int r = 0; r < R; ++r) acc[j][r] = V::zero();
  const int64_t ahead = R * stride <= (prefetch_far ? kFarNear : kNear) ? R * stride
                        : prefetch_far                                  ? kFarAhead
                                                                        : kAhead;
  int64_t c = 0;
  for (; c + V::width <= cols; c += V::width) {
    Vec v[R];
    for (int r = 0; r < R; ++r) {
      v[r] = V::load(row[r] + c);
      prefetch(reinterpret_cast<const char*>(row[r] + c) + ahead);
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
  finish<V, R, M>(acc, out, ldo);
}

// R rows against all inputs in tiles of equal size: the rows stay in the nearest cache while the inputs pass by.
template <class V, class T, int R>
TINYCOMP_TARGET void all_inputs(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, int64_t m,
                                float* out, int64_t ldo) {
  for (int64_t j = 0; j < m;) {
    const int64_t left = m - j, passes = (left + V::inputs - 1) / V::inputs, take = (left + passes - 1) / passes;
    const float* from = x + j * ldx;
    float* to = out + j * ldo;
    switch (take) {
      case 1:
        tile<V, T, R, 1>(w, stride, cols, from, ldx, to, ldo);
        break;
      case 2:
        tile<V, T, R, 2>(w, stride, cols, from, ldx, to, ldo);
        break;
      default:
        if constexpr (V::inputs > 2) {
          if (take == 3) tile<V, T, R, 3>(w, stride, cols, from, ldx, to, ldo);
          if (take == 4) tile<V, T, R, 4>(w, stride, cols, from, ldx, to, ldo);
          if (take == 5) tile<V, T, R, 5>(w, stride, cols, from, ldx, to, ldo);
          if (take == 6) tile<V, T, R, 6>(w, stride, cols, from, ldx, to, ldo);
        }
    }
    j += take;
  }
}

// Many inputs: rows are widened and transposed into a panel, so that a register holds one input feature of many rows
// and meets inputs one number at a time; nothing is summed across a register.
template <class V>
constexpr int kPanelRows = 2 * V::width;
constexpr int64_t kPanelColumns = 512;
// Entries between a load of a row that is transposed and the prefetch that goes with it: so many rows at once are more
// than the processor follows. Short rows: the next panel's.
constexpr int64_t kPanelAhead = 64;

// `lines` lines of a matrix, those beyond n as zeros, transposed: panel[c * lines + i].
template <class V, int lines, class T>
TINYCOMP_TARGET void fill_panel(const char* w, int64_t stride, int64_t n, int64_t cols, float* panel) {
  const bool next = prefetch_far && lines * stride <= kFarNear;
  const int64_t ahead = next ? lines * stride : kPanelAhead * static_cast<int64_t>(sizeof(T));
  for (int64_t first = 0; first < lines; first += V::width)
    for (int64_t c = 0; c < cols; c += V::width) {
      typename V::Vec v[V::width];
      const int64_t left = cols - c;
      for (int r = 0; r < V::width; ++r) {
        const T* from = reinterpret_cast<const T*>(w + (first + r) * stride) + c;
        const char* later = reinterpret_cast<const char*>(from) + ahead;
        next ? prefetch(later) : __builtin_prefetch(later);
        v[r] = first + r >= n ? V::zero() : left < V::width ? V::load_first(from, left) : V::load(from);
      }
      V::transpose(v);
      for (int r = 0; r < V::width && r < left; ++r) V::store(panel + (c + r) * lines + first, v[r]);
    }
}

// J inputs against the rows of a panel of P vectors. Unrolled entirely: accumulators that a loop indexes would be kept
// in memory.
template <class V, int J, int P>
TINYCOMP_TARGET void panel_tile(const float* panel, int64_t cols, const float* x, int64_t ldx, float* out, int64_t ldo,
                                int64_t n, bool add) {
  constexpr int lines = P * V::width;
  typename V::Vec acc[J][P];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[j][p] = V::zero();
  for (int j = 0; j < J; ++j)
    for (int p = 0; p < P; ++p) __builtin_prefetch(out + j * ldo + p * V::width, 1);
  for (int64_t c = 0; c < cols; ++c) {
    typename V::Vec w[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) w[p] = V::load(panel + c * lines + p * V::width);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const auto input = V::set1(x[j * ldx + c]);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[j][p] = V::fma(w[p], input, acc[j][p]);
    }
  }
  alignas(64) float some[lines];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
    float* to = out + j * ldo;
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      if (n == lines)
        V::store(to + p * V::width, add ? V::add(V::load(to + p * V::width), acc[j][p]) : acc[j][p]);
      else
        V::store(some + p * V::width, acc[j][p]);
    }
    if (n < lines)
      for (int64_t i = 0; i < n; ++i) to[i] = add ? to[i] + some[i] : some[i];
  }
}

template <class V, int P, int... J>
constexpr auto panel_tiles(std::integer_sequence<int, J...>) {
  return std::array{panel_tile<V, J + 1, P>...};
}

template <class V, class T>
TINYCOMP_TARGET void dot_panels(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                                int64_t m, float* out, int64_t ldo) {
  using Takes = std::make_integer_sequence<int, V::panel_inputs>;
  static constexpr auto whole = panel_tiles<V, 2>(Takes()), half = panel_tiles<V, 1>(Takes());
  alignas(64) float panel[kPanelColumns * kPanelRows<V>];
  // Equal shares of the columns: a short last one would cost as many passes over the results.
  const int64_t shares = (cols + kPanelColumns - 1) / kPanelColumns, unit = V::width;
  const int64_t share = ((cols + shares - 1) / shares + unit - 1) / unit * unit;
  for (int64_t c = 0; c < cols; c += share)
    for (int64_t i = 0; i < rows; i += kPanelRows<V>) {
      const int64_t n = std::min<int64_t>(kPanelRows<V>, rows - i), depth = std::min(share, cols - c);
      const char* from = w + i * stride + c * sizeof(T);
      const auto& tiles = n > V::width ? whole : half;
      n > V::width ? fill_panel<V, kPanelRows<V>, T>(from, stride, n, depth, panel)
                   : fill_panel<V, V::width, T>(from, stride, n, depth, panel);
      for (int64_t j = 0, take; j < m; j += take) {
        const int64_t left = m - j, passes = (left + V::panel_inputs - 1) / V::panel_inputs;
        take = (left + passes - 1) / passes;
        tiles[take - 1](panel, depth, x + j * ldx + c, ldx, out + j * ldo + i, ldo, n, c > 0);
      }
    }
}

template <class V, class T>
TINYCOMP_TARGET void dot_typed(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                               int64_t m, float* out, int64_t ldo) {
  if (m >= kPanelInputs && cols > 0) return dot_panels<V, T>(w, stride, rows, cols, x, ldx, m, out, ldo);
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows)
    all_inputs<V, T, kBlockRows>(w + i * stride, stride, cols, x, ldx, m, out + i, ldo);
  for (; i < rows; ++i) all_inputs<V, T, 1>(w + i * stride, stride, cols, x, ldx, m, out + i, ldo);
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
