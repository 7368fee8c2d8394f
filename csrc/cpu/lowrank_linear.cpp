// lowrank_linear: z = x rᵀ, then t zᵀ, written where `order` says. Few inputs: both factors are streamed once.
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class T>
void few(const FewInputs& x, int64_t m, const Weight& r, const Weight& t, const std::vector<int32_t>& order,
         const std::vector<float>& bias, T* y, int64_t out_features) {
  const bool pivoted = !order.empty();
  std::vector<float> z(m * r.rows);
  auto write = [&](int64_t j, int64_t i, float value) {
    const int64_t at = pivoted ? order[i] : i;
    y[j * out_features + at] = static_cast<T>(bias.empty() ? value : value + bias[at]);
  };
  rows_dot(r, x.data(), m, [&](int64_t j, int64_t i, float value) {
    z[j * r.rows + i] = value;
    if (pivoted) write(j, i, value);
  });
  const int64_t kept = pivoted ? r.rows : 0;
  rows_dot(t, z.data(), m, [&](int64_t j, int64_t i, float value) { write(j, kept + i, value); });
}

template <class T>
void many(const Tensor& x, const Tensor& r, const Tensor& t, const std::vector<int32_t>& order,
          const std::vector<Accumulate<T>>& bias, T* y, int64_t out_features) {
  const Tensor z = torch::stable::contiguous(gemm(x, r)), rest = torch::stable::contiguous(gemm(z, t));
  const T *kept = static_cast<const T*>(z.const_data_ptr()), *other = static_cast<const T*>(rest.const_data_ptr());
  const int64_t rank = r.size(0), others = t.size(0), first = order.empty() ? 0 : rank;
  auto write = [&](T* row, int64_t i, T value) {
    const int64_t at = order.empty() ? i : order[i];
    row[at] = bias.empty() ? value : static_cast<T>(static_cast<Accumulate<T>>(value) + bias[at]);
  };
  parallel_rows(x.size(0), out_features, [&](int64_t j) {
    T* row = y + j * out_features;
    for (int64_t i = 0; i < first; ++i) write(row, i, kept[j * rank + i]);
    for (int64_t i = 0; i < others; ++i) write(row, first + i, other[j * others + i]);
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
    const Tensor inputs = as_matrix(x);
    const int64_t m = inputs.size(0);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    if constexpr (!std::is_same_v<T, double>) {
      if (m <= kFewRows) {
        few<T>(FewInputs(inputs, zero), m, rows, rest, to, shift, out, out_features);
        return y;
      }
    }
    many<T>(inputs, r, t, to, shift, out, out_features);
    return y;
  });
}

TINYCOMP_CPU_KERNEL(lowrank_linear, lowrank_linear)

}  // namespace
}  // namespace tinycomp
