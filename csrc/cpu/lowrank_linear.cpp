// lowrank_linear: z = x rᵀ, then t zᵀ, put where `order` says.
#include "../common/low_rank.h"

namespace tinycomp {
namespace {

Tensor lowrank_linear(const Tensor& x, const Tensor& r, const Tensor& t, const std::optional<Tensor>& order,
                      const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "lowrank_linear: x has no dimension");
  return with_float_type(x.scalar_type(), "lowrank_linear", [&](auto zero) {
    using T = decltype(zero);
    const LowRank<T> layers[] = {{x, r, t, order, bias}};
    const int64_t out_features = layers[0].out_features;
    const Tensor y = empty(shape_with_last(x, out_features), scalar_type<T>);
    if constexpr (may_use_torch<T>) {
      if (uses_torch<T>(row_count(x))) {
        through_torch(x, layers[0], y);
        return y;
      }
    }
    if constexpr (!std::is_same_v<T, double>)
      stream(Inputs(x, zero, kAny), layers, static_cast<T*>(y.mutable_data_ptr()), out_features);
    return y;
  });
}

TINYCOMP_CPU_KERNEL(lowrank_linear, lowrank_linear)

}  // namespace
}  // namespace tinycomp
