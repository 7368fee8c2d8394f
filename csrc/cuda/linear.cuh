// The kernels of the linear layers, for every storage of a weight: one product, and two or three in a chain.
#pragma once

#include "gemm.cuh"

// Where the outputs of a product go; see Output.
#define TINYCOMP_OUTPUT(o, T)                                                                                    \
  T *o##_y, int64_t o##_y_stride, T *o##_kept, int64_t o##_kept_stride, const int *o##_order, const T *o##_bias, \
      const T *o##_base, int64_t o##_base_stride, const void *o##_labels, int o##_label_bytes, const T *o##_scales
#define TINYCOMP_OUTPUT_NAMES(o)                                                \
  {o##_y,    o##_y_stride,    o##_kept,   o##_kept_stride, o##_order, o##_bias, \
   o##_base, o##_base_stride, o##_labels, o##_label_bytes, o##_scales}
// One layer of a group: its two factors, where z = x rᵀ is kept, its order, bias and outputs; see GroupLayer.
#define TINYCOMP_LAYER(l, T)                                                                            \
  TINYCOMP_WEIGHT(l##_r), TINYCOMP_WEIGHT(l##_t), T *l##_z, int64_t l##_z_stride, const int *l##_order, \
      const T *l##_bias, T *l##_y
#define TINYCOMP_LAYER_NAMES(l) \
  {TINYCOMP_WEIGHT_NAMES(l##_r), TINYCOMP_WEIGHT_NAMES(l##_t), l##_z, l##_z_stride, l##_order, l##_bias, l##_y}
#define TINYCOMP_INPUT(T) const T *x_data, int64_t x_stride, int x_vector
#define TINYCOMP_INPUT_NAMES {x_data, x_stride, x_vector != 0}

namespace tinycomp::cuda {

// Output i of a product: y[order[i]] = value + scales[i] base[labels[i]] + bias, kept[i] = value. Absent parts are
// null: without an order or labels, i itself.
template <class T>
struct Output {
  T* y;
  int64_t y_stride;
  T* kept;
  int64_t kept_stride;
  const int* order;
  const T* bias;
  const T* base;
  int64_t base_stride;
  const void* labels;
  int label_bytes;
  const T* scales;

  __device__ __forceinline__ void operator()(int m, int row, float value) const {
    if (kept) {
      const T rounded = from_float<T>(value);
      kept[m * kept_stride + row] = rounded;
      value = to_float(rounded);
    }
    if (!y) return;
    if (base) {
      const float shared = to_float(base[m * base_stride + (labels ? label_at(labels, label_bytes, row) : row)]);
      value += scales ? shared * to_float(scales[row]) : shared;
    }
    const int at = order ? order[row] : row;
    y[m * y_stride + at] = from_float<T>(bias ? value + to_float(bias[at]) : value);
  }
  // What it kept, as the input of the next product.
  __host__ __device__ __forceinline__ Matrix<T> next() const { return {kept, kept_stride, true}; }
};

template <class T, int kTiles>
__device__ __forceinline__ int items(int rows) {
  return (rows + 8 * kTiles - 1) / (8 * kTiles);
}

template <class T, class W, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    product_decode(TINYCOMP_INPUT(T), TINYCOMP_WEIGHT(w), TINYCOMP_OUTPUT(o, T), int inputs) {
  const W weight{TINYCOMP_WEIGHT_NAMES(w)};
  const Output<T> out TINYCOMP_OUTPUT_NAMES(o);
  decode_rows<T, kTiles>(weight, Matrix<T> TINYCOMP_INPUT_NAMES, inputs, blockIdx.x * 8 * kTiles, out);
}

template <class T, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    product_tiles(TINYCOMP_INPUT(T), TINYCOMP_WEIGHT(w), TINYCOMP_OUTPUT(o, T), int inputs) {
  const W weight{TINYCOMP_WEIGHT_NAMES(w)};
  const Output<T> out TINYCOMP_OUTPUT_NAMES(o);
  gemm_tile<T, Tile>(weight, Matrix<T> TINYCOMP_INPUT_NAMES, inputs, out);
}

// a x, then b (a x).
template <class T, class A, class B, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    chain2_decode(TINYCOMP_INPUT(T), TINYCOMP_WEIGHT(a), TINYCOMP_OUTPUT(p, T), TINYCOMP_WEIGHT(b),
                  TINYCOMP_OUTPUT(q, T), unsigned* counters, int inputs) {
  const A first{TINYCOMP_WEIGHT_NAMES(a)};
  const B second{TINYCOMP_WEIGHT_NAMES(b)};
  const Output<T> out_first TINYCOMP_OUTPUT_NAMES(p), out_second TINYCOMP_OUTPUT_NAMES(q);
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  run_stages<2>(counters, {items<T, kTiles>(first.rows), items<T, kTiles>(second.rows)}, [&](int stage, int item) {
    if (stage == 0)
      decode_rows<T, kTiles>(first, x, inputs, item * 8 * kTiles, out_first);
    else
      decode_rows<T, kTiles>(second, out_first.next(), inputs, item * 8 * kTiles, out_second);
  });
}

// A layer among those that share an input: t (r x), with an order both factors' products are outputs, without a z t x
// alone. A layer that is not there has no rows.
template <class T>
struct GroupLayer {
  Storage r, t;
  T* z;
  int64_t z_stride;
  const int* order;
  const T* bias;
  T* y;
};

// All r of a group, then all t. The layer of an item is picked by value: parameters cannot be indexed.
template <class T, class W, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    group_decode(TINYCOMP_INPUT(T), TINYCOMP_LAYER(a, T), TINYCOMP_LAYER(b, T), TINYCOMP_LAYER(c, T), int64_t y_stride,
                 unsigned* counters, int inputs) {
  const GroupLayer<T> a TINYCOMP_LAYER_NAMES(a), b TINYCOMP_LAYER_NAMES(b), c TINYCOMP_LAYER_NAMES(c);
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  const int a_r = items<T, kTiles>(a.r.rows), b_r = items<T, kTiles>(b.r.rows), c_r = items<T, kTiles>(c.r.rows),
            a_t = items<T, kTiles>(a.t.rows), b_t = items<T, kTiles>(b.t.rows), c_t = items<T, kTiles>(c.t.rows);
  run_stages<2>(counters, {a_r + b_r + c_r, a_t + b_t + c_t}, [&](int stage, int item) {
    const int in_a = stage ? a_t : a_r, in_b = stage ? b_t : b_r;
    const int which = (item >= in_a) + (item >= in_a + in_b);
    item -= which == 0 ? 0 : which == 1 ? in_a : in_a + in_b;
    const GroupLayer<T> layer = which == 0 ? a : which == 1 ? b : c;
    if (stage == 0)
      decode_rows<T, kTiles>(W{layer.r}, x, inputs, item * 8 * kTiles,
                             Output<T>{layer.order ? layer.y : nullptr, y_stride, layer.z, layer.z_stride, layer.order,
                                       layer.bias, nullptr, 0, nullptr, 0, nullptr});
    else
      decode_rows<T, kTiles>(
          W{layer.t}, layer.z ? Matrix<T>{layer.z, layer.z_stride, true} : x, inputs, item * 8 * kTiles,
          Output<T>{layer.y, y_stride, nullptr, 0, layer.order ? layer.order + layer.r.rows : nullptr, layer.bias,
                    nullptr, 0, nullptr, 0, nullptr});
  });
}

// c (b (a x)); with kForked, a and b both read x, and c the outputs of b (SWSC's correction). In float32, three stages
// take more registers than two blocks have.
template <class T, class A, class B, class C, bool kForked, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(T) == 4 ? 1 : 2)
    chain3_decode(TINYCOMP_INPUT(T), TINYCOMP_WEIGHT(a), TINYCOMP_OUTPUT(p, T), TINYCOMP_WEIGHT(b),
                  TINYCOMP_OUTPUT(q, T), TINYCOMP_WEIGHT(c), TINYCOMP_OUTPUT(o, T), unsigned* counters, int inputs) {
  const A first{TINYCOMP_WEIGHT_NAMES(a)};
  const B second{TINYCOMP_WEIGHT_NAMES(b)};
  const C third{TINYCOMP_WEIGHT_NAMES(c)};
  const Output<T> out_first TINYCOMP_OUTPUT_NAMES(p), out_second TINYCOMP_OUTPUT_NAMES(q), out TINYCOMP_OUTPUT_NAMES(o);
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  const int on_first = items<T, kTiles>(first.rows), on_second = items<T, kTiles>(second.rows),
            on_third = items<T, kTiles>(third.rows);
  const auto run_first = [&](int item) { decode_rows<T, kTiles>(first, x, inputs, item * 8 * kTiles, out_first); };
  const auto run_third = [&](int item) {
    decode_rows<T, kTiles>(third, out_second.next(), inputs, item * 8 * kTiles, out);
  };
  if constexpr (kForked) {
    run_stages<2>(counters, {on_first + on_second, on_third}, [&](int stage, int item) {
      if (stage == 1)
        run_third(item);
      else if (item < on_first)
        run_first(item);
      else
        decode_rows<T, kTiles>(second, x, inputs, (item - on_first) * 8 * kTiles, out_second);
    });
  } else {
    run_stages<3>(counters, {on_first, on_second, on_third}, [&](int stage, int item) {
      if (stage == 0)
        run_first(item);
      else if (stage == 1)
        decode_rows<T, kTiles>(second, out_first.next(), inputs, item * 8 * kTiles, out_second);
      else
        run_third(item);
    });
  }
}

}  // namespace tinycomp::cuda
