// swsc_linear: products with centroids and with a low-rank correction; outputs gather theirs, or inputs are summed by
// cluster first.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

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
    const Tensor label = torch::stable::contiguous(labels);
    const int label_bytes = static_cast<int>(label.element_size());
    const Vector<T> scale(scales, scalar_type<T>, channels, "swsc_linear: scales");
    const Vector<T> shift(bias, scalar_type<T>, features, "swsc_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    const Between<T> z(x, inputs.rows, down.rows), sums(x, inputs.rows, axis == 0 ? shared.rows : shared.columns);
    Output<T> out = into(y, features, shift.data);
    if (axis == 0) {
      out.base = sums.data, out.base_stride = sums.stride;
      out.labels = label.const_data_ptr(), out.label_bytes = label_bytes, out.scales = scale.data;
      chain<T, true>(device, inputs.matrix(), inputs.rows, dense(shared), keep(sums), dense(down), keep(z), dense(up),
                     out);
      return y;
    }
    const Between<T> corrections(x, inputs.rows, features);
    chain<T, Dense<T>, Dense<T>>(device, inputs.matrix(), inputs.rows, dense(down), keep(z), dense(up),
                                 keep(corrections));
    const Storage one_hot{label.const_data_ptr(), nullptr,        nullptr,     scale.data, nullptr, 0,
                          shared.columns,         inputs.columns, label_bytes, 0,          0};
    out.base = corrections.data, out.base_stride = corrections.stride;
    chain<T, OneHot<T>, Dense<T>>(device, inputs.matrix(), inputs.rows, one_hot, keep(sums), dense(shared), out);
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(swsc_linear, swsc_linear)

}  // namespace tinycomp::cuda
#endif
