// sliced_linear: the upper left corner of a weight, read where it stands.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

Tensor sliced_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t in_features,
                     int64_t out_features) {
  return with_float_type(x.scalar_type(), "sliced_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "sliced_linear: x"), whole(w, -1, "sliced_linear: w");
    STD_TORCH_CHECK(w.dim() == 2 && 0 <= in_features && in_features <= inputs.columns && in_features <= whole.columns &&
                        0 <= out_features && out_features <= whole.rows,
                    "sliced_linear: a prefix is too long");
    const Vector<T> shift(bias, scalar_type<T>, whole.rows, "sliced_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, out_features), scalar_type<T>);
    Storage corner = dense(whole);
    corner.rows = static_cast<int>(out_features), corner.columns = static_cast<int>(in_features);
    product<T, Dense<T>>(device, inputs.matrix(), inputs.rows, corner, into(y, out_features, shift.data));
    return y;
  });
}

TINYCOMP_SHARED_PRODUCT(, TINYCOMP_DENSE)
TINYCOMP_CUDA_KERNEL(sliced_linear, sliced_linear)

}  // namespace tinycomp::cuda
#endif
