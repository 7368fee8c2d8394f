// lowrank_linear: z = x rᵀ, then t zᵀ, written where `order` says.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

Tensor lowrank_linear(const Tensor& x, const Tensor& r, const Tensor& t, const std::optional<Tensor>& order,
                      const std::optional<Tensor>& bias) {
  return with_float_type(x.scalar_type(), "lowrank_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "lowrank_linear: x"), first(r, inputs.columns, "lowrank_linear: r"),
        second(t, first.rows, "lowrank_linear: t");
    const int64_t features = second.rows + (order ? first.rows : 0);
    const Vector<int> places(order, ScalarType::Int, features, "lowrank_linear: order");
    const Vector<T> shift(bias, scalar_type<T>, features, "lowrank_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    const Between<T> z(device, x, inputs.rows, first.rows);
    Output<T> p = order ? into(y, features, shift.data, places.data) : Output<T>{};
    p.kept = z.data, p.kept_stride = z.stride;
    const Output<T> q = into(y, features, shift.data, order ? places.data + first.rows : nullptr);
    chain<T, Dense<T>, Dense<T>>(device, inputs.matrix(), inputs.rows, dense(first), p, dense(second), q);
    return y;
  });
}

template void chain<float, Dense<float>, Dense<float>>(const Device&, const Matrix<float>&, int, const Storage&,
                                                       const Output<float>&, const Storage&, const Output<float>&);
template void chain<bf16, Dense<bf16>, Dense<bf16>>(const Device&, const Matrix<bf16>&, int, const Storage&,
                                                    const Output<bf16>&, const Storage&, const Output<bf16>&);
template void chain<f16, Dense<f16>, Dense<f16>>(const Device&, const Matrix<f16>&, int, const Storage&,
                                                 const Output<f16>&, const Storage&, const Output<f16>&);
TINYCOMP_CUDA_KERNEL(lowrank_linear, lowrank_linear)

}  // namespace tinycomp::cuda
#endif
