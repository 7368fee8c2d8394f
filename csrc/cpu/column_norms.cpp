// column_norms: strips of columns over threads, squares added in double, in the order of rows.
#include "../common/lanes.h"
#include "../common/linear.h"
#include "../common/prefetch.h"

namespace tinycomp {
namespace {

// Rows that are read together, and rows whose squares are added in the accumulation type of T before they go into
// double.
constexpr int64_t kRows = 8, kAdded = 32;

// sums[c] += the squares of `count` rows.
template <int64_t count, class A, class T>
void add_squares(const T* __restrict rows, int64_t stride, int64_t n, A* __restrict sums) {
  constexpr int64_t kLine = 64 / sizeof(T);
  // The next rows: 19 -> 24 GB/s on Zen 4; on a Xeon (Skylake) it was slower.
  const int64_t ahead = on_amd ? count * stride : 0;
  const auto add = [&](int64_t first, int64_t width) {
    A some[kLine];
    for (int64_t c = 0; c < width; ++c) some[c] = sums[first + c];
#pragma GCC unroll 8
    for (int64_t r = 0; r < count; ++r) {
      const T* __restrict row = rows + r * stride + first;
      if (ahead != 0) prefetch(row + ahead);
      for (int64_t c = 0; c < width; ++c) some[c] += static_cast<A>(row[c]) * static_cast<A>(row[c]);
    }
    for (int64_t c = 0; c < width; ++c) sums[first + c] = some[c];
  };
  int64_t c = 0;
  for (; c + kLine <= n; c += kLine) add(c, kLine);
  add(c, n - c);
}

Tensor column_norms(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 2, "column_norms: w is not a matrix");
  return with_float_type(w.scalar_type(), "column_norms", [&](auto zero) {
    using T = decltype(zero);
    const Tensor flat = w.stride(1) == 1 ? w : adjacent(w);
    const int64_t rows = flat.size(0), cols = flat.size(1), stride = flat.stride(0);
    const T* from = static_cast<const T*>(flat.const_data_ptr());
    const Tensor norms = empty({cols}, ScalarType::Float);
    float* to = static_cast<float*>(norms.mutable_data_ptr());
    // A strip is as wide as the threads leave it, up to what stays in cache: rows are read from end to end.
    constexpr int64_t kStrip = 4096;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = std::clamp<int64_t>((cols / threads + 16) / 16 * 16, 16, kStrip);
    torch::stable::parallel_for(0, (cols + share - 1) / share, 1, [&](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t start = strip * share, n = std::min(share, cols - start);
        using A = Accumulate<T>;
        double sums[kStrip] = {};
        A some[kStrip];
        vectorised([&] {
          for (int64_t i = 0; i < rows; i += kAdded) {
            std::fill_n(some, n, A(0));
            const T* row = from + i * stride + start;
            int64_t left = std::min(kAdded, rows - i);
            for (; left >= kRows; left -= kRows, row += kRows * stride) add_squares<kRows>(row, stride, n, some);
            for (; left > 0; --left, row += stride) add_squares<1>(row, stride, n, some);
            for (int64_t c = 0; c < n; ++c) sums[c] += static_cast<double>(some[c]);
          }
        });
        for (int64_t c = 0; c < n; ++c) to[start + c] = static_cast<float>(std::sqrt(sums[c]));
      }
    });
    return norms;
  });
}

TINYCOMP_CPU_KERNEL(column_norms, column_norms)

}  // namespace
}  // namespace tinycomp
