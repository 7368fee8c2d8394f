// cur_linear: three factors in a row. Few inputs: each factor is streamed once.
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class T>
void few(const FewInputs& x, int64_t m, const Weight& r, const Weight& u, const Weight& c,
         const std::vector<float>& bias, T* y) {
  std::vector<float> z(m * r.rows), linked(m * u.rows);
  rows_dot(r, x.data(), m, [&](int64_t j, int64_t i, float value) { z[j * r.rows + i] = value; });
  rows_dot(u, z.data(), m, [&](int64_t j, int64_t i, float value) { linked[j * u.rows + i] = value; });
  rows_dot(c, linked.data(), m, [&](int64_t j, int64_t i, float value) {
    y[j * c.rows + i] = static_cast<T>(bias.empty() ? value : value + bias[i]);
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
    const Tensor inputs = as_matrix(x);
    const int64_t m = inputs.size(0);
    if constexpr (!std::is_same_v<T, double>) {
      if (m <= kFewRows) {
        const Tensor y = empty(x, shape_with_last(x, columns.rows), scalar_type<T>);
        few<T>(FewInputs(inputs, zero), m, rows, link, columns, shift, static_cast<T*>(y.mutable_data_ptr()));
        return y;
      }
    }
    const Tensor y = torch::stable::contiguous(gemm(gemm(gemm(inputs, r), u), c));
    add_bias<T>(static_cast<T*>(y.mutable_data_ptr()), m, columns.rows, shift);
    const std::vector<int64_t> shape = shape_with_last(x, columns.rows);
    return torch::stable::view(y, {shape.data(), shape.size()});
  });
}

TINYCOMP_CPU_KERNEL(cur_linear, cur_linear)

}  // namespace
}  // namespace tinycomp
