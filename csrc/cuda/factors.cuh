// A linear layer in two factors, for every way in which a factor may be stored: z = x rᵀ, then t zᵀ, written where
// `order` says. The ops name the kernels; this is what they have in common.
#pragma once

#include "config.h"
#include "gemm.cuh"

namespace tinycomp::cuda {

// Where the outputs of a product go: row i of the weight to column order[i] (or i), bias added.
template <class T>
struct Output {
  T* y;
  int64_t stride;
  const int* order;
  const T* bias;
  __device__ __forceinline__ void operator()(int m, int row, float value) const {
    const int at = order ? order[row] : row;
    y[m * stride + at] = from_float<T>(bias ? value + to_float(bias[at]) : value);
  }
};

// The first factor's outputs feed the second one; with an order they are outputs of the layer, too.
template <class T>
struct FirstOutput {
  T* z;
  int64_t z_stride;
  Output<T> kept;
  __device__ __forceinline__ void operator()(int m, int row, float value) const {
    const T rounded = from_float<T>(value);
    z[m * z_stride + row] = rounded;
    if (kept.order) kept(m, row, to_float(rounded));
  }
};

template <class T, int kTiles, class R, class F>
__device__ __forceinline__ void decode_factors(const R& r, const F& t, const Matrix<T>& x, int inputs,
                                               const FirstOutput<T>& first, const Output<T>& second,
                                               unsigned* counters) {
  constexpr int kRows = 8 * kTiles;
  run_stages<2>(counters, {(r.rows + kRows - 1) / kRows, (t.rows + kRows - 1) / kRows}, [&](int stage, int item) {
    if (stage == 0)
      decode_rows<T, kTiles>(r, x, inputs, item * kRows, first);
    else
      decode_rows<T, kTiles>(t, Matrix<T>{first.z, first.z_stride, true}, inputs, item * kRows, second);
  });
}

}  // namespace tinycomp::cuda
