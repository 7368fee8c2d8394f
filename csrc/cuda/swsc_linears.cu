// swsc_linears: layers whose outputs share centroids, of one input; few inputs take one launch for all of them.
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
template <class T>
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
      decode_rows<T, 1>(Dense<T>{down ? layer.b : layer.c}, x, inputs, (down ? item - sums : item) * 8,
                        Output<T>{nullptr, 0, down ? layer.z : layer.sums, down ? layer.z_stride : layer.sums_stride,
                                  nullptr, nullptr, nullptr, 0, nullptr, 0, nullptr});
    } else {
      decode_rows<T, 1>(Dense<T>{layer.a}, Matrix<T>{layer.z, layer.z_stride, true}, inputs, item * 8,
                        Output<T>{layer.y, y_stride, nullptr, 0, nullptr, layer.bias, layer.sums, layer.sums_stride,
                                  layer.labels, layer.label_bytes, layer.scales});
    }
  });
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor swsc_linears(const Tensor& x, const Tensor& centroids1, const Tensor& labels1, const Tensor& b1,
                    const Tensor& a1, const Optional& scales1, const Optional& bias1, const Tensor& centroids2,
                    const Tensor& labels2, const Tensor& b2, const Tensor& a2, const Optional& scales2,
                    const Optional& bias2, const Optional& centroids3, const Optional& labels3, const Optional& b3,
                    const Optional& a3, const Optional& scales3, const Optional& bias3, int64_t axis) {
  STD_TORCH_CHECK(axis == 0, "swsc_linears: inputs that share centroids are not supported on the device");
  return with_float_type(x.scalar_type(), "swsc_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "swsc_linears: x");
    SharedLayer<T> layers[3] = {};
    std::vector<Tensor> held;
    int64_t features = 0, first = 0;
    const auto add = [&](SharedLayer<T>& layer, const Tensor& centroids, const Tensor& labels, const Tensor& b,
                         const Tensor& a, const Optional& scales, const Optional& bias) {
      const Rows<T> shared(centroids, inputs.columns, "swsc_linears: centroids"),
          down(b, inputs.columns, "swsc_linears: b"), up(a, down.rows, "swsc_linears: a");
      STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == up.rows, "swsc_linears: labels do not fit");
      const Tensor label = adjacent(labels);
      const Vector<T> scale(scales, scalar_type<T>, up.rows, "swsc_linears: scales"),
          shift(bias, scalar_type<T>, up.rows, "swsc_linears: bias");
      const Between<T> sums(device, x, inputs.rows, shared.rows), z(device, x, inputs.rows, down.rows);
      layer = {dense(shared),
               dense(down),
               dense(up),
               sums.data,
               sums.stride,
               z.data,
               z.stride,
               label.const_data_ptr(),
               static_cast<int>(label.element_size()),
               scale.data,
               shift.data,
               nullptr};
      held.insert(held.end(), {shared.tensor, down.tensor, up.tensor, label});
      for (const auto& tensor : {scale.tensor, shift.tensor, sums.tensor, z.tensor})
        if (tensor) held.push_back(*tensor);
      features += up.rows, first += shared.rows + down.rows;
    };
    add(layers[0], centroids1, labels1, b1, a1, scales1, bias1);
    add(layers[1], centroids2, labels2, b2, a2, scales2, bias2);
    STD_TORCH_CHECK(centroids3.has_value() == (labels3 && b3 && a3), "swsc_linears: the third layer is incomplete");
    if (centroids3) add(layers[2], *centroids3, *labels3, *b3, *a3, scales3, bias3);
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    T* to = static_cast<T*>(y.mutable_data_ptr());
    for (SharedLayer<T>& l : layers) l.y = to, to += l.a.rows;
    if (inputs.rows == 0 || features == 0) return y;
    const Config config =
        pick_config({{inputs.rows, inputs.columns, first}, {inputs.rows, first, features}}, device.processors);
    const auto& [a, b, c] = layers;
    if (config.decode) {
      // Items of 8 rows, whatever the configuration says of larger ones.
      const int64_t items = ceil_div(first, 8) + ceil_div(features, 8) + 9;
      const int64_t fit = 2 * static_cast<int64_t>(device.processors);
      TINYCOMP_LAUNCH((swsc_group_decode<T>), dim3(items < fit ? items : fit), dim3(kDecodeThreads),
                      decode_shared_bytes<1>, device.stream, TINYCOMP_PASS_INPUT(inputs.matrix()),
                      TINYCOMP_PASS_SHARED(a), TINYCOMP_PASS_SHARED(b), TINYCOMP_PASS_SHARED(c), features,
                      device.counters(), inputs.rows);
      device.check_launch();
      return y;
    }
    for (const SharedLayer<T>& l : layers) {
      const Output<T> sums{nullptr, 0, l.sums, l.sums_stride}, z{nullptr, 0, l.z, l.z_stride};
      product<T, Dense<T>>(device, inputs.matrix(), inputs.rows, l.c, sums);
      product<T, Dense<T>>(device, inputs.matrix(), inputs.rows, l.b, z);
      product<T, Dense<T>>(device, z.next(), inputs.rows, l.a,
                           Output<T>{l.y, features, nullptr, 0, nullptr, l.bias, l.sums, l.sums_stride, l.labels,
                                     l.label_bytes, l.scales});
    }
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(swsc_linears, swsc_linears)

}  // namespace tinycomp::cuda
#endif
