// kmeans_assign: GEMM through torch for the scores of a chunk of points, then argmin and the distance by point.
#include <limits>

#include "../common/lanes.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

// Place of the least norms[c] - 2 products[c], the first among equals.
template <class A>
int32_t nearest(const A* __restrict norms, const A* __restrict products, int64_t k) {
  A least[kSumLanes];
  int32_t place[kSumLanes];
  std::fill_n(least, kSumLanes, std::numeric_limits<A>::infinity());
  std::fill_n(place, kSumLanes, 0);
  int64_t c = 0;
  for (; c + kSumLanes <= k; c += kSumLanes)
    for (int l = 0; l < kSumLanes; ++l) {
      const A score = norms[c + l] - 2 * products[c + l];
      place[l] = score < least[l] ? static_cast<int32_t>(c + l) : place[l];
      least[l] = score < least[l] ? score : least[l];
    }
  for (int l = 0; c < k; ++c, ++l) {
    const A score = norms[c] - 2 * products[c];
    if (score < least[l]) least[l] = score, place[l] = static_cast<int32_t>(c);
  }
  int best = 0;
  for (int l = 1; l < kSumLanes; ++l)
    if (least[l] < least[best] || (least[l] == least[best] && place[l] < place[best])) best = l;
  return place[best];
}

template <class A>
void assign(const A* points, const A* centroids, const A* products, const std::vector<A>& norms, int64_t n, int64_t d,
            int32_t* labels, float* distances) {
  const int64_t k = static_cast<int64_t>(norms.size());
  parallel_rows(n, k + d, [&](int64_t i) {
    vectorised([&] { labels[i] = nearest(norms.data(), products + i * k, k); });
    const A* __restrict point = points + i * d, * __restrict mine = centroids + labels[i] * d;
    vectorised([&] {
      distances[i] = static_cast<float>(lane_sum<A>(d, [&](int64_t c) {
        const A difference = point[c] - mine[c];
        return difference * difference;
      }));
    });
  });
}

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& points, const Tensor& centroids) {
  STD_TORCH_CHECK(points.dim() == 2 && centroids.dim() == 2 && points.size(1) == centroids.size(1) &&
                      centroids.size(0) > 0 && points.scalar_type() == centroids.scalar_type(),
                  "kmeans_assign: shapes or dtypes do not fit");
  return with_float_type(points.scalar_type(), "kmeans_assign", [&](auto zero) {
    using A = Accumulate<decltype(zero)>;
    const int64_t n = points.size(0), d = points.size(1), k = centroids.size(0);
    Tensor x = torch::stable::contiguous(torch::stable::to(detach(points), scalar_type<A>));
    const Tensor mu = torch::stable::contiguous(torch::stable::to(detach(centroids), scalar_type<A>));
    const Tensor labels = empty(points, {n}, ScalarType::Int), distances = empty(points, {n}, ScalarType::Float);
    const A *from = static_cast<const A*>(x.const_data_ptr()), *to = static_cast<const A*>(mu.const_data_ptr());
    std::vector<A> norms(k);
    for (int64_t c = 0; c < k; ++c) norms[c] = lane_sum<A>(d, [&](int64_t i) { return to[c * d + i] * to[c * d + i]; });
    // Products of a chunk take at most 2 MiB, so that they are still in cache when they are compared.
    const int64_t chunk = std::max<int64_t>(1, (2 << 20) / (k * static_cast<int64_t>(sizeof(A))));
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t size = std::min(chunk, n - start);
      const Tensor products = torch::stable::contiguous(gemm(torch::stable::narrow(x, 0, start, size), mu));
      assign<A>(from + start * d, to, static_cast<const A*>(products.const_data_ptr()), norms, size, d,
                static_cast<int32_t*>(labels.mutable_data_ptr()) + start,
                static_cast<float*>(distances.mutable_data_ptr()) + start);
    }
    return std::make_tuple(labels, distances);
  });
}

TINYCOMP_CPU_KERNEL(kmeans_assign, kmeans_assign)

}  // namespace
}  // namespace tinycomp
