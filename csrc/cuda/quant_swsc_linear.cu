// quant_swsc_linear: swsc_linear on centroids and factors rounded to int8 or int4, rebuilt in registers.
#include "shared_group.cuh"

#if defined(TINYCOMP_TORCH)

namespace tinycomp::cuda {

Tensor quant_swsc_linear(const Tensor& x, const Tensor& centroids, const Tensor& centroid_scales, const Tensor& labels,
                         const Tensor& b, const Tensor& b_scales, const Tensor& a, const Tensor& a_scales,
                         const std::optional<Tensor>& centroid_zeros, const std::optional<Tensor>& b_zeros,
                         const std::optional<Tensor>& a_zeros, const std::optional<Tensor>& scales,
                         const std::optional<Tensor>& bias, int64_t axis, int64_t bits, int64_t group_size,
                         int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0, "quant_swsc_linear: activations are not rounded on the device");
  STD_TORCH_CHECK(axis == 0 || axis == 1, "quant_swsc_linear: axis does not fit");
  return with_float_type(x.scalar_type(), "quant_swsc_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "quant_swsc_linear: x");
    const RoundedWeight<T> shared(centroids, centroid_scales, centroid_zeros,
                                  axis ? columns_of(centroids, bits) : inputs.columns, bits, group_size,
                                  "quant_swsc_linear: centroids"),
        down(b, b_scales, b_zeros, inputs.columns, bits, group_size, "quant_swsc_linear: b"),
        up(a, a_scales, a_zeros, down.storage.rows, bits, group_size, "quant_swsc_linear: a");
    if (axis == 1) {
      SharedGroup<T, 1> group(device, x);
      group.add(0, shared.storage, down.storage, up.storage, labels, scales, bias);
      return bits == 8 ? group.template run<Rounded<T, 8>>() : group.template run<Rounded<T, 4>>();
    }
    const int64_t features = up.storage.rows;
    STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == features, "quant_swsc_linear: labels do not fit");
    const Tensor label = adjacent(labels);
    const Vector<T> scale(scales, scalar_type<T>, features, "quant_swsc_linear: scales");
    const Vector<T> shift(bias, scalar_type<T>, features, "quant_swsc_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    const Between<T> z(device, x, inputs.rows, down.storage.rows), sums(device, x, inputs.rows, shared.storage.rows);
    Output<T> out = into(y, features, shift.data);
    out.base = sums.data, out.base_stride = sums.stride;
    out.labels = label.const_data_ptr(), out.label_bytes = static_cast<int>(label.element_size());
    out.scales = scale.data;
    const auto run = [&](auto storage) {
      chain<T, true, decltype(storage)>(device, inputs.matrix(), inputs.rows, shared.storage, keep(sums), down.storage,
                                        keep(z), up.storage, out);
    };
    bits == 8 ? run(Rounded<T, 8>{}) : run(Rounded<T, 4>{});
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(quant_swsc_linear, quant_swsc_linear)

}  // namespace tinycomp::cuda
#endif
