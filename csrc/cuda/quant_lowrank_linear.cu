// quant_lowrank_linear: lowrank_linear on factors rounded to int8 or int4, rebuilt in registers.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

Tensor quant_lowrank_linear(const Tensor& x, const Tensor& r, const Tensor& r_scales, const Tensor& t,
                            const Tensor& t_scales, const std::optional<Tensor>& order,
                            const std::optional<Tensor>& r_zeros, const std::optional<Tensor>& t_zeros,
                            const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                            int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0, "quant_lowrank_linear: activations are not rounded on the device");
  return with_float_type(x.scalar_type(), "quant_lowrank_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "quant_lowrank_linear: x");
    const RoundedWeight<T> first(r, r_scales, r_zeros, inputs.columns, bits, group_size, "quant_lowrank_linear: r"),
        second(t, t_scales, t_zeros, r.size(0), bits, group_size, "quant_lowrank_linear: t");
    const Storage &a = first.storage, &b = second.storage;
    const int64_t features = b.rows + (order ? a.rows : 0);
    const Vector<int> places(order, ScalarType::Int, features, "quant_lowrank_linear: order");
    const Vector<T> shift(bias, scalar_type<T>, features, "quant_lowrank_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    const Between<T> z(device, x, inputs.rows, a.rows);
    Output<T> p = order ? into(y, features, shift.data, places.data) : Output<T>{};
    p.kept = z.data, p.kept_stride = z.stride;
    const Output<T> q = into(y, features, shift.data, order ? places.data + a.rows : nullptr);
    if (bits == 8)
      chain<T, Rounded<T, 8>, Rounded<T, 8>>(device, inputs.matrix(), inputs.rows, a, p, b, q);
    else
      chain<T, Rounded<T, 4>, Rounded<T, 4>>(device, inputs.matrix(), inputs.rows, a, p, b, q);
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(quant_lowrank_linear, quant_lowrank_linear)

}  // namespace tinycomp::cuda
#endif
