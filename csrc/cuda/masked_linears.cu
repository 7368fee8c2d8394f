// masked_linears: packed sparse layers that share their input; few inputs take one launch for all of them.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "group.cuh"
#include "masked.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor masked_linears(const Tensor& x, const Tensor& values1, const Tensor& mask1, const Optional& offsets1,
                      const Optional& scales1, const Optional& bias1, int64_t out_features1, const Tensor& values2,
                      const Tensor& mask2, const Optional& offsets2, const Optional& scales2, const Optional& bias2,
                      int64_t out_features2, const Optional& values3, const Optional& mask3, const Optional& offsets3,
                      const Optional& scales3, const Optional& bias3, std::optional<int64_t> out_features3,
                      std::string format, int64_t value_bits) {
  STD_TORCH_CHECK(values3.has_value() == mask3.has_value() && values3.has_value() == out_features3.has_value(),
                  "masked_linears: values3, mask3 and out_features3 come together");
  return with_float_type(x.scalar_type(), "masked_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "masked_linears: x");
    Group<T> group;
    std::vector<PackedWeight<T>> weights;
    const auto add = [&](int at, const Tensor& values, const Tensor& mask, const Optional& offsets,
                         const Optional& scales, const Optional& bias, int64_t out_features) {
      weights.emplace_back(values, mask, offsets, scales, out_features, inputs.columns, format, value_bits);
      group.add(at, weights.back().storage, bias);
    };
    add(0, values1, mask1, offsets1, scales1, bias1, out_features1);
    add(1, values2, mask2, offsets2, scales2, bias2, out_features2);
    if (values3) add(2, *values3, *mask3, offsets3, scales3, bias3, *out_features3);
    return with_format<T>(format, value_bits,
                          [&](auto reader) { return run_group<T, decltype(reader)>(device, x, inputs, group); });
  });
}

TINYCOMP_CUDA_KERNEL(masked_linears, masked_linears)

}  // namespace tinycomp::cuda
#endif
