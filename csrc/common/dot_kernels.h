// The loops behind dot.h, written once against a vector type V. Each instruction set includes this file after defining
// TINYCOMP_TARGET (the function attribute that enables its instructions) and V.
//
// V has: Vec, width, max_rows (input rows per pass, so that accumulators stay in registers), zero(), fma(a, b, c),
// sum4(four vectors, out), sum(vector), load(const T*) widening T to float32, load_u4(bytes, low, high).

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "dot.h"
#include "dot_table.h"

namespace tinycomp {
namespace {

// Bytes between a load and the prefetch that goes with it, tried at 512, 1024 and 2048: weights of one byte or less
// keep the out-of-order window busy with few bytes, and gain from the longer distance.
constexpr int64_t kAhead = 512, kAheadNarrow = 2048;

template <class T>
TINYCOMP_TARGET inline float scalar(T v) {
  return static_cast<float>(v);
}

template <class V, class T, int R, int M>
TINYCOMP_TARGET void block(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* out,
                           int64_t ldo) {
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
      __builtin_prefetch(reinterpret_cast<const char*>(row[r] + c) + (sizeof(T) == 1 ? kAheadNarrow : kAhead));
    }
    for (int j = 0; j < M; ++j) {
      const Vec input = V::load(x + j * ldx + c);
      for (int r = 0; r < R; ++r) acc[j][r] = V::fma(v[r], input, acc[j][r]);
    }
  }
  for (int j = 0; j < M; ++j) {
    float total[4];
    if constexpr (R == 4) {
      V::sum4(acc[j][0], acc[j][1], acc[j][2], acc[j][3], total);
    } else {
      for (int r = 0; r < R; ++r) total[r] = V::sum(acc[j][r]);
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t i = c; i < cols; ++i) total[r] += scalar(row[r][i]) * x[j * ldx + i];
      out[j * ldo + r] = total[r];
    }
  }
}

template <class V, int R, int M>
TINYCOMP_TARGET void block_u4(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* out,
                              int64_t ldo) {
  using Vec = typename V::Vec;
  const int64_t bytes = (cols + 1) / 2;
  const uint8_t* row[R];
  for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const uint8_t*>(w + r * stride);
  Vec acc[M][R];
  for (int j = 0; j < M; ++j)
    for (int r = 0; r < R; ++r) acc[j][r] = V::zero();
  int64_t c = 0;
  for (; c + V::width <= bytes; c += V::width) {
    Vec low[R], high[R];
    for (int r = 0; r < R; ++r) {
      V::load_u4(row[r] + c, low[r], high[r]);
      __builtin_prefetch(row[r] + c + kAheadNarrow);
    }
    for (int j = 0; j < M; ++j) {
      const Vec even = V::load(x + j * ldx + c), odd = V::load(x + j * ldx + bytes + c);
      for (int r = 0; r < R; ++r) acc[j][r] = V::fma(high[r], odd, V::fma(low[r], even, acc[j][r]));
    }
  }
  for (int j = 0; j < M; ++j) {
    const float *even = x + j * ldx, *odd = even + bytes;
    for (int r = 0; r < R; ++r) {
      float total = V::sum(acc[j][r]);
      for (int64_t i = c; i < bytes; ++i) {
        total += static_cast<float>((row[r][i] & 15) - 8) * even[i];
        total += static_cast<float>((row[r][i] >> 4) - 8) * odd[i];
      }
      out[j * ldo + r] = total;
    }
  }
}

struct U4 {};

template <class V, class T, int R, int M>
TINYCOMP_TARGET void one(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* out,
                         int64_t ldo) {
  if constexpr (std::is_same_v<T, U4>) {
    block_u4<V, R, M>(w, stride, cols, x, ldx, out, ldo);
  } else {
    block<V, T, R, M>(w, stride, cols, x, ldx, out, ldo);
  }
}

// A block of R rows against all inputs: the block stays in cache while the inputs pass by.
template <class V, class T, int R>
TINYCOMP_TARGET void all_inputs(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, int64_t m,
                                float* out, int64_t ldo) {
  int64_t j = 0;
  if constexpr (V::max_rows >= 4)
    for (; j + 4 <= m; j += 4) one<V, T, R, 4>(w, stride, cols, x + j * ldx, ldx, out + j * ldo, ldo);
  for (; j + 2 <= m; j += 2) one<V, T, R, 2>(w, stride, cols, x + j * ldx, ldx, out + j * ldo, ldo);
  if (j < m) one<V, T, R, 1>(w, stride, cols, x + j * ldx, ldx, out + j * ldo, ldo);
}

template <class V, class T>
TINYCOMP_TARGET void dot_typed(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                               int64_t m, float* out, int64_t ldo) {
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

template <class V>
DotTable make_table() {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  return {
      {dot_typed<V, float>, dot_typed<V, BFloat16>, dot_typed<V, Half>, dot_typed<V, int8_t>, dot_typed<V, U4>},
      {widen_typed<V, float>, widen_typed<V, BFloat16>, widen_typed<V, Half>, widen_typed<V, int8_t>},
  };
}

}  // namespace
}  // namespace tinycomp
