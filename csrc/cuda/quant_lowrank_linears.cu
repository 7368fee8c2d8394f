// quant_lowrank_linears: lowrank_linears on factors rounded to int8 or int4.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "group.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor quant_lowrank_linears(const Tensor& x, const Tensor& r1, const Tensor& r_scales1, const Tensor& t1,
                             const Tensor& t_scales1, const Optional& order1, const Optional& r_zeros1,
                             const Optional& t_zeros1, const Optional& bias1, const Tensor& r2, const Tensor& r_scales2,
                             const Tensor& t2, const Tensor& t_scales2, const Optional& order2,
                             const Optional& r_zeros2, const Optional& t_zeros2, const Optional& bias2,
                             const Optional& r3, const Optional& r_scales3, const Optional& t3,
                             const Optional& t_scales3, const Optional& order3, const Optional& r_zeros3,
                             const Optional& t_zeros3, const Optional& bias3, int64_t bits, int64_t group_size,
                             int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0, "quant_lowrank_linears: activations are not rounded on the device");
  return with_float_type(x.scalar_type(), "quant_lowrank_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "quant_lowrank_linears: x");
    Group<T> group;
    const auto add = [&](int at, const Tensor& r, const Tensor& r_scales, const Tensor& t, const Tensor& t_scales,
                         const Optional& order, const Optional& r_zeros, const Optional& t_zeros,
                         const Optional& bias) {
      const RoundedWeight<T> first(r, r_scales, r_zeros, inputs.columns, bits, group_size, "quant_lowrank_linears: r"),
          second(t, t_scales, t_zeros, r.size(0), bits, group_size, "quant_lowrank_linears: t");
      group.hold(first), group.hold(second);
      group.add(at, device, x, inputs.rows, first.storage, second.storage, order, bias);
    };
    add(0, r1, r_scales1, t1, t_scales1, order1, r_zeros1, t_zeros1, bias1);
    add(1, r2, r_scales2, t2, t_scales2, order2, r_zeros2, t_zeros2, bias2);
    STD_TORCH_CHECK(r3.has_value() == t3.has_value(), "quant_lowrank_linears: r3 and t3 come together");
    if (r3) {
      STD_TORCH_CHECK(r_scales3 && t_scales3, "quant_lowrank_linears: the scales of r3 or t3 are missing");
      add(2, *r3, *r_scales3, *t3, *t_scales3, order3, r_zeros3, t_zeros3, bias3);
    }
    return bits == 8 ? run_group<T, Rounded<T, 8>>(device, x, inputs, group)
                     : run_group<T, Rounded<T, 4>>(device, x, inputs, group);
  });
}

TINYCOMP_SHARED_GROUP(, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_GROUP(, TINYCOMP_ROUNDED4)
TINYCOMP_CUDA_KERNEL(quant_lowrank_linears, quant_lowrank_linears)

}  // namespace tinycomp::cuda
#endif
