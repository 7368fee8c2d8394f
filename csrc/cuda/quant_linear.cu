// quant_linear: int8 or int4 weights, rebuilt in registers on their way to the tensor cores; with rounded inputs,
// multiplied as integers.
#include "integer.cuh"

#if defined(TINYCOMP_TORCH)
#include "integer_host.cuh"

namespace tinycomp::cuda {

Tensor quant_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t bits, int64_t group_size, int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0 || activation_bits == 8, "quant_linear: activation_bits is not allowed");
  return with_float_type(x.scalar_type(), "quant_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "quant_linear: x");
    const RoundedWeight<T> w(qweight, scales, zeros, inputs.columns, bits, group_size, "quant_linear: qweight");
    const Vector<T> shift(bias, scalar_type<T>, w.storage.rows, "quant_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, w.storage.rows), scalar_type<T>);
    const Output<T> out = into(y, w.storage.rows, shift.data);
    const IntegerLayer<T> layers[kIntegerLayers] = {{w.storage, shift.data, out.y}};
    if (activation_bits == 8 && bits == 8)
      integer_products<T, 8>(device, x, inputs, layers, w.storage.rows, group_size);
    else if (activation_bits == 8)
      integer_products<T, 4>(device, x, inputs, layers, w.storage.rows, group_size);
    else if (bits == 8)
      product<T, Rounded<T, 8>>(device, inputs.matrix(), inputs.rows, w.storage, out);
    else
      product<T, Rounded<T, 4>>(device, inputs.matrix(), inputs.rows, w.storage, out);
    return y;
  });
}

TINYCOMP_SHARED_PRODUCT(, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_PRODUCT(, TINYCOMP_ROUNDED4)
TINYCOMP_SHARED_INTEGER(, float)
TINYCOMP_SHARED_INTEGER(, bf16)
TINYCOMP_SHARED_INTEGER(, f16)
TINYCOMP_CUDA_KERNEL(quant_linear, quant_linear)

}  // namespace tinycomp::cuda
#endif
