// lowrank_linears: low-rank layers that share their input; few inputs take one launch for all of them.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "group.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor lowrank_linears(const Tensor& x, const Tensor& r1, const Tensor& t1, const Optional& order1,
                       const Optional& bias1, const Tensor& r2, const Tensor& t2, const Optional& order2,
                       const Optional& bias2, const Optional& r3, const Optional& t3, const Optional& order3,
                       const Optional& bias3) {
  return with_float_type(x.scalar_type(), "lowrank_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "lowrank_linears: x");
    Group<T> group;
    const auto add = [&](int at, const Tensor& r, const Tensor& t, const Optional& order, const Optional& bias) {
      const Rows<T> first(r, inputs.columns, "lowrank_linears: r"), second(t, first.rows, "lowrank_linears: t");
      group.held.insert(group.held.end(), {first.tensor, second.tensor});
      group.add(at, device, x, inputs.rows, dense(first), dense(second), order, bias);
    };
    add(0, r1, t1, order1, bias1);
    add(1, r2, t2, order2, bias2);
    STD_TORCH_CHECK(r3.has_value() == t3.has_value(), "lowrank_linears: r3 and t3 come together");
    if (r3) add(2, *r3, *t3, order3, bias3);
    return run_group<T, Dense<T>>(device, x, inputs, group);
  });
}

TINYCOMP_SHARED_GROUP(, TINYCOMP_DENSE)
TINYCOMP_CUDA_KERNEL(lowrank_linears, lowrank_linears)

}  // namespace tinycomp::cuda
#endif
