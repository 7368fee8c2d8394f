// quant_linears: rounded layers that share their input; few inputs take one launch for all of them.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "group.cuh"
#include "integer_host.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor quant_linears(const Tensor& x, const Tensor& qweight1, const Tensor& scales1, const Optional& zeros1,
                     const Optional& bias1, const Tensor& qweight2, const Tensor& scales2, const Optional& zeros2,
                     const Optional& bias2, const Optional& qweight3, const Optional& scales3, const Optional& zeros3,
                     const Optional& bias3, int64_t bits, int64_t group_size, int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0 || activation_bits == 8, "quant_linears: activation_bits is not allowed");
  return with_float_type(x.scalar_type(), "quant_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "quant_linears: x");
    Group<T> group;
    const auto add = [&](int at, const Tensor& q, const Tensor& scales, const Optional& zeros, const Optional& bias) {
      const RoundedWeight<T> w(q, scales, zeros, inputs.columns, bits, group_size, "quant_linears: qweight");
      group.hold(w);
      group.add(at, w.storage, bias);
    };
    add(0, qweight1, scales1, zeros1, bias1);
    add(1, qweight2, scales2, zeros2, bias2);
    STD_TORCH_CHECK(qweight3.has_value() == scales3.has_value(), "quant_linears: qweight3 and scales3 come together");
    if (qweight3) add(2, *qweight3, *scales3, zeros3, bias3);
    if (activation_bits == 8) {
      const Tensor y = group.outputs(x);
      IntegerLayer<T> layers[kIntegerLayers];
      for (int i = 0; i < kIntegerLayers; ++i) layers[i] = {group.layers[i].t, group.layers[i].bias, group.layers[i].y};
      bits == 8 ? integer_products<T, 8>(device, x, inputs, layers, group.features, group_size)
                : integer_products<T, 4>(device, x, inputs, layers, group.features, group_size);
      return y;
    }
    return bits == 8 ? run_group<T, Rounded<T, 8>>(device, x, inputs, group)
                     : run_group<T, Rounded<T, 4>>(device, x, inputs, group);
  });
}

TINYCOMP_CUDA_KERNEL(quant_linears, quant_linears)

}  // namespace tinycomp::cuda
#endif
