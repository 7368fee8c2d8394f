// lowrank_linear: z = x rᵀ, then t zᵀ, put where `order` says. One parallel region; products stay in float32 and cache.
#include "../common/linear.h"

namespace tinycomp {
namespace {

// `from`: where result i is found in the kept products followed by the others; empty for plain storage.
template <class T>
void stream(const Inputs& x, const Weight& r, const Weight& t, const std::vector<int32_t>& from, const Output<T>& y) {
  const int64_t m = x.rows, rank = r.rows;
  const bool pivoted = !from.empty();
  const Middle lines(kMiddleSlot, m, pivoted ? y.cols : rank);
  float *z = lines.row(0), *rest = z + rank;
  const int64_t ld = lines.stride;
  const Stage stages[] = {x.stage(), row_stage(r, m), row_stage(t, m), y.place_stage(pivoted ? m : 0)};
  run_stages(stages, weight_estimate(r, m) + weight_estimate(t, m), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      x.prepare(first, last);
    } else if (stage == 1) {
      dot_rows(r, x.data(), x.stride, m, first, last, z, ld);
    } else if (stage == 3) {
      y.place(first, last, from, lines);
    } else if (pivoted) {
      dot_rows(t, z, ld, m, first, last, rest, ld);
    } else {
      dot_rows(t, z, ld, m, first, last,
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
    const int64_t m = row_count(x), out_features = rest.rows + (order ? rows.rows : 0);
    const auto from =
        order ? inverse_permutation(*order, out_features, "lowrank_linear: order") : std::vector<int32_t>{};
    const auto shift = entries<T>(bias, out_features, "lowrank_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, out_features), scalar_type<T>);
    if constexpr (may_use_torch<T>) {
      if (uses_torch<T>(m)) {
        low_rank_through_torch<T>(
            y, m, rows.rows, from, shift, [&](const Tensor& z) { gemm(as_matrix(x), r, z); },
            [&](const Tensor& z, const Tensor& out) { gemm(z, t, out); });
        return y;
      }
    }
    if constexpr (!std::is_same_v<T, double>)
      stream<T>(Inputs(x, zero, true), rows, rest, from, {static_cast<T*>(y.mutable_data_ptr()), out_features, shift});
    return y;
  });
}

TINYCOMP_CPU_KERNEL(lowrank_linear, lowrank_linear)

}  // namespace
}  // namespace tinycomp
