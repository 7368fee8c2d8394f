// quant_lowrank_linear: lowrank_linear on rounded factors, in one parallel region; the middle stays in float32, or is
// rounded again for the second factor.
#include "../common/beside.h"
#include "../common/rounded_linear.h"

namespace tinycomp {
namespace {

template <class T>
void stream(const Inputs& wide, const RoundedWeight& r, const RoundedWeight& t, const std::vector<int32_t>& from,
            const Output<T>& y) {
  const int64_t m = wide.rows, rank = r.rows;
  const bool pivoted = !from.empty();
  // The second weight reads the middle without gaps; `lines` is the middle and the other results, to be put in order.
  const Middle z(kMiddleSlot, m, rank, false), lines(kLinkSlot, pivoted ? m : 0, y.cols);
  const RoundedInputs x(r, wide.data(), m, kLevelSlot, in_pairs<T>(0));
  const RoundedInputs inner(t, z.row(0), m, kMiddleLevelSlot, in_pairs<T>(0));
  const Stage stages[] = {wide.stage(),  x.stage(),  r.stage(m),
                          inner.stage(), t.stage(m), place_stage(pivoted ? m : 0, y.cols)};
  run_stages(stages, r.estimate(m) + t.estimate(m), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      wide.prepare(first, last);
    } else if (stage == 1) {
      x.prepare(first, last);
    } else if (stage == 2) {
      x.dot_rows(first, last, [&](int64_t j, int64_t i, const float* values, int64_t n) {
        std::copy_n(values, n, z.row(j) + i);
        if (pivoted) std::copy_n(values, n, lines.row(j) + i);
      });
    } else if (stage == 3) {
      inner.prepare(first, last);
    } else if (stage == 5) {
      y.place(first, last, from, lines);
    } else {
      inner.dot_rows(first, last, [&](int64_t j, int64_t i, float* values, int64_t n) {
        if (pivoted)
          std::copy_n(values, n, lines.row(j) + rank + i);
        else
          y.store(j, i, values, n);
      });
    }
  });
}

Tensor quant_lowrank_linear(const Tensor& x, const Tensor& r, const Tensor& r_scales, const Tensor& t,
                            const Tensor& t_scales, const std::optional<Tensor>& order,
                            const std::optional<Tensor>& r_zeros, const std::optional<Tensor>& t_zeros,
                            const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                            int64_t activation_bits) {
  STD_TORCH_CHECK(x.dim() >= 1, "quant_lowrank_linear: x has no dimension");
  const RoundedWeight rows(r, r_scales, r_zeros, x.size(x.dim() - 1), bits, group_size, activation_bits,
                           "quant_lowrank_linear: r");
  const RoundedWeight rest(t, t_scales, t_zeros, rows.rows, bits, group_size, activation_bits,
                           "quant_lowrank_linear: t");
  const int64_t out_features = rest.rows + (order ? rows.rows : 0);
  const auto from =
      order ? inverse_permutation(*order, out_features, "quant_lowrank_linear: order") : std::vector<int32_t>{};
  return with_float_type(x.scalar_type(), "quant_lowrank_linear", [&](auto zero) {
    using T = decltype(zero);
    const auto shift = entries<T>(bias, out_features, "quant_lowrank_linear: bias");
    const Tensor y = empty(shape_with_last(x, out_features), scalar_type<T>);
    if constexpr (std::is_same_v<T, double>)
      low_rank_through_torch<T>(
          y, row_count(x), rows.rows, from, shift,
          [&](const Tensor& z) { gemm(rows.inputs(as_matrix(x)), rows.dense(), z); },
          [&](const Tensor& z, const Tensor& out) { gemm(rest.inputs(z), rest.dense(), out); });
    else
      stream<T>(Inputs(x, zero, kWide), rows, rest, from, {static_cast<T*>(y.mutable_data_ptr()), out_features, shift});
    return y;
  });
}

TINYCOMP_CPU_KERNEL(quant_lowrank_linear, quant_lowrank_linear)
TINYCOMP_CPU_KERNEL_BESIDE(quant_lowrank_linears, quant_lowrank_linear, 8)

}  // namespace
}  // namespace tinycomp
