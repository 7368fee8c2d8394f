// Layers whose channels share centroids, one or several of one input: the kernel for few inputs, and the launches.
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

// Outputs share (axis 0): y_i = scales_i sums[labels_i] + a_i (b x) + bias_i with sums = c x.
// Inputs share (axis 1): y = c sums + a (b x) + bias with sums_j = the sum of scales_k x_k over labels_k = j.
// A layer that is not there has no rows.
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

  // A weight with which x is summed by label.
  __host__ __device__ __forceinline__ Storage one_hot() const {
    return {labels, nullptr, nullptr, scales, nullptr, 0, c.columns, b.columns, label_bytes, 0, 0};
  }
  template <int kAxis>
  __host__ __device__ __forceinline__ int sums_of() const {
    return kAxis ? c.columns : c.rows;
  }
};

// All sums and b of a group, then all outputs, as in group_decode. In float32, or with rounded weights beside labels,
// it takes more registers than two blocks have.
template <class T, class W, int kAxis>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(T) == 4 || (kAxis == 1 && !W::kCopies) ? 1 : 2)
    swsc_group_decode(TINYCOMP_INPUT(T), TINYCOMP_SHARED(a, T), TINYCOMP_SHARED(b, T), TINYCOMP_SHARED(c, T),
                      int64_t y_stride, unsigned* counters, int inputs) {
  const SharedLayer<T> a TINYCOMP_SHARED_NAMES(a), b TINYCOMP_SHARED_NAMES(b), c TINYCOMP_SHARED_NAMES(c);
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  const auto first_of = [](const SharedLayer<T>& l) {
    return items<T, 1>(l.template sums_of<kAxis>()) + items<T, 1>(l.b.rows);
  };
  const int a_first = first_of(a), b_first = first_of(b), c_first = first_of(c), a_last = items<T, 1>(a.a.rows),
            b_last = items<T, 1>(b.a.rows), c_last = items<T, 1>(c.a.rows);
  run_stages<2>(counters, {a_first + b_first + c_first, a_last + b_last + c_last}, [&](int stage, int item) {
    const int in_a = stage ? a_last : a_first, in_b = stage ? b_last : b_first;
    const int which = (item >= in_a) + (item >= in_a + in_b);
    item -= which == 0 ? 0 : which == 1 ? in_a : in_a + in_b;
    const SharedLayer<T> layer = which == 0 ? a : which == 1 ? b : c;
    const Matrix<T> z{layer.z, layer.z_stride, true};
    if (stage == 0) {
      const int sums = items<T, 1>(layer.template sums_of<kAxis>());
      const bool down = item >= sums;
      const int row = (down ? item - sums : item) * 8;
      const Output<T> to{nullptr,
                         0,
                         down ? layer.z : layer.sums,
                         down ? layer.z_stride : layer.sums_stride,
                         nullptr,
                         nullptr,
                         nullptr,
                         0,
                         nullptr,
                         0,
                         nullptr};
      if constexpr (kAxis == 0)
        decode_rows<T, 1>(W{down ? layer.b : layer.c}, x, inputs, row, to);
      else if (down)
        decode_rows<T, 1>(W{layer.b}, x, inputs, row, to);
      else
        decode_rows<T, 1>(OneHot<T>{layer.one_hot()}, x, inputs, row, to);
    } else if constexpr (kAxis == 0) {
      decode_rows<T, 1>(W{layer.a}, z, inputs, item * 8,
                        Output<T>{layer.y, y_stride, nullptr, 0, nullptr, layer.bias, layer.sums, layer.sums_stride,
                                  layer.labels, layer.label_bytes, layer.scales});
    } else {
      // One product after the other, by one piece of code; a thread adds to the numbers that it has written itself.
#pragma unroll 1
      for (int i = 0; i < 2; ++i)
        decode_rows<T, 1>(W{i ? layer.a : layer.c}, i ? z : Matrix<T>{layer.sums, layer.sums_stride, true}, inputs,
                          item * 8,
                          Output<T>{layer.y, y_stride, nullptr, 0, nullptr, i ? layer.bias : nullptr,
                                    i ? layer.y : nullptr, y_stride, nullptr, 0, nullptr});
    }
  });
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

// Clusters of centroids rounded by row. Of packed ones the last may be one that no label names, whose sum is zero.
inline int64_t columns_of(const Tensor& centroids, int64_t bits) {
  return centroids.dim() == 2 ? centroids.size(1) * (bits == 4 ? 2 : 1) : 0;
}

#define TINYCOMP_ONE_HOT(T) OneHot<T>
TINYCOMP_SHARED_PRODUCT(extern, TINYCOMP_ONE_HOT)

// The layers of a call, with the tensors that hold what their pointers point to.
template <class T, int kAxis>
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
    const int channels = kAxis ? inputs.columns : up.rows;
    STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == channels && (!kAxis || centroids.rows == up.rows),
                    "labels or centroids do not fit");
    const Tensor label = adjacent(labels);
    const Vector<T> scale(scales, scalar_type<T>, channels, "scales"), shift(bias, scalar_type<T>, up.rows, "bias");
    SharedLayer<T>& layer = layers[at];
    layer = {centroids,
             down,
             up,
             nullptr,
             0,
             nullptr,
             0,
             label.const_data_ptr(),
             static_cast<int>(label.element_size()),
             scale.data,
             shift.data,
             nullptr};
    const int clusters = layer.template sums_of<kAxis>();
    const Between<T> sums(device, x, inputs.rows, clusters), z(device, x, inputs.rows, down.rows);
    layer.sums = sums.data, layer.sums_stride = sums.stride, layer.z = z.data, layer.z_stride = z.stride;
    hold(label), hold(scale.tensor), hold(shift.tensor), hold(sums.tensor), hold(z.tensor);
    features += up.rows, first += clusters + down.rows;
  }
  // One launch for few inputs, otherwise one for each product. Defined below, for what is inline is compiled
  // everywhere.
  template <class W>
  Tensor run();
};

template <class T, int kAxis>
template <class W>
Tensor SharedGroup<T, kAxis>::run() {
  const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
  T* to = static_cast<T*>(y.mutable_data_ptr());
  for (SharedLayer<T>& l : layers) l.y = to, to += l.a.rows;
  if (inputs.rows == 0 || features == 0) return y;
  if (inputs.rows <= kDecodeRows) {
    const int64_t items = ceil_div(first, 8) + ceil_div(features, 8) + 9;  // of every product one may be incomplete
    const int64_t fit = 2 * static_cast<int64_t>(device.processors);
    const auto& [a, b, c] = layers;
    TINYCOMP_LAUNCH((swsc_group_decode<T, W, kAxis>), dim3(items < fit ? items : fit), dim3(kDecodeThreads),
                    decode_shared_bytes<1>, device.stream, TINYCOMP_PASS_INPUT(inputs.matrix()),
                    TINYCOMP_PASS_SHARED(a), TINYCOMP_PASS_SHARED(b), TINYCOMP_PASS_SHARED(c), features,
                    device.counters(), inputs.rows);
    device.check_launch();
    return y;
  }
  for (const SharedLayer<T>& l : layers) {
    const Output<T> sums{nullptr, 0, l.sums, l.sums_stride}, z{nullptr, 0, l.z, l.z_stride};
    product<T, W>(device, inputs.matrix(), inputs.rows, l.b, z);
    if constexpr (kAxis == 0) {
      product<T, W>(device, inputs.matrix(), inputs.rows, l.c, sums);
      product<T, W>(device, z.next(), inputs.rows, l.a,
                    Output<T>{l.y, features, nullptr, 0, nullptr, l.bias, l.sums, l.sums_stride, l.labels,
                              l.label_bytes, l.scales});
    } else {
      product<T, OneHot<T>>(device, inputs.matrix(), inputs.rows, l.one_hot(), sums);
      product<T, W>(device, sums.next(), inputs.rows, l.c, Output<T>{l.y, features});
      product<T, W>(device, z.next(), inputs.rows, l.a,
                    Output<T>{l.y, features, nullptr, 0, nullptr, l.bias, l.y, features});
    }
  }
  return y;
}

// Layers whose inputs share, alone or not, are compiled once: in the file of the group.
#define TINYCOMP_SHARED_INPUTS(declared, W)                        \
  declared template Tensor SharedGroup<float, 1>::run<W(float)>(); \
  declared template Tensor SharedGroup<bf16, 1>::run<W(bf16)>();   \
  declared template Tensor SharedGroup<f16, 1>::run<W(f16)>();
TINYCOMP_SHARED_INPUTS(extern, TINYCOMP_DENSE)
TINYCOMP_SHARED_INPUTS(extern, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_INPUTS(extern, TINYCOMP_ROUNDED4)

}  // namespace tinycomp::cuda
#endif
