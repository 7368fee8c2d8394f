// The loops behind dot.h, written once against a vector type V. Each instruction set includes this file after defining
// TINYCOMP_TARGET (the function attribute that enables its instructions) and V.
//
// V has: Vec, width, inputs (input rows per tile of four weight rows, so that accumulators stay in registers),
// panel_inputs (the same for panels), panels_from (inputs from which on panels are faster), zero(), set1(v), add(a, b),
// fma(a, b, c), transpose(width vectors), sum4(four vectors, out), sum(vector), load(const T*) widening T to float32,
// load_pairs(const BFloat16*) of 2 width numbers as they are, first(v) and second(v) of these pairs widened,
// load_first(const T*, n) with zeros after the first n < width, store(float*, vector), and where `narrows` also store
// to 16-bit types.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "dot.h"
#include "dot_table.h"
#include "lines.h"
#include "prefetch.h"

namespace tinycomp {
namespace {

// Bytes between a load and the prefetch that goes with it, to the nearest cache (tried at 512, 1024 and 2048) and to
// the one behind it.
constexpr int64_t kAhead = 512, kFarAhead = 16384;
// The prefetch goes to the next rows instead where they are this near, on AMD to rows at that distance: short rows
// would begin unfetched.
constexpr int64_t kNear = 16384, kFarNear = 65536;

template <class T>
TINYCOMP_TARGET inline float scalar(T v) {
  return static_cast<float>(v);
}

template <class V, int R, int M>
TINYCOMP_TARGET inline void finish(const typename V::Vec (&acc)[M][R], float* out, int64_t ldo) {
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) {
    if constexpr (R % 4 == 0) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r += 4) V::sum4(acc[j][r], acc[j][r + 1], acc[j][r + 2], acc[j][r + 3], out + j * ldo + r);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) out[j * ldo + r] = V::sum(acc[j][r]);
    }
  }
}

// R weight rows against M inputs, all M R accumulators in registers: unrolled entirely, for one that a loop indexes
// would be kept in memory.
template <class V, class T, int R, int M>
TINYCOMP_TARGET void tile(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* out,
                          int64_t ldo) {
  using Vec = typename V::Vec;
  Vec acc[M][R];
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[j][r] = V::zero();
  const int64_t next = R * stride;
  int64_t ahead = on_amd ? kFarAhead : kAhead;
  if (next > 0 && next <= (on_amd ? kFarNear : kNear)) ahead = on_amd ? (ahead + next - 1) / next * next : next;
  Lines<float, M> inputs(x, ldx);
  Lines<char, R> row(w, stride), later(w + ahead, stride);
  const auto weights = [&](int r) { return reinterpret_cast<const T*>(row.line(r)); };
  constexpr int64_t kStep = V::width * sizeof(T);
  int64_t c = 0;
  for (; c + V::width <= cols; c += V::width, inputs.move(V::width), row.move(kStep), later.move(kStep)) {
    Vec v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      v[r] = V::load(weights(r));
      prefetch(later.line(r));
    }
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) {
      const Vec input = V::load(inputs.line(j));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[j][r] = V::fma(v[r], input, acc[j][r]);
    }
  }
  if (c < cols) {
    Vec v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) v[r] = V::load_first(weights(r), cols - c);
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) {
      const Vec input = V::load_first(inputs.line(j), cols - c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[j][r] = V::fma(v[r], input, acc[j][r]);
    }
  }
  finish<V, R, M>(acc, out, ldo);
}

template <class V, class T, int R, int... M>
constexpr auto row_tiles(std::integer_sequence<int, M...>) {
  return std::array{tile<V, T, R, M + 1>...};
}

// R rows against all inputs in tiles of equal size: the rows stay in the nearest cache while the inputs pass by.
template <class V, class T, int R>
TINYCOMP_TARGET void all_inputs(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, int64_t m,
                                float* out, int64_t ldo) {
  static constexpr auto tiles = row_tiles<V, T, R>(std::make_integer_sequence<int, V::inputs>());
  for (int64_t j = 0, take; j < m; j += take) {
    const int64_t left = m - j, passes = (left + V::inputs - 1) / V::inputs;
    take = (left + passes - 1) / passes;
    tiles[take - 1](w, stride, cols, x + j * ldx, ldx, out + j * ldo, ldo);
  }
}

// Few inputs: rows one after another, in the order of memory, what comes kFarAhead later asked for beside each load.
// The loop takes a register at a time on purpose: with less of it to a line the processor runs ahead of what it has
// asked for, and misses that only the nearest cache keeps track of hold it up (Granite Rapids, 4 MB of bfloat16 from
// memory, one input: 255 us, unrolled twice 306, four rows side by side 320, tiles 297, a read alone 246).
template <class V, class T, int M>
TINYCOMP_TARGET void rows_in_order(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x,
                                   int64_t ldx, float* out, int64_t ldo) {
  constexpr int64_t kStep = V::width * sizeof(T);
  const int64_t whole = cols / V::width * V::width;
  const int64_t ahead = stride > 0 && stride <= kFarAhead ? (kFarAhead + stride - 1) / stride * stride : kFarAhead;
  for (int64_t i = 0; i < rows; ++i, w += stride) {
    typename V::Vec sum[M];
#pragma GCC unroll 4
    for (auto& some : sum) some = V::zero();
    Lines<float, M> inputs(x, ldx);
    const char *from = w, *const end = w + whole * static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 1
    for (; from != end; from += kStep, inputs.move(V::width)) {
      __builtin_prefetch(from + ahead, 0, 2);
      const auto v = V::load(reinterpret_cast<const T*>(from));
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sum[j] = V::fma(v, V::load(inputs.line(j)), sum[j]);
    }
    if (whole < cols) {
      const auto v = V::load_first(reinterpret_cast<const T*>(from), cols - whole);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sum[j] = V::fma(v, V::load_first(inputs.line(j), cols - whole), sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) out[j * ldo + i] = V::sum(sum[j]);
  }
}

template <class V, class T, int... M>
constexpr auto few_in_order(std::integer_sequence<int, M...>) {
  return std::array{rows_in_order<V, T, M + 1>...};
}

// Many inputs: rows are widened and transposed into a panel, so that a register holds one input feature of many rows
// and meets inputs one number at a time; nothing is summed across a register.
template <class V>
constexpr int kPanelRows = 2 * V::width;
constexpr int64_t kPanelColumns = 192, kKeptInputs = 1 << 17;

// `lines` lines of a matrix, those beyond n as zeros, transposed: panel[c * lines + i].
template <class V, int lines, class T>
TINYCOMP_TARGET void fill_panel(const char* w, int64_t stride, int64_t n, int64_t cols, float* panel) {
  using torch::headeronly::BFloat16;
  for (int64_t first = 0; first < lines; first += V::width) {
    typename V::Vec v[V::width];
    const auto row = [&](int r, int64_t c) { return reinterpret_cast<const T*>(w + (first + r) * stride) + c; };
    float* to = panel + first;
    int64_t c = 0;
    // Two numbers of 16 bits are transposed as one, and widened by a shift and a mask.
    if constexpr (std::is_same_v<T, BFloat16>)
      for (; c + 2 * V::width <= cols; c += 2 * V::width) {
        for (int r = 0; r < V::width; ++r) v[r] = first + r < n ? V::load_pairs(row(r, c)) : V::zero();
        V::transpose(v);
        for (int r = 0; r < V::width; ++r) {
          V::store(to + (c + 2 * r) * lines, V::first(v[r]));
          V::store(to + (c + 2 * r + 1) * lines, V::second(v[r]));
        }
      }
    if (first + V::width <= n)
      for (; c + V::width <= cols; c += V::width) {
#pragma GCC unroll 16
        for (int r = 0; r < V::width; ++r) v[r] = V::load(row(r, c));
        V::transpose(v);
#pragma GCC unroll 16
        for (int r = 0; r < V::width; ++r) V::store(to + (c + r) * lines, v[r]);
      }
    for (; c < cols; c += V::width) {
      const int64_t left = cols - c;
      for (int r = 0; r < V::width; ++r)
        v[r] = first + r >= n ? V::zero() : left < V::width ? V::load_first(row(r, c), left) : V::load(row(r, c));
      V::transpose(v);
      for (int r = 0; r < V::width && r < left; ++r) V::store(to + (c + r) * lines, v[r]);
    }
  }
}

// What a tile asks memory for while it computes: a line of each of kPanelRows rows, then their next ones.
struct Ahead {
  const char* from;
  int64_t stride;
};

// J inputs against the rows of a panel of P vectors, unrolled as above. Columns of the panel are those of the inputs,
// or blocks of kBlock of them that begin where `places` says.
template <class V, int J, int P>
TINYCOMP_TARGET void panel_tile(const float* panel, int64_t cols, const float* x, int64_t ldx, float* out, int64_t ldo,
                                int64_t n, bool add, Ahead ahead, const int32_t* places) {
  constexpr int lines = P * V::width;
  typename V::Vec acc[J][P];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[j][p] = V::zero();
  for (int j = 0; j < J; ++j)
    for (int p = 0; p < P; ++p) __builtin_prefetch(out + j * ldo + p * V::width, 1);
  static_assert(kBlock % kPanelRows<V> == 0);
  Lines<float, J> inputs(x, ldx);
  for (int64_t c = 0; c < cols; ahead.from += 64) {
    if (places != nullptr && c % kBlock == 0) inputs = Lines<float, J>(x + places[c / kBlock], ldx);
    const char* line = ahead.from;
#pragma GCC unroll 2
    for (const int64_t stop = std::min<int64_t>(cols, c + kPanelRows<V>); c < stop; ++c, line += ahead.stride) {
      __builtin_prefetch(line, 0, 2);
      typename V::Vec w[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) w[p] = V::load(panel + p * V::width);
      panel += lines;
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        const auto input = V::set1(*inputs.line(j));
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) acc[j][p] = V::fma(w[p], input, acc[j][p]);
      }
      inputs.move(1);
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
  const int64_t columns = (cols + share - 1) / share, panels = columns * ((rows + kPanelRows<V> - 1) / kPanelRows<V>);
  // All columns of some rows first, where the second-level cache keeps all inputs.
  const bool by_rows = m * cols <= kKeptInputs;
  const auto at = [&](int64_t number, int64_t& i, int64_t& c) {
    const int64_t row = by_rows ? number / columns : number % (panels / columns);
    i = row * kPanelRows<V>, c = (by_rows ? number % columns : number / (panels / columns)) * share;
    return w + i * stride + c * static_cast<int64_t>(sizeof(T));
  };
  for (int64_t number = 0, i, c, next_i, next_c; number < panels; ++number) {
    const char* from = at(number, i, c);
    const int64_t n = std::min<int64_t>(kPanelRows<V>, rows - i), depth = std::min(share, cols - c);
    const auto& tiles = n > V::width ? whole : half;
    n > V::width ? fill_panel<V, kPanelRows<V>, T>(from, stride, n, depth, panel)
                 : fill_panel<V, V::width, T>(from, stride, n, depth, panel);
    // The next panel's lines, or the same one for ever where the first tiles have asked for all of them.
    const char* next = at(number + 1, next_i, next_c);
    int64_t missing = number + 1 < panels ? (depth * sizeof(T) + 63) / 64 : 0;
    // Tiles of few columns end before they have asked for a line of every row.
    if (depth < kPanelRows<V>)
      for (int64_t r = 0; r < kPanelRows<V>; ++r, missing = 0) __builtin_prefetch(next + r * stride, 0, 2);
    for (int64_t j = 0, take; j < m; j += take) {
      const int64_t left = m - j, passes = (left + V::panel_inputs - 1) / V::panel_inputs;
      take = (left + passes - 1) / passes;
      const Ahead ahead = missing > 0 ? Ahead{next, stride} : Ahead{from, 0};
      tiles[take - 1](panel, depth, x + j * ldx + c, ldx, out + j * ldo + i, ldo, n, c > 0, ahead, nullptr);
      const int64_t done = depth / kPanelRows<V>;
      next += 64 * done, missing -= done;
    }
  }
}

template <class V, class T>
TINYCOMP_TARGET void blocks_typed(const void* w, const int32_t* columns, int64_t count, const float* x, int64_t ldx,
                                  int64_t m, float* out, int64_t ldo) {
  static constexpr auto tiles = panel_tiles<V, 2>(std::make_integer_sequence<int, V::panel_inputs>());
  constexpr int64_t kRows = kPanelRows<V>, kTogether = kPanelColumns / kBlock, kStride = kBlock * sizeof(T);
  static_assert(kBlock % kRows == 0);
  alignas(64) float panel[kPanelColumns * kRows];
  const auto* from = static_cast<const char*>(w);
  for (int64_t b = 0, taken; b < count; b += taken, from += taken * kBlock * kStride) {
    taken = std::min(kTogether, count - b);
    for (int64_t i = 0; i < kBlock; i += kRows) {
      for (int64_t k = 0; k < taken; ++k)
        fill_panel<V, kRows, T>(from + (k * kBlock + i) * kStride, kStride, kRows, kBlock, panel + k * kBlock * kRows);
      for (int64_t j = 0, take; j < m; j += take) {
        const int64_t left = m - j, passes = (left + V::panel_inputs - 1) / V::panel_inputs;
        take = (left + passes - 1) / passes;
        // Blocks follow one another in memory: nothing needs to be asked for ahead.
        tiles[take - 1](panel, taken * kBlock, x + j * ldx, ldx, out + j * ldo + i, ldo, kRows, true, Ahead{from, 0},
                        columns + b);
      }
    }
  }
}

template <class V, class T>
TINYCOMP_TARGET void dot_typed(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                               int64_t m, float* out, int64_t ldo) {
  // Rows of one register would spend more on sums across it.
  const int64_t panels_from = cols <= V::width ? kPanelInputs : V::panels_from;
  if (m >= panels_from && cols > 0) return dot_panels<V, T>(w, stride, rows, cols, x, ldx, m, out, ldo);
  static constexpr auto in_order = few_in_order<V, T>(std::make_integer_sequence<int, kFewInOrder>());
  if (meet_in_order(m, cols * static_cast<int64_t>(sizeof(T))))
    return in_order[m - 1](w, stride, rows, cols, x, ldx, out, ldo);
  int64_t i = 0;
  // More rows that stream from memory side by side (Zen 4: 17 -> 18.5 GB/s).
  constexpr int64_t kMoreRows = 2 * kBlockRows;
  for (; m == 1 && on_amd && i + kMoreRows <= rows; i += kMoreRows)
    tile<V, T, kMoreRows, 1>(w + i * stride, stride, cols, x, ldx, out + i, ldo);
  for (; i + kBlockRows <= rows; i += kBlockRows)
    all_inputs<V, T, kBlockRows>(w + i * stride, stride, cols, x, ldx, m, out + i, ldo);
  for (; i < rows; ++i) all_inputs<V, T, 1>(w + i * stride, stride, cols, x, ldx, m, out + i, ldo);
}

// J sums of rows, P registers of their columns: rows are read as they lie.
template <class V, class T, int J, int P>
TINYCOMP_TARGET void sum_tile(const char* w, int64_t stride, int64_t rows, const float* x, int64_t ldx, float* out,
                              int64_t ldo) {
  typename V::Vec acc[J][P];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[j][p] = V::zero();
  Lines<float, J> inputs(x, ldx);
  for (int64_t i = 0; i < rows; ++i, w += stride, inputs.move(1)) {
    typename V::Vec row[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) row[p] = V::load(reinterpret_cast<const T*>(w) + p * V::width);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const auto input = V::set1(*inputs.line(j));
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[j][p] = V::fma(row[p], input, acc[j][p]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) V::store(out + j * ldo + p * V::width, acc[j][p]);
}

template <class V, class T, int P, int... J>
constexpr auto sum_tiles(std::integer_sequence<int, J...>) {
  return std::array{sum_tile<V, T, J + 1, P>...};
}

template <class V, class T>
TINYCOMP_TARGET void sum_rows_typed(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x,
                                    int64_t ldx, int64_t m, float* out, int64_t ldo) {
  using Takes = std::make_integer_sequence<int, V::panel_inputs>;
  static constexpr auto two = sum_tiles<V, T, 2>(Takes()), one = sum_tiles<V, T, 1>(Takes());
  const int64_t whole = cols / V::width * V::width;
  for (int64_t j = 0, take; j < m; j += take) {
    const int64_t left = m - j, passes = (left + V::panel_inputs - 1) / V::panel_inputs;
    take = (left + passes - 1) / passes;
    for (int64_t c = 0, n; c < whole; c += n) {
      n = std::min<int64_t>(2 * V::width, whole - c);
      const auto& tiles = n > V::width ? two : one;
      tiles[take - 1](w + c * static_cast<int64_t>(sizeof(T)), stride, rows, x + j * ldx, ldx, out + j * ldo + c, ldo);
    }
  }
  for (int64_t j = 0; j < m && whole < cols; ++j) {
    std::fill(out + j * ldo + whole, out + j * ldo + cols, 0.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = whole; c < cols; ++c)
        out[j * ldo + c] += x[j * ldx + i] * scalar(reinterpret_cast<const T*>(w + i * stride)[c]);
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
DotTable make_table(DotTable::Groups groups = nullptr, DotTable::Interleave interleave = nullptr) {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  return {
      {dot_typed<V, float>, dot_typed<V, BFloat16>, dot_typed<V, Half>},
      {sum_rows_typed<V, float>, sum_rows_typed<V, BFloat16>, sum_rows_typed<V, Half>},
      {blocks_typed<V, float>, blocks_typed<V, BFloat16>, blocks_typed<V, Half>},
      {widen_typed<V, float>, widen_typed<V, BFloat16>, widen_typed<V, Half>},
      {narrow_typed<V, float>, narrow_typed<V, BFloat16>, narrow_typed<V, Half>},
      groups,
      interleave,
  };
}

}  // namespace
}  // namespace tinycomp
