// rms_norm: x / sqrt(mean(x²) + eps), rounded, times a weight, rounded; rows over threads.
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class T>
void normalise(const T* x, const std::vector<Accumulate<T>>& weight, Accumulate<T> eps, int64_t n, T* y) {
  using A = Accumulate<T>;
  constexpr bool narrows = !std::is_same_v<T, A>;
  const Scratch memory(kResultSlot, narrows ? n : 0);
  const A* from;
  A* to;
  if constexpr (narrows)
    widen(dot_type<T>, x, memory.data(), n), from = to = memory.data();
  else
    from = x, to = y;
  vectorised([&] {
    const A sum = lane_sum<A>(n, [&](int64_t i) { return from[i] * from[i]; });
    const A factor = A(1) / std::sqrt(sum / static_cast<A>(n) + eps);
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
  });
  if constexpr (narrows) narrow(dot_type<T>, to, y, n), widen(dot_type<T>, y, to, n);
  vectorised([&] {
    for (int64_t i = 0; i < n; ++i) to[i] *= weight[i];
  });
  if constexpr (narrows) narrow(dot_type<T>, to, y, n);
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
      normalise(read + j * n, factors, static_cast<Accumulate<T>>(eps), n, write + j * n);
    });
    return y;
  });
}

TINYCOMP_CPU_KERNEL(rms_norm, rms_norm)

}  // namespace
}  // namespace tinycomp
