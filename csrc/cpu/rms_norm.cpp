// rms_norm: x / sqrt(mean(x²) + eps), rounded, times a weight, rounded; rows over threads.
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class A>
A factor_of(A sum, int64_t n, A eps) {
  return A(1) / std::sqrt(sum / static_cast<A>(n) + eps);
}

template <class T>
void normalise(const T* __restrict x, const Accumulate<T>* __restrict weight, Accumulate<T> eps, int64_t n,
               T* __restrict y) {
  using A = Accumulate<T>;
  vectorised([&] {
    const A sum = lane_sum<A>(n, [&](int64_t i) { return static_cast<A>(x[i]) * static_cast<A>(x[i]); });
    const A factor = factor_of(sum, n, eps);
    for (int64_t i = 0; i < n; ++i)
      y[i] = static_cast<T>(static_cast<A>(static_cast<T>(static_cast<A>(x[i]) * factor)) * weight[i]);
  });
}

// No compiler vectorises its conversions.
void normalise(const Half* x, const float* __restrict weight, float eps, int64_t n, Half* y) {
  const Scratch memory(kResultSlot, n);
  float* const __restrict wide = memory.data();
  widen(Type::f16, x, wide, n);
  vectorised([&] {
    const float sum = lane_sum<float>(n, [&](int64_t i) { return wide[i] * wide[i]; });
    const float factor = factor_of(sum, n, eps);
    for (int64_t i = 0; i < n; ++i) wide[i] *= factor;
  });
  narrow(Type::f16, wide, y, n), widen(Type::f16, y, wide, n);
  vectorised([&] {
    for (int64_t i = 0; i < n; ++i) wide[i] *= weight[i];
  });
  narrow(Type::f16, wide, y, n);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1, "rms_norm: x has no dimension");
  return with_float_type(x.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = x.size(x.dim() - 1);
    const auto factors = entries<T>(weight, n, "rms_norm: weight");
    const Tensor from = adjacent(x), y = empty(shape_with_last(x, n), scalar_type<T>);
    const T* read = static_cast<const T*>(from.const_data_ptr());
    T* write = static_cast<T*>(y.mutable_data_ptr());
    parallel_rows(row_count(x), n, [&](int64_t j) {
      normalise(read + j * n, factors.data(), static_cast<Accumulate<T>>(eps), n, write + j * n);
    });
    return y;
  });
}

TINYCOMP_CPU_KERNEL(rms_norm, rms_norm)

}  // namespace
}  // namespace tinycomp
