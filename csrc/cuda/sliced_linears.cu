// sliced_linears: dense layers that share their input; few inputs take one launch for all of them.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "group.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor sliced_linears(const Tensor& x, const Tensor& w1, const Optional& bias1, const Tensor& w2, const Optional& bias2,
                      const Optional& w3, const Optional& bias3) {
  return with_float_type(x.scalar_type(), "sliced_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "sliced_linears: x");
    Group<T> group;
    const auto add = [&](int at, const Tensor& w, const Optional& bias) {
      const Rows<T> rows(w, inputs.columns, "sliced_linears: w");
      group.held.push_back(rows.tensor);
      group.add(at, dense(rows), bias);
    };
    add(0, w1, bias1);
    add(1, w2, bias2);
    if (w3) add(2, *w3, bias3);
    return run_group<T, Dense<T>>(device, x, inputs, group);
  });
}

TINYCOMP_CUDA_KERNEL(sliced_linears, sliced_linears)

}  // namespace tinycomp::cuda
#endif
