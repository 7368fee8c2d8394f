// Layers whose outputs share centroids, of one input: the kernel for few of them, and its launch.
#pragma once

#include "linear.cuh"

// One layer: centroids, b and a, where their products are kept, and what gathers them; see SharedLayer.
#define TINYCOMP_SHARED(l, T)                                                                                   \
  TINYCOMP_WEIGHT(l##_c), TINYCOMP_WEIGHT(l##_b), TINYCOMP_WEIGHT(l##_a), T *l##_sums, int64_t l##_sums_stride, \
      T *l##_z, int64_t l##_z_stride, const void *l##_labels, int l##_label_bytes, const T *l##_scales,         \
      const T *l##_bias, T *l##_y
#define TINYCOMP_SHARED_NAMES(l) \
  {TINYCOMP_WEIGHT_NAMES(l##_c), \
   TINYCOMP_WEIGHT_NAMES(l##_b), \
   TINYCOMP_WEIGHT_NAMES(l##_a), \
   l##_sums,                     \
   l##_sums_stride,              \
   l##_z,                        \
   l##_z_stride,                 \
   l##_labels,                   \
   l##_label_bytes,              \
   l##_scales,                   \
   l##_bias,                     \
   l##_y}
#define TINYCOMP_PASS_SHARED(l)                                                                                \
  TINYCOMP_PASS_WEIGHT(l.c), TINYCOMP_PASS_WEIGHT(l.b), TINYCOMP_PASS_WEIGHT(l.a), l.sums, l.sums_stride, l.z, \
      l.z_stride, l.labels, l.label_bytes, l.scales, l.bias, l.y

namespace tinycomp::cuda {

// y_i = scales_i (c x)[labels_i] + a_i (b x) + bias_i. A layer that is not there has no rows.
template <class T>
struct SharedLayer {
  Storage c, b, a;
  T* sums;
  int64_t sums_stride;
  T* z;
  int64_t z_stride;
  const void* labels;
  int label_bytes;
  const T *scales, *bias;
  T* y;
};

// All centroids and b of a group, then all a, as in group_decode. Registers in float32: see chain3_decode.
template <class T, class W>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(T) == 4 ? 1 : 2)
    swsc_group_decode(TINYCOMP_INPUT(T), TINYCOMP_SHARED(a, T), TINYCOMP_SHARED(b, T), TINYCOMP_SHARED(c, T),
                      int64_t y_stride, unsigned* counters, int inputs) {
  const SharedLayer<T> a TINYCOMP_SHARED_NAMES(a), b TINYCOMP_SHARED_NAMES(b), c TINYCOMP_SHARED_NAMES(c);
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  const int a_first = items<T, 1>(a.c.rows) + items<T, 1>(a.b.rows),
            b_first = items<T, 1>(b.c.rows) + items<T, 1>(b.b.rows),
            c_first = items<T, 1>(c.c.rows) + items<T, 1>(c.b.rows), a_last = items<T, 1>(a.a.rows),
            b_last = items<T, 1>(b.a.rows), c_last = items<T, 1>(c.a.rows);
  run_stages<2>(counters, {a_first + b_first + c_first, a_last + b_last + c_last}, [&](int stage, int item) {
    const int in_a = stage ? a_last : a_first, in_b = stage ? b_last : b_first;
    const int which = (item >= in_a) + (item >= in_a + in_b);
    item -= which == 0 ? 0 : which == 1 ? in_a : in_a + in_b;
    const SharedLayer<T> layer = which == 0 ? a : which == 1 ? b : c;
    if (stage == 0) {
      const int sums = items<T, 1>(layer.c.rows);
      const bool down = item >= sums;
      decode_rows<T, 1>(W{down ? layer.b : layer.c}, x, inputs, (down ? item - sums : item) * 8,
                        Output<T>{nullptr, 0, down ? layer.z : layer.sums, down ? layer.z_stride : layer.sums_stride,
                                  nullptr, nullptr, nullptr, 0, nullptr, 0, nullptr});
    } else {
      decode_rows<T, 1>(W{layer.a}, Matrix<T>{layer.z, layer.z_stride, true}, inputs, item * 8,
                        Output<T>{layer.y, y_stride, nullptr, 0, nullptr, layer.bias, layer.sums, layer.sums_stride,
                                  layer.labels, layer.label_bytes, layer.scales});
    }
  });
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

// The layers of a call, with the tensors that hold what their pointers point to.
template <class T>
struct SharedGroup {
  const Device& device;
  const Tensor& x;
  const Rows<T> inputs;
  SharedLayer<T> layers[3] = {};
  std::vector<Tensor> held;
  int64_t features = 0, first = 0;  // rows of the last products, and of those that read x

  SharedGroup(const Device& device, const Tensor& x) : device(device), x(x), inputs(x, -1, "x") {}

  void hold(const std::optional<Tensor>& tensor) {
    if (tensor) held.push_back(*tensor);
  }
  void hold(const RoundedWeight<T>& w) { hold(w.levels.tensor), hold(w.scales.tensor), hold(w.zeros.tensor); }
  void add(int at, const Storage& centroids, const Storage& down, const Storage& up, const Tensor& labels,
           const std::optional<Tensor>& scales, const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == up.rows, "labels do not fit");
    const Tensor label = adjacent(labels);
    const Vector<T> scale(scales, scalar_type<T>, up.rows, "scales"), shift(bias, scalar_type<T>, up.rows, "bias");
    const Between<T> sums(device, x, inputs.rows, centroids.rows), z(device, x, inputs.rows, down.rows);
    layers[at] = {centroids,
                  down,
                  up,
                  sums.data,
                  sums.stride,
                  z.data,
                  z.stride,
                  label.const_data_ptr(),
                  static_cast<int>(label.element_size()),
                  scale.data,
                  shift.data,
                  nullptr};
    hold(label), hold(scale.tensor), hold(shift.tensor), hold(sums.tensor), hold(z.tensor);
    features += up.rows, first += centroids.rows + down.rows;
  }
  // One launch for few inputs, otherwise one for each product.
  template <class W>
  Tensor run() {
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    T* to = static_cast<T*>(y.mutable_data_ptr());
    for (SharedLayer<T>& l : layers) l.y = to, to += l.a.rows;
    if (inputs.rows == 0 || features == 0) return y;
    if (inputs.rows <= kDecodeRows) {
      const int64_t items = ceil_div(first, 8) + ceil_div(features, 8) + 9;  // of every product one may be incomplete
      const int64_t fit = 2 * static_cast<int64_t>(device.processors);
      const auto& [a, b, c] = layers;
      TINYCOMP_LAUNCH((swsc_group_decode<T, W>), dim3(items < fit ? items : fit), dim3(kDecodeThreads),
                      decode_shared_bytes<1>, device.stream, TINYCOMP_PASS_INPUT(inputs.matrix()),
                      TINYCOMP_PASS_SHARED(a), TINYCOMP_PASS_SHARED(b), TINYCOMP_PASS_SHARED(c), features,
                      device.counters(), inputs.rows);
      device.check_launch();
      return y;
    }
    for (const SharedLayer<T>& l : layers) {
      const Output<T> sums{nullptr, 0, l.sums, l.sums_stride}, z{nullptr, 0, l.z, l.z_stride};
      product<T, W>(device, inputs.matrix(), inputs.rows, l.c, sums);
      product<T, W>(device, inputs.matrix(), inputs.rows, l.b, z);
      product<T, W>(device, z.next(), inputs.rows, l.a,
                    Output<T>{l.y, features, nullptr, 0, nullptr, l.bias, l.sums, l.sums_stride, l.labels,
                              l.label_bytes, l.scales});
    }
    return y;
  }
};

}  // namespace tinycomp::cuda
#endif
