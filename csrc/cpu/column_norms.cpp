// column_norms: strips of columns over threads, squares added in double, in the order of rows.
#include "../common/linear.h"

namespace tinycomp {
namespace {

Tensor column_norms(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 2, "column_norms: w is not a matrix");
  return with_float_type(w.scalar_type(), "column_norms", [&](auto zero) {
    using T = decltype(zero);
    const Tensor flat = w.stride(1) == 1 ? w : torch::stable::contiguous(w);
    const int64_t rows = flat.size(0), cols = flat.size(1), stride = flat.stride(0);
    const T* from = static_cast<const T*>(flat.const_data_ptr());
    const Tensor norms = empty(w, {cols}, ScalarType::Float);
    float* to = static_cast<float*>(norms.mutable_data_ptr());
    constexpr int64_t kStrip = 1024, kRows = 16;
    torch::stable::parallel_for(0, (cols + kStrip - 1) / kStrip, 1, [&](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t start = strip * kStrip, n = std::min(kStrip, cols - start);
        // A few rows are added in the accumulation type of T before they go into double.
        using A = Accumulate<T>;
        double sums[kStrip] = {};
        for (int64_t i = 0; i < rows; i += kRows) {
          A part[kStrip] = {};
          for (int64_t r = i; r < std::min(rows, i + kRows); ++r) {
            const T* __restrict row = from + r * stride + start;
            for (int64_t c = 0; c < n; ++c) part[c] += static_cast<A>(row[c]) * static_cast<A>(row[c]);
          }
          for (int64_t c = 0; c < n; ++c) sums[c] += static_cast<double>(part[c]);
        }
        for (int64_t c = 0; c < n; ++c) to[start + c] = static_cast<float>(std::sqrt(sums[c]));
      }
    });
    return norms;
  });
}

TINYCOMP_CPU_KERNEL(column_norms, column_norms)

}  // namespace
}  // namespace tinycomp
