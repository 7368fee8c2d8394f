// quant_linear: levels are streamed as they are stored, against float32 inputs or inputs rounded to 8 bits by group.
#include "../common/beside.h"
#include "../common/rounded_linear.h"

namespace tinycomp {
namespace {

template <class T>
Tensor stream(const Inputs& wide, const RoundedWeight& w, const std::vector<float>& bias, Tensor result) {
  const Output<T> y{static_cast<T*>(result.mutable_data_ptr()), w.rows, bias};
  const RoundedInputs inputs(w, wide.data(), wide.rows, kLevelSlot, in_pairs<T>(0));
  const Stage stages[] = {wide.stage(), inputs.stage(), w.stage(wide.rows)};
  run_stages(stages, w.estimate(wide.rows), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0)
      wide.prepare(first, last);
    else if (stage == 1)
      inputs.prepare(first, last);
    else
      inputs.dot_rows(first, last, [&](int64_t j, int64_t i, float* values, int64_t n) { y.store(j, i, values, n); });
  });
  return result;
}

Tensor quant_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t bits, int64_t group_size, int64_t activation_bits) {
  STD_TORCH_CHECK(x.dim() >= 1, "quant_linear: x has no dimension");
  const RoundedWeight w(qweight, scales, zeros, x.size(x.dim() - 1), bits, group_size, activation_bits,
                        "quant_linear: qweight");
  return with_float_type(x.scalar_type(), "quant_linear", [&](auto zero) {
    using T = decltype(zero);
    const auto shift = entries<T>(bias, w.rows, "quant_linear: bias");
    const std::vector<int64_t> shape = shape_with_last(x, w.rows);
    if constexpr (std::is_same_v<T, double>) {
      const Tensor y = adjacent(gemm(w.inputs(as_matrix(x)), w.dense()));
      add_bias(static_cast<double*>(y.mutable_data_ptr()), y.size(0), w.rows, shift);
      return torch::stable::view(y, {shape.data(), shape.size()});
    } else {
      return stream<T>(Inputs(x, zero, kWide), w, shift, empty(shape, scalar_type<T>));
    }
  });
}

TINYCOMP_CPU_KERNEL(quant_linear, quant_linear)
TINYCOMP_CPU_KERNEL_BESIDE(quant_linears, quant_linear, 4)

}  // namespace
}  // namespace tinycomp
