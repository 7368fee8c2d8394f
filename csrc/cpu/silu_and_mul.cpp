// silu_and_mul: gate sigmoid(gate), rounded, times `up`, rounded; in chunks over threads.
#include "../common/exponential.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

constexpr int64_t kChunk = 2048;  // numbers; three such lines of floats stay in the nearest cache

// exp(-|x|) needs no care for overflow.
inline float silu(float x) {
  const float small = exponential(x < 0 ? x : -x);
  return x * (x < 0 ? small : 1.0f) / (1.0f + small);
}
inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

template <class T>
void activate(const T* __restrict gate, const T* __restrict up, int64_t n, T* __restrict y) {
  using A = Accumulate<T>;
  if constexpr (!std::is_same_v<T, Half>) {
    vectorised([&] {
      for (int64_t i = 0; i < n; ++i)
        y[i] = static_cast<T>(static_cast<A>(static_cast<T>(silu(static_cast<A>(gate[i])))) * static_cast<A>(up[i]));
    });
  } else {  // no compiler vectorises its conversions
    const Scratch memory(kResultSlot, 2 * n);
    float* const __restrict a = memory.data(), * const __restrict b = a + n;
    widen(dot_type<T>, gate, a, n), widen(dot_type<T>, up, b, n);
    vectorised([&] {
      for (int64_t i = 0; i < n; ++i) a[i] = silu(a[i]);
    });
    narrow(dot_type<T>, a, y, n), widen(dot_type<T>, y, a, n);
    vectorised([&] {
      for (int64_t i = 0; i < n; ++i) a[i] *= b[i];
    });
    narrow(dot_type<T>, a, y, n);
  }
}

Tensor silu_and_mul(const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(gate.dim() >= 1 && gate.dim() == up.dim() && gate.scalar_type() == up.scalar_type(),
                  "silu_and_mul: shapes or dtypes do not fit");
  for (int64_t d = 0; d < gate.dim(); ++d)
    STD_TORCH_CHECK(gate.size(d) == up.size(d), "silu_and_mul: shapes do not fit");
  return with_float_type(gate.scalar_type(), "silu_and_mul", [&](auto zero) {
    using T = decltype(zero);
    const Tensor a = adjacent(gate), b = adjacent(up),
                 y = empty(shape_with_last(gate, gate.size(gate.dim() - 1)), scalar_type<T>);
    const T *from = static_cast<const T*>(a.const_data_ptr()), *other = static_cast<const T*>(b.const_data_ptr());
    T* const to = static_cast<T*>(y.mutable_data_ptr());
    const int64_t n = gate.numel();
    const Stage stages[] = {{(n + kChunk - 1) / kChunk, 1}};
    const double bytes = 3.0 * static_cast<double>(n) * sizeof(T);
    run_stages(stages, microseconds(bytes, 20.0 * static_cast<double>(n)), [&](int, int64_t first, int64_t last) {
      for (int64_t c = first * kChunk; c < std::min(last * kChunk, n); c += kChunk)
        activate(from + c, other + c, std::min(kChunk, n - c), to + c);
    });
    return y;
  });
}

TINYCOMP_CPU_KERNEL(silu_and_mul, silu_and_mul)

}  // namespace
}  // namespace tinycomp
