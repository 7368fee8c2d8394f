// kmeans_update: points sorted by label, then the members of each cluster added in their order, in strips of columns
// over threads: the same sums for any thread count.
#include "../common/lanes.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

constexpr int64_t kStrip = 1024, kTogether = 4;

// sum += the given rows, one after another, `width` columns of each.
template <class T, class A>
void add_rows(A* __restrict sum, const T* from, int64_t stride, const int64_t* row, int64_t rows, int64_t width) {
  int64_t i = 0;
  for (; i + kTogether <= rows; i += kTogether) {
    const T* __restrict a = from + row[i] * stride, * __restrict b = from + row[i + 1] * stride, * __restrict c = from + row[i + 2] * stride, * __restrict d = from + row[i + 3] * stride;
    for (int64_t j = 0; j < width; ++j)
      sum[j] = (((sum[j] + static_cast<A>(a[j])) + static_cast<A>(b[j])) + static_cast<A>(c[j])) + static_cast<A>(d[j]);
  }
  for (; i < rows; ++i) {
    const T* __restrict a = from + row[i] * stride;
    for (int64_t j = 0; j < width; ++j) sum[j] += static_cast<A>(a[j]);
  }
}

std::tuple<Tensor, Tensor> kmeans_update(const Tensor& points, const Tensor& labels, int64_t k) {
  STD_TORCH_CHECK(points.dim() == 2 && k >= 1 && labels.scalar_type() != ScalarType::Byte,
                  "kmeans_update: shapes, dtypes or k do not fit");
  const int64_t n = points.size(0), d = points.size(1);
  const std::vector<int32_t> label = indices(labels, n, k, "kmeans_update: labels");
  return with_float_type(points.scalar_type(), "kmeans_update", [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor flat = adjacent(points);
    const T* from = static_cast<const T*>(flat.const_data_ptr());
    const Tensor centroids = empty({k, d}, scalar_type<T>), counts = empty({k}, ScalarType::Long);
    T* to = static_cast<T*>(centroids.mutable_data_ptr());
    int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
    std::fill_n(count, k, int64_t{0});
    for (const int32_t c : label) ++count[c];
    std::vector<int64_t> start(k + 1, 0), member(n);
    for (int64_t c = 0; c < k; ++c) start[c + 1] = start[c] + count[c];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < n; ++i) member[next[label[i]]++] = i;
    const int64_t strips = (d + kStrip - 1) / kStrip;
    // Strip by strip and not cluster by cluster: one large cluster then keeps no thread waiting.
    torch::stable::parallel_for(0, strips * k, 1 + (k - 1) / 4, [&](int64_t first, int64_t last) {
      std::vector<A> sum(kStrip);
      for (int64_t item = first; item < last; ++item) {
        const int64_t c = item % k, column = item / k * kStrip, width = std::min(kStrip, d - column);
        std::fill_n(sum.data(), width, A(0));
        vectorised([&] { add_rows(sum.data(), from + column, d, member.data() + start[c], count[c], width); });
        const A size = static_cast<A>(std::max<int64_t>(count[c], 1));
        for (int64_t j = 0; j < width; ++j) to[c * d + column + j] = static_cast<T>(sum[j] / size);
      }
    });
    return std::make_tuple(centroids, counts);
  });
}

TINYCOMP_CPU_KERNEL(kmeans_update, kmeans_update)

}  // namespace
}  // namespace tinycomp
