// lowrank_linears: two or three low-rank layers of one input (q, k, v; gate, up), their results side by side.
#include "../common/low_rank.h"

namespace tinycomp {
namespace {

template <class T, int L>
Tensor compute(const Tensor& x, const LowRank<T> (&layers)[L]) {
  int64_t total = 0;
  for (const LowRank<T>& layer : layers) total += layer.out_features;
  const Tensor y = empty(shape_with_last(x, total), scalar_type<T>);
  T* to = static_cast<T*>(y.mutable_data_ptr());
  if constexpr (may_use_torch<T>) {
    if (uses_torch<T>(row_count(x))) {
      for (const LowRank<T>& layer : layers) {
        const int64_t m = row_count(x), n = layer.out_features;
        const Tensor part = empty({m, n}, scalar_type<T>);
        through_torch(x, layer, part);
        const T* from = static_cast<const T*>(part.const_data_ptr());
        parallel_rows(m, n, [&](int64_t j) { std::copy_n(from + j * n, n, to + j * total); });
        to += n;
      }
      return y;
    }
  }
  if constexpr (!std::is_same_v<T, double>) stream(Inputs(x, T{}, kAny), layers, to, total);
  return y;
}

using Optional = std::optional<Tensor>;

Tensor lowrank_linears(const Tensor& x, const Tensor& r1, const Tensor& t1, const Optional& order1,
                       const Optional& bias1, const Tensor& r2, const Tensor& t2, const Optional& order2,
                       const Optional& bias2, const Optional& r3, const Optional& t3, const Optional& order3,
                       const Optional& bias3) {
  STD_TORCH_CHECK(x.dim() >= 1, "lowrank_linears: x has no dimension");
  STD_TORCH_CHECK(r3.has_value() == t3.has_value(), "lowrank_linears: r3 and t3 come together");
  return with_float_type(x.scalar_type(), "lowrank_linears", [&](auto zero) {
    using T = decltype(zero);
    if (!r3) return compute<T, 2>(x, {{x, r1, t1, order1, bias1}, {x, r2, t2, order2, bias2}});
    return compute<T, 3>(x, {{x, r1, t1, order1, bias1}, {x, r2, t2, order2, bias2}, {x, *r3, *t3, order3, bias3}});
  });
}

TINYCOMP_CPU_KERNEL(lowrank_linears, lowrank_linears)

}  // namespace
}  // namespace tinycomp
