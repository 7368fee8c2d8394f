// masked_linear: packed sparse weights, unpacked in registers on their way to the tensor cores.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "masked.cuh"

namespace tinycomp::cuda {

Tensor masked_linear(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t out_features,
                     std::string format, int64_t value_bits) {
  return with_float_type(x.scalar_type(), "masked_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "masked_linear: x");
    const PackedWeight<T> w(values, mask, offsets, scales, out_features, inputs.columns, format, value_bits);
    const Vector<T> shift(bias, scalar_type<T>, out_features, "masked_linear: bias");
    return with_format<T>(format, value_bits, [&](auto reader) {
      const Tensor y = empty(x, shape_with_last(x, out_features), scalar_type<T>);
      product<T, decltype(reader)>(device, inputs.matrix(), inputs.rows, w.storage, into(y, out_features, shift.data));
      return y;
    });
  });
}

TINYCOMP_SHARED_FORMATS(, float)
TINYCOMP_SHARED_FORMATS(, bf16)
TINYCOMP_SHARED_FORMATS(, f16)
TINYCOMP_CUDA_KERNEL(masked_linear, masked_linear)

}  // namespace tinycomp::cuda
#endif
