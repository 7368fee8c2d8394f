// swsc_linear: products with centroids and with a low-rank correction; outputs gather theirs, or inputs are summed by
// cluster first: a group of one layer.
#include "shared_group.cuh"

#if defined(TINYCOMP_TORCH)

namespace tinycomp::cuda {

Tensor swsc_linear(const Tensor& x, const Tensor& centroids, const Tensor& labels, const Tensor& b, const Tensor& a,
                   const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t axis) {
  return with_float_type(x.scalar_type(), "swsc_linear", [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(axis == 0 || axis == 1, "swsc_linear: axis does not fit");
    const Device device(x);
    const Rows<T> inputs(x, -1, "swsc_linear: x"), down(b, inputs.columns, "swsc_linear: b"),
        up(a, down.rows, "swsc_linear: a"),
        shared(centroids, axis == 0 ? inputs.columns : centroids.size(1), "swsc_linear: centroids");
    const int64_t features = up.rows;
    if (axis == 1) {
      SharedGroup<T, 1> group(device, x);
      group.add(0, dense(shared), dense(down), dense(up), labels, scales, bias);
      return group.template run<Dense<T>>();
    }
    STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == features, "swsc_linear: labels do not fit");
    const Tensor label = adjacent(labels);
    const Vector<T> scale(scales, scalar_type<T>, features, "swsc_linear: scales");
    const Vector<T> shift(bias, scalar_type<T>, features, "swsc_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    Output<T> out = into(y, features, shift.data);
    const Between<T> z(device, x, inputs.rows, down.rows), sums(device, x, inputs.rows, shared.rows);
    out.base = sums.data, out.base_stride = sums.stride;
    out.labels = label.const_data_ptr(), out.label_bytes = static_cast<int>(label.element_size());
    out.scales = scale.data;
    chain<T, true>(device, inputs.matrix(), inputs.rows, dense(shared), keep(sums), dense(down), keep(z), dense(up),
                   out);
    return y;
  });
}

TINYCOMP_SHARED_PRODUCT(, TINYCOMP_ONE_HOT)
TINYCOMP_CUDA_KERNEL(swsc_linear, swsc_linear)

}  // namespace tinycomp::cuda
#endif
