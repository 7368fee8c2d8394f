// sliced_linear: the corner of a weight that is asked for, read in place; the whole of it is a dense layer.
#include "../common/beside.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

Tensor prefix(const Tensor& t, int64_t dim, int64_t size) {
  Tensor whole = detach(t);
  return torch::stable::narrow(whole, dim, 0, size);
}

Tensor sliced_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t in_features,
                     int64_t out_features) {
  STD_TORCH_CHECK(x.dim() >= 1 && w.dim() == 2 && in_features >= 0 && out_features >= 0 && in_features <= w.size(1) &&
                      in_features <= x.size(x.dim() - 1) && out_features <= w.size(0),
                  "sliced_linear: shapes do not fit");
  return with_float_type(x.scalar_type(), "sliced_linear", [&](auto zero) {
    using T = decltype(zero);
    Weight corner(w, dot_type<T>, scalar_type<T>, w.size(1), "sliced_linear: w");
    corner.rows = out_features, corner.cols = in_features;
    const auto shift = entries<T>(bias, w.size(0), "sliced_linear: bias");
    const Tensor cut = in_features < x.size(x.dim() - 1) ? prefix(x, x.dim() - 1, in_features) : x;
    const std::vector<int64_t> shape = shape_with_last(x, out_features);
    if constexpr (may_use_torch<T>) {
      // In tiles a weight must have some size to make up for the arrangement of the inputs.
      constexpr int64_t kSmall = 1 << 17;
      const bool tiles = std::is_same_v<T, float> && has_tiles() && in_features * out_features >= kSmall;
      if (uses_torch<T>(row_count(x)) && !tiles) {
        const Tensor part = prefix(prefix(w, 0, out_features), 1, in_features);
        const Tensor y = adjacent(gemm(as_matrix(cut), part));
        add_bias<T>(static_cast<T*>(y.mutable_data_ptr()), y.size(0), out_features, shift);
        return torch::stable::view(y, {shape.data(), shape.size()});
      }
    }
    const Tensor result = empty(shape, scalar_type<T>);
    if constexpr (!std::is_same_v<T, double>) {
      T* const to = static_cast<T*>(result.mutable_data_ptr());
      over_inputs<T>(cut, [&](const Tensor& some, int64_t start) {
        const Output<T> y{to + start * out_features, out_features, shift};
        const Inputs inputs(some, zero, kAny, row_count(cut));
        const Stage stages[] = {inputs.stage(), row_stage(corner, inputs.rows)};
        run_stages(stages, weight_estimate(corner, inputs.rows), [&](int stage, int64_t first, int64_t last) {
          if (stage == 0)
            inputs.prepare(first, last);
          else
            dot_rows(corner, inputs.operand(), inputs.rows, first, last, y);
        });
      });
    }
    return result;
  });
}

Tensor whole_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(w.dim() == 2, "sliced_linears: shapes do not fit");
  return sliced_linear(x, w, bias, w.size(1), w.size(0));
}

TINYCOMP_CPU_KERNEL(sliced_linear, sliced_linear)
TINYCOMP_CPU_KERNEL_BESIDE(sliced_linears, whole_linear, 2)

}  // namespace
}  // namespace tinycomp
