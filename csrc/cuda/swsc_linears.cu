// swsc_linears: layers whose channels share centroids, of one input; few inputs take one launch for all of them.
#include "shared_group.cuh"

#if defined(TINYCOMP_TORCH)

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor swsc_linears(const Tensor& x, const Tensor& centroids1, const Tensor& labels1, const Tensor& b1,
                    const Tensor& a1, const Optional& scales1, const Optional& bias1, const Tensor& centroids2,
                    const Tensor& labels2, const Tensor& b2, const Tensor& a2, const Optional& scales2,
                    const Optional& bias2, const Optional& centroids3, const Optional& labels3, const Optional& b3,
                    const Optional& a3, const Optional& scales3, const Optional& bias3, int64_t axis) {
  STD_TORCH_CHECK(axis == 0 || axis == 1, "swsc_linears: axis does not fit");
  STD_TORCH_CHECK(centroids3.has_value() == (labels3 && b3 && a3), "swsc_linears: the third layer is incomplete");
  return with_float_type(x.scalar_type(), "swsc_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const auto run = [&](auto which) {
      constexpr int kAxis = decltype(which)::value;
      SharedGroup<T, kAxis> group(device, x);
      const auto add = [&](int at, const Tensor& centroids, const Tensor& labels, const Tensor& b, const Tensor& a,
                           const Optional& scales, const Optional& bias) {
        const Rows<T> shared(centroids, kAxis ? -1 : group.inputs.columns, "swsc_linears: centroids"),
            down(b, group.inputs.columns, "swsc_linears: b"), up(a, down.rows, "swsc_linears: a");
        group.add(at, dense(shared), dense(down), dense(up), labels, scales, bias);
        group.hold(shared.tensor), group.hold(down.tensor), group.hold(up.tensor);
      };
      add(0, centroids1, labels1, b1, a1, scales1, bias1);
      add(1, centroids2, labels2, b2, a2, scales2, bias2);
      if (centroids3) add(2, *centroids3, *labels3, *b3, *a3, scales3, bias3);
      return group.template run<Dense<T>>();
    };
    return axis ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 0>{});
  });
}

TINYCOMP_SHARED_INPUTS(, TINYCOMP_DENSE)
TINYCOMP_CUDA_KERNEL(swsc_linears, swsc_linears)

}  // namespace tinycomp::cuda
#endif
