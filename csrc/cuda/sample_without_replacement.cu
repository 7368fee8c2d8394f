// sample_without_replacement: finishing times of the exponential races, then torch's stable sort. Every operation is
// rounded by itself (no fused multiply-add), so that all backends draw the same items.
#include "ptx.cuh"

namespace tinycomp::cuda {

constexpr int kRaceThreads = 256;

#if defined(TINYCOMP_EMULATION)
inline double add(double a, double b) { return a + b; }
inline double multiply(double a, double b) { return a * b; }
inline double divide(double a, double b) { return a / b; }
inline uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
#else
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
#endif

// Words 0 and 1 of Philox4x32-10 as a number in (0, 1).
__device__ __forceinline__ double uniform(uint64_t counter, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_product(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint64_t bits = static_cast<uint64_t>(c1) << 20 | c0 >> 12;
  return multiply(add(static_cast<double>(bits), 0.5), 0x1p-52);
}

// -log(u) from 2 atanh((m - 1) / (m + 1)), u = m 2^e, sqrt(1/2) <= m < sqrt(2).
__device__ __forceinline__ double minus_log(double u) {
  int power;
  double m = frexp(u, &power);
  if (m < 0.70710678118654752440) m = multiply(m, 2.), --power;
  const double e = power, s = divide(add(m, -1.), add(m, 1.)), square = multiply(s, s);
  double series = 0.;
#pragma unroll
  for (int i = 13; i > 0; --i) series = multiply(add(series, 1. / (2 * i + 1)), square);
  const double log_m = add(multiply(2., s), multiply(multiply(2., s), series));
  return -add(multiply(e, 6.93147180369123816490e-01), add(log_m, multiply(e, 1.90821492927058770002e-10)));
}

template <class T>
__global__ void __launch_bounds__(kRaceThreads)
    race_kernel(const T* probabilities, int64_t stride, double* finish, int64_t count, int64_t seed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRaceThreads + threadIdx.x;
  if (i >= count) return;
  const double p = to_float(probabilities[i * stride]);
  finish[i] = p > 0. ? divide(minus_log(uniform(i, static_cast<uint64_t>(seed))), p) : INFINITY;
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

Tensor sample_without_replacement(const Tensor& probabilities, int64_t k, int64_t seed) {
  const int64_t count = probabilities.numel();
  STD_TORCH_CHECK(probabilities.dim() == 1 && 0 <= k && k <= count,
                  "sample_without_replacement: shapes do not fit or k is out of range");
  const Device device(probabilities);
  const Tensor finish = empty(probabilities, {count}, ScalarType::Double);
  if (count > 0)
    with_float_type(probabilities.scalar_type(), "sample_without_replacement", [&](auto zero) {
      using T = decltype(zero);
      TINYCOMP_LAUNCH((race_kernel<T>), dim3((count + kRaceThreads - 1) / kRaceThreads), dim3(kRaceThreads), 0,
                      device.stream, static_cast<const T*>(probabilities.const_data_ptr()), probabilities.stride(0),
                      static_cast<double*>(finish.mutable_data_ptr()), count, seed);
      device.check_launch();
    });
  using torch::stable::detail::from;
  StableIValue stack[] = {from(finish), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  const Tensor values = torch::stable::detail::to<Tensor>(stack[0]);  // takes its reference
  Tensor indices = torch::stable::detail::to<Tensor>(stack[1]);
  return torch::stable::clone(torch::stable::narrow(indices, 0, 0, k));
}

TINYCOMP_CUDA_KERNEL(sample_without_replacement, sample_without_replacement)

}  // namespace tinycomp::cuda
#endif
