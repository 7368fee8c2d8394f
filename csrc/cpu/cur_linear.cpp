// cur_linear: three factors in a row, each streamed once, in one parallel region; products stay in cache.
#include "../common/beside.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class T>
void stream(const Inputs& x, const Weight& r, const Weight& u, const Weight& c, const Output<T>& y) {
  const int64_t m = x.rows;
  const Middle middle(kMiddleSlot, m, r.rows, T{});
  const Middle linked(kLinkSlot, m, u.rows, T{});
  const Stage stages[] = {x.stage(), row_stage(r, m), row_stage(u, m), row_stage(c, m)};
  const double estimate = weight_estimate(r, m) + weight_estimate(u, m) + weight_estimate(c, m);
  run_stages(stages, estimate, [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      x.prepare(first, last);
    } else if (stage == 1) {
      dot_rows(r, x.operand(), m, first, last, middle.row(0), middle.stride);
      middle.done(r.rows, first, last);
    } else if (stage == 2) {
      dot_rows(u, middle.operand(0, r.rows), m, first, last, linked.row(0), linked.stride);
      linked.done(u.rows, first, last);
    } else {
      dot_rows(c, linked.operand(0, u.rows), m, first, last, y);
    }
  });
}

Tensor cur_linear(const Tensor& x, const Tensor& r, const Tensor& u, const Tensor& c,
                  const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "cur_linear: x has no dimension");
  return with_float_type(x.scalar_type(), "cur_linear", [&](auto zero) {
    using T = decltype(zero);
    const Weight rows(r, dot_type<T>, scalar_type<T>, x.size(x.dim() - 1), "cur_linear: r");
    const Weight link(u, dot_type<T>, scalar_type<T>, rows.rows, "cur_linear: u");
    const Weight columns(c, dot_type<T>, scalar_type<T>, link.rows, "cur_linear: c");
    const auto shift = entries<T>(bias, columns.rows, "cur_linear: bias");
    const std::vector<int64_t> shape = shape_with_last(x, columns.rows);
    if constexpr (may_use_torch<T>) {
      if (uses_torch<T>(row_count(x))) {
        const Tensor inputs = as_matrix(x), y = adjacent(gemm(gemm(gemm(inputs, r), u), c));
        add_bias<T>(static_cast<T*>(y.mutable_data_ptr()), inputs.size(0), columns.rows, shift);
        return torch::stable::view(y, {shape.data(), shape.size()});
      }
    }
    const Tensor y = empty(shape, scalar_type<T>);
    if constexpr (!std::is_same_v<T, double>) {
      T* out = static_cast<T*>(y.mutable_data_ptr());
      stream<T>(Inputs(x, zero, kAny), rows, link, columns, {out, columns.rows, shift});
    }
    return y;
  });
}

TINYCOMP_CPU_KERNEL(cur_linear, cur_linear)
TINYCOMP_CPU_KERNEL_BESIDE(cur_linears, cur_linear, 4)

}  // namespace
}  // namespace tinycomp
