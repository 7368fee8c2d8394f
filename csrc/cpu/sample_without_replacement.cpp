// sample_without_replacement: the reference's arithmetic, operation by operation, so that the items are the same
// (compiled without contraction of a * b + c).
#include <cmath>
#include <limits>
#include <numeric>

#include "../common/linear.h"

namespace tinycomp {
namespace {

// Words 0 and 1 of Philox4x32-10 at counter (index, 0, 0) with the seed as key, as 52 bits in (0, 1).
double uniform(uint64_t index, uint64_t seed) {
  uint32_t c[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0,
                   next2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = next0, c[1] = static_cast<uint32_t>(p1), c[2] = next2, c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(c[1]) << 20) | (c[0] >> 12);
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

double minus_log(double u) {
  int exponent;
  double mantissa = std::frexp(u, &exponent);
  if (mantissa < 0.70710678118654752440) mantissa *= 2.0, exponent -= 1;
  const double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double series = 0.0;
  for (int i = 13; i > 0; --i) series = (series + 1.0 / (2 * i + 1)) * square;
  const double log_m = 2.0 * s + 2.0 * s * series;
  return -(exponent * 6.93147180369123816490e-01 + (log_m + exponent * 1.90821492927058770002e-10));
}

Tensor sample_without_replacement(const Tensor& probabilities, int64_t k, int64_t seed) {
  STD_TORCH_CHECK(probabilities.dim() == 1, "sample_without_replacement: probabilities is not a vector");
  with_float_type(probabilities.scalar_type(), "sample_without_replacement", [](auto) {});
  const int64_t n = probabilities.size(0);
  const Tensor wide = adjacent(torch::stable::to(detach(probabilities), ScalarType::Double));
  const double* p = static_cast<const double*>(wide.const_data_ptr());
  std::vector<double> finish(n, std::numeric_limits<double>::infinity());
  int64_t positive = 0;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(std::isfinite(p[i]) && p[i] >= 0, "sample_without_replacement: a probability is not allowed");
    if (p[i] == 0) continue;
    finish[i] = minus_log(uniform(static_cast<uint64_t>(i), static_cast<uint64_t>(seed))) / p[i];
    ++positive;
  }
  STD_TORCH_CHECK(k >= 0 && k <= positive, "sample_without_replacement: k is out of range");
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::partial_sort(order.begin(), order.begin() + k, order.end(),
                    [&](int64_t i, int64_t j) { return finish[i] < finish[j] || (finish[i] == finish[j] && i < j); });
  const Tensor drawn = empty({k}, ScalarType::Long);
  std::copy_n(order.begin(), k, static_cast<int64_t*>(drawn.mutable_data_ptr()));
  return drawn;
}

TINYCOMP_CPU_KERNEL(sample_without_replacement, sample_without_replacement)

}  // namespace
}  // namespace tinycomp
