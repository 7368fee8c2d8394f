// swsc_linear: products with centroids and with a low-rank correction; outputs gather theirs, or inputs are summed by
// cluster first.
#include "linear.cuh"

namespace tinycomp::cuda {

// Two weights side by side, for inputs side by side: `right` begins at column `split`, a multiple of eight.
template <class T>
struct Beside {
  static constexpr bool kCopies = false;
  static constexpr int kEights = 1;
  using Cursor = NoCursor;
  using Run = Eight<T>;
  Dense<T> left, right;
  int split, rows, columns;
  __device__ __forceinline__ Cursor start(int, int) const { return {}; }
  __device__ __forceinline__ Run load(int row, int column, Cursor& cursor) const {
    const bool in_left = column < split;
    const Dense<T> side = in_left ? left : right;
    return side.load(row, in_left ? column : column - split, cursor);
  }
  __device__ __forceinline__ static const Run& next(const Run& run) { return run; }
};

// Input channels that share centroids: the sums of each cluster and b x, then centroids and a on both. The sums are
// padded to a multiple of eight by clusters that no input has: zeros. Registers in float32: see chain3_decode.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(T) == 4 ? 1 : 2)
    swsc_decode(TINYCOMP_INPUT(T), TINYCOMP_WEIGHT(l), TINYCOMP_WEIGHT(b), TINYCOMP_WEIGHT(c), TINYCOMP_WEIGHT(a),
                T* between, int64_t between_stride, T* y, int64_t y_stride, const T* bias, unsigned* counters,
                int inputs) {
  const OneHot<T> one_hot{TINYCOMP_WEIGHT_NAMES(l)};
  const Dense<T> down{TINYCOMP_WEIGHT_NAMES(b)}, centroids{TINYCOMP_WEIGHT_NAMES(c)}, up{TINYCOMP_WEIGHT_NAMES(a)};
  const Beside<T> both{centroids, up, one_hot.rows, up.rows, one_hot.rows + up.columns};
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  const int sums = items<T, 1>(one_hot.rows);
  run_stages<2>(counters, {sums + items<T, 1>(down.rows), items<T, 1>(both.rows)}, [&](int stage, int item) {
    if (stage == 1)
      decode_rows<T, 1>(both, Matrix<T>{between, between_stride, true}, inputs, item * 8,
                        Output<T>{y, y_stride, nullptr, 0, nullptr, bias, nullptr, 0, nullptr, 0, nullptr});
    else if (item < sums)
      decode_rows<T, 1>(
          one_hot, x, inputs, item * 8,
          Output<T>{nullptr, 0, between, between_stride, nullptr, nullptr, nullptr, 0, nullptr, 0, nullptr});
    else
      decode_rows<T, 1>(down, x, inputs, (item - sums) * 8,
                        Output<T>{nullptr, 0, between + one_hot.rows, between_stride, nullptr, nullptr, nullptr, 0,
                                  nullptr, 0, nullptr});
  });
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "shared_inputs.cuh"

namespace tinycomp::cuda {

// Input channels that share: one launch for few inputs, one for each product otherwise.
template <class T>
void shared_inputs(const Device& device, const Tensor& x, const Rows<T>& inputs, Storage one_hot, const Storage& down,
                   const Storage& centroids, const Storage& up, Output<T> out) {
  if (inputs.rows == 0 || up.rows == 0) return;
  const int clusters = (one_hot.rows + 7) / 8 * 8, both = clusters + down.rows;
  const Config config =
      pick_config({{inputs.rows, inputs.columns, both}, {inputs.rows, both, up.rows}}, device.processors);
  if (config.decode) {
    one_hot.rows = clusters;
    const Between<T> between(device, x, inputs.rows, both);
    TINYCOMP_LAUNCH((swsc_decode<T>), dim3(config.blocks), dim3(kDecodeThreads), decode_shared_bytes<1>, device.stream,
                    TINYCOMP_PASS_INPUT(inputs.matrix()), TINYCOMP_PASS_WEIGHT(one_hot), TINYCOMP_PASS_WEIGHT(down),
                    TINYCOMP_PASS_WEIGHT(centroids), TINYCOMP_PASS_WEIGHT(up), between.data, between.stride, out.y,
                    out.y_stride, out.bias, device.counters(), inputs.rows);
    return device.check_launch();
  }
  summed_products<T, Dense<T>>(device, x, inputs, one_hot, down, centroids, up, out);
}

Tensor swsc_linear(const Tensor& x, const Tensor& centroids, const Tensor& labels, const Tensor& b, const Tensor& a,
                   const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t axis) {
  return with_float_type(x.scalar_type(), "swsc_linear", [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK((axis == 0 || axis == 1) && labels.dim() == 1, "swsc_linear: axis or labels do not fit");
    const Device device(x);
    const Rows<T> inputs(x, -1, "swsc_linear: x"), down(b, inputs.columns, "swsc_linear: b"),
        up(a, down.rows, "swsc_linear: a"),
        shared(centroids, axis == 0 ? inputs.columns : centroids.size(1), "swsc_linear: centroids");
    const int64_t features = up.rows, channels = axis == 0 ? features : inputs.columns;
    STD_TORCH_CHECK(labels.size(0) == channels && (axis == 0 || shared.rows == features),
                    "swsc_linear: shape does not fit");
    const Tensor label = adjacent(labels);
    const int label_bytes = static_cast<int>(label.element_size());
    const Vector<T> scale(scales, scalar_type<T>, channels, "swsc_linear: scales");
    const Vector<T> shift(bias, scalar_type<T>, features, "swsc_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    Output<T> out = into(y, features, shift.data);
    if (axis == 0) {
      const Between<T> z(device, x, inputs.rows, down.rows), sums(device, x, inputs.rows, shared.rows);
      out.base = sums.data, out.base_stride = sums.stride;
      out.labels = label.const_data_ptr(), out.label_bytes = label_bytes, out.scales = scale.data;
      chain<T, true>(device, inputs.matrix(), inputs.rows, dense(shared), keep(sums), dense(down), keep(z), dense(up),
                     out);
    } else {
      const Storage one_hot{label.const_data_ptr(), nullptr,        nullptr,     scale.data, nullptr, 0,
                            shared.columns,         inputs.columns, label_bytes, 0,          0};
      shared_inputs(device, x, inputs, one_hot, dense(down), dense(shared), dense(up), out);
    }
    return y;
  });
}

TINYCOMP_SHARED_PRODUCT(, TINYCOMP_ONE_HOT)
TINYCOMP_CUDA_KERNEL(swsc_linear, swsc_linear)

}  // namespace tinycomp::cuda
#endif
