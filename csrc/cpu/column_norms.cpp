// column_norms: strips of columns over threads, squares added in double, in the order of rows.
#include "../common/lanes.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

// sums[c] += the squares of some rows, added in A.
template <class A, class T>
void add_squares(const T* __restrict rows, int64_t stride, int64_t count, int64_t n, double* __restrict sums) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto add = [&](int64_t first, int64_t width) {
    A some[kLine] = {};
    for (int64_t r = 0; r < count; ++r) {
      const T* __restrict row = rows + r * stride + first;
      for (int64_t c = 0; c < width; ++c) some[c] += static_cast<A>(row[c]) * static_cast<A>(row[c]);
    }
    for (int64_t c = 0; c < width; ++c) sums[first + c] += static_cast<double>(some[c]);
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
    constexpr int64_t kStrip = 4096, kRows = 16;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = std::clamp<int64_t>((cols / threads + 16) / 16 * 16, 16, kStrip);
    torch::stable::parallel_for(0, (cols + share - 1) / share, 1, [&](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t start = strip * share, n = std::min(share, cols - start);
        // A few rows are added in the accumulation type of T before they go into double.
        using A = Accumulate<T>;
        double sums[kStrip] = {};
        for (int64_t i = 0; i < rows; i += kRows) {
          const T* __restrict row = from + i * stride + start;
          vectorised([&] { add_squares<A>(row, stride, std::min(kRows, rows - i), n, sums); });
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
