// kmeans_update: strips of columns over threads, points added in their order: the same sums for any thread count.
#include "../common/linear.h"

namespace tinycomp {
namespace {

std::tuple<Tensor, Tensor> kmeans_update(const Tensor& points, const Tensor& labels, int64_t k) {
  STD_TORCH_CHECK(points.dim() == 2 && k >= 1 && labels.scalar_type() != ScalarType::Byte,
                  "kmeans_update: shapes, dtypes or k do not fit");
  const int64_t n = points.size(0), d = points.size(1);
  const std::vector<int32_t> label = indices(labels, n, k, "kmeans_update: labels");
  return with_float_type(points.scalar_type(), "kmeans_update", [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor flat = torch::stable::contiguous(points);
    const T* from = static_cast<const T*>(flat.const_data_ptr());
    const Tensor centroids = empty(points, {k, d}, scalar_type<T>), counts = empty(points, {k}, ScalarType::Long);
    T* to = static_cast<T*>(centroids.mutable_data_ptr());
    int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
    std::fill_n(count, k, int64_t{0});
    for (const int32_t c : label) ++count[c];
    constexpr int64_t kStrip = 512;
    torch::stable::parallel_for(0, (d + kStrip - 1) / kStrip, 1, [&](int64_t first, int64_t last) {
      std::vector<A> sums(k * kStrip);
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t start = strip * kStrip, width = std::min(kStrip, d - start);
        std::fill(sums.begin(), sums.end(), A(0));
        for (int64_t i = 0; i < n; ++i) {
          A* __restrict sum = sums.data() + label[i] * kStrip;
          const T* __restrict point = from + i * d + start;
          for (int64_t c = 0; c < width; ++c) sum[c] += static_cast<A>(point[c]);
        }
        for (int64_t i = 0; i < k; ++i)
          for (int64_t c = 0; c < width; ++c)
            to[i * d + start + c] =
                static_cast<T>(sums[i * kStrip + c] / static_cast<A>(std::max<int64_t>(count[i], 1)));
      }
    });
    return std::make_tuple(centroids, counts);
  });
}

TINYCOMP_CPU_KERNEL(kmeans_update, kmeans_update)

}  // namespace
}  // namespace tinycomp
