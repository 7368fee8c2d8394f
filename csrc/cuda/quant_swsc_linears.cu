// quant_swsc_linears: swsc_linears on centroids and factors rounded to int8 or int4.
#include "shared_group.cuh"

#if defined(TINYCOMP_TORCH)

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor quant_swsc_linears(const Tensor& x, const Tensor& centroids1, const Tensor& centroid_scales1,
                          const Tensor& labels1, const Tensor& b1, const Tensor& b_scales1, const Tensor& a1,
                          const Tensor& a_scales1, const Optional& centroid_zeros1, const Optional& b_zeros1,
                          const Optional& a_zeros1, const Optional& scales1, const Optional& bias1,
                          const Tensor& centroids2, const Tensor& centroid_scales2, const Tensor& labels2,
                          const Tensor& b2, const Tensor& b_scales2, const Tensor& a2, const Tensor& a_scales2,
                          const Optional& centroid_zeros2, const Optional& b_zeros2, const Optional& a_zeros2,
                          const Optional& scales2, const Optional& bias2, const Optional& centroids3,
                          const Optional& centroid_scales3, const Optional& labels3, const Optional& b3,
                          const Optional& b_scales3, const Optional& a3, const Optional& a_scales3,
                          const Optional& centroid_zeros3, const Optional& b_zeros3, const Optional& a_zeros3,
                          const Optional& scales3, const Optional& bias3, int64_t axis, int64_t bits,
                          int64_t group_size, int64_t activation_bits) {
  STD_TORCH_CHECK((axis == 0 || axis == 1) && activation_bits == 0,
                  "quant_swsc_linears: axis does not fit, or inputs are to be rounded, which the device does not");
  STD_TORCH_CHECK(centroids3.has_value() == (centroid_scales3 && labels3 && b3 && b_scales3 && a3 && a_scales3),
                  "quant_swsc_linears: the third layer is incomplete");
  return with_float_type(x.scalar_type(), "quant_swsc_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const auto run = [&](auto which) {
      constexpr int kAxis = decltype(which)::value;
      SharedGroup<T, kAxis> group(device, x);
      const auto add = [&](int at, const Tensor& centroids, const Tensor& centroid_scales, const Tensor& labels,
                           const Tensor& b, const Tensor& b_scales, const Tensor& a, const Tensor& a_scales,
                           const Optional& centroid_zeros, const Optional& b_zeros, const Optional& a_zeros,
                           const Optional& scales, const Optional& bias) {
        const char* name = "quant_swsc_linears";
        const int64_t columns = group.inputs.columns;
        const RoundedWeight<T> shared(centroids, centroid_scales, centroid_zeros,
                                      kAxis ? columns_of(centroids, bits) : columns, bits, group_size, name),
            down(b, b_scales, b_zeros, columns, bits, group_size, name),
            up(a, a_scales, a_zeros, down.storage.rows, bits, group_size, name);
        group.add(at, shared.storage, down.storage, up.storage, labels, scales, bias);
        group.hold(shared), group.hold(down), group.hold(up);
      };
      add(0, centroids1, centroid_scales1, labels1, b1, b_scales1, a1, a_scales1, centroid_zeros1, b_zeros1, a_zeros1,
          scales1, bias1);
      add(1, centroids2, centroid_scales2, labels2, b2, b_scales2, a2, a_scales2, centroid_zeros2, b_zeros2, a_zeros2,
          scales2, bias2);
      if (centroids3)
        add(2, *centroids3, *centroid_scales3, *labels3, *b3, *b_scales3, *a3, *a_scales3, centroid_zeros3, b_zeros3,
            a_zeros3, scales3, bias3);
      return bits == 8 ? group.template run<Rounded<T, 8>>() : group.template run<Rounded<T, 4>>();
    };
    return axis ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 0>{});
  });
}

TINYCOMP_SHARED_INPUTS(, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_INPUTS(, TINYCOMP_ROUNDED4)
TINYCOMP_CUDA_KERNEL(quant_swsc_linears, quant_swsc_linears)

}  // namespace tinycomp::cuda
#endif
