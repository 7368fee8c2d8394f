// lowrank_linear: z = x rᵀ, then t zᵀ, put where `order` says. One parallel region; products stay in float32 and cache.
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class T>
void stream(const Inputs& x, const Weight& r, const Weight& t, const std::vector<int32_t>& order, const Output<T>& y) {
  const int64_t m = x.rows, rank = r.rows;
  const bool pivoted = !order.empty();
  const Middle z(kMiddleSlot, m, rank), rest(kLinkSlot, pivoted ? m : 0, t.rows);
  const Stage stages[] = {x.stage(), row_stage(r, m), row_stage(t, m), y.place_stage(pivoted ? m : 0)};
  run_stages(stages, weight_estimate(r, m) + weight_estimate(t, m), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      x.prepare(first, last);
    } else if (stage == 1) {
      dot_rows(r, x.data(), x.stride, m, first, last, z);
    } else if (stage == 3) {
      y.place(first, last, order, z, rank, rest);
    } else if (pivoted) {
      dot_rows(t, z.row(0), z.stride, m, first, last, rest);
    } else {
      dot_rows(t, z.row(0), z.stride, m, first, last,
               [&](int64_t j, int64_t i, float* values, int64_t n) { y.store(j, i, values, n); });
    }
  });
}

Tensor lowrank_linear(const Tensor& x, const Tensor& r, const Tensor& t, const std::optional<Tensor>& order,
                      const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "lowrank_linear: x has no dimension");
  return with_float_type(x.scalar_type(), "lowrank_linear", [&](auto zero) {
    using T = decltype(zero);
    const Weight rows(r, dot_type<T>, scalar_type<T>, x.size(x.dim() - 1), "lowrank_linear: r");
    const Weight rest(t, dot_type<T>, scalar_type<T>, rows.rows, "lowrank_linear: t");
    const int64_t out_features = rest.rows + (order ? rows.rows : 0);
    const auto to = order ? permutation(*order, out_features, "lowrank_linear: order") : std::vector<int32_t>{};
    const auto shift = entries<T>(bias, out_features, "lowrank_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, out_features), scalar_type<T>);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    if constexpr (may_use_torch<T>) {
      if (uses_torch<T>(row_count(x))) {
        const Tensor z = gemm(as_matrix(x), r);
        place<T>(z, gemm(z, t), to, shift, out);
        return y;
      }
    }
    if constexpr (!std::is_same_v<T, double>)
      stream<T>(Inputs(x, zero, true), rows, rest, to, {out, out_features, shift});
    return y;
  });
}

TINYCOMP_CPU_KERNEL(lowrank_linear, lowrank_linear)

}  // namespace
}  // namespace tinycomp
