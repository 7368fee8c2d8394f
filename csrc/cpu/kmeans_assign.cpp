// kmeans_assign: products of a few points with all centroids, compared while they are in cache.
#include <limits>

#include "../common/lanes.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

// Place of the least norms[c] - 2 products[c * apart + i] for each of n points i, the first among equals.
template <class A>
void nearest(const std::vector<A>& norms, const A* __restrict products, int64_t apart, int64_t n,
             int32_t* __restrict labels, A* __restrict least) {
  std::fill_n(least, n, std::numeric_limits<A>::infinity());
  std::fill_n(labels, n, 0);
  for (int64_t c = 0; c < static_cast<int64_t>(norms.size()); ++c) {
    const A* __restrict line = products + c * apart;
    const A norm = norms[c];
    for (int64_t i = 0; i < n; ++i) {
      const A score = norm - 2 * line[i];
      labels[i] = score < least[i] ? static_cast<int32_t>(c) : labels[i];
      least[i] = score < least[i] ? score : least[i];
    }
  }
}

// term(x, mu) summed over d columns of a point in A, widened where it is of 16 bits; no `mine`: mu is x itself.
template <class T, class A, class Term>
A sum_over(const T* point, const A* mine, int64_t d, const Term& term) {
  const Scratch memory(kResultSlot, std::is_same_v<T, A> ? 0 : d);
  const A* from;
  if constexpr (std::is_same_v<T, A>)
    from = point;
  else
    widen(dot_type<T>, point, memory.data(), d), from = memory.data();
  const A* __restrict x = from, * __restrict mu = mine == nullptr ? from : mine;
  A sum = 0;
  vectorised([&] { sum = lane_sum<A>(d, [&](int64_t e) { return term(x[e], mu[e]); }); });
  return sum;
}

// Points that are compared at a time: their products with 256 centroids fill a quarter of a megabyte.
constexpr int64_t kPoints = 256;

// products(first, n, line, squares): line[c * kPoints + i] for points first to first + n and all centroids c; and the
// squares of these points' lengths, where that `gives_squares`.
template <class T, class A, class Products>
void assign(const T* points, const A* centroids, int64_t n, int64_t d, int64_t k, int32_t* labels, float* distances,
            bool gives_squares, const Products& products) {
  std::vector<A> norms(k);
  for (int64_t c = 0; c < k; ++c)
    norms[c] = sum_over<A, A>(centroids + c * d, nullptr, d, [](A mu, A) { return mu * mu; });
  torch::stable::parallel_for(0, (n + kPoints - 1) / kPoints, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> line(k * kPoints), least(kPoints), squares(kPoints);
    for (int64_t first = begin * kPoints; first < std::min(n, end * kPoints); first += kPoints) {
      const int64_t count = std::min(kPoints, n - first);
      for (int64_t i = 0; i < count && !gives_squares; ++i)
        squares[i] = sum_over<T, A>(points + (first + i) * d, nullptr, d, [](A x, A) { return x * x; });
      products(first, count, line.data(), squares.data());
      vectorised([&] { nearest(norms, line.data(), kPoints, count, labels + first, least.data()); });
      for (int64_t i = 0; i < count; ++i) {
        const int32_t label = labels[first + i];
        // |x|^2 + |mu|^2 - 2 x mu is as exact as the difference where little of it cancels out, and reads nothing
        // again.
        A distance = squares[i] + least[i];
        if (!(distance >= (squares[i] + norms[label]) / 2))
          distance = sum_over<T, A>(points + (first + i) * d, centroids + label * d, d,
                                    [](A x, A mu) { return (x - mu) * (x - mu); });
        distances[first + i] = static_cast<float>(distance);
      }
    }
  });
}

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& points, const Tensor& centroids) {
  STD_TORCH_CHECK(points.dim() == 2 && centroids.dim() == 2 && points.size(1) == centroids.size(1) &&
                      centroids.size(0) > 0 && points.scalar_type() == centroids.scalar_type(),
                  "kmeans_assign: shapes or dtypes do not fit");
  return with_float_type(points.scalar_type(), "kmeans_assign", [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const int64_t n = points.size(0), d = points.size(1), k = centroids.size(0);
    Tensor x = adjacent(points);
    const Tensor mu = adjacent(torch::stable::to(detach(centroids), scalar_type<A>));
    const Tensor labels = empty({n}, ScalarType::Int), distances = empty({n}, ScalarType::Float);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const A* to = static_cast<const A*>(mu.const_data_ptr());
    int32_t* places = static_cast<int32_t*>(labels.mutable_data_ptr());
    float* squares = static_cast<float*>(distances.mutable_data_ptr());
    if constexpr (std::is_same_v<A, float>) {
      // Centroids lie apart as inputs do, or side by side; bfloat16 ones meet points in pairs where that is faster, and
      // as exact.
      const bool pairs = in_pairs<T>(d);
      const Order many = side_by_side<T>(std::min<int64_t>(k, 64), d);
      const bool beside = many != Order::rows;
      const int64_t apart = beside ? words_beside(many, dot_type<T>, d) : row_distance(pairs ? d / 2 : d, k);
      const Lines lines((beside ? padded_inputs(k) : k) * apart);
      if (beside) {
        const Tensor some = adjacent(detach(centroids));
        interleave(many, dot_type<T>, dot_type<T>, static_cast<const char*>(some.const_data_ptr()), d * sizeof(T), k, d,
                   0, d, lines.data());
      }
      for (int64_t c = 0; c < k && !beside; ++c)
        if (pairs)
          narrow(Type::bf16, to + c * d, lines.data() + c * apart, d);
        else
          std::copy_n(to + c * d, d, lines.data() + c * apart);
      const Operand mine{lines.data(), apart, beside ? many : pairs ? Order::pairs : Order::rows};
      const int64_t most = inputs_at_once(mine);
      const bool parts = many == Order::parts;
      assign(from, to, n, d, k, places, squares, parts, [&](int64_t first, int64_t count, float* line, float* lengths) {
        constexpr int64_t size = sizeof(T);
        for (int64_t c = 0; c < k; c += most) {
          const Operand some = mine.from(c);
          const int64_t taken = std::min(most, k - c);
          float* const to = line + c * kPoints;
          if (parts)
            dot_beside(many, dot_type<T>, from + first * d, d * size, count, d, some.data, taken, to, kPoints,
                       c == 0 ? lengths : nullptr);
          else
            tinycomp::dot(dot_type<T>, from + first * d, d * size, count, d, some, taken, to, kPoints);
        }
      });
    } else {
      assign(from, to, n, d, k, places, squares, false, [&](int64_t first, int64_t count, double* line, double*) {
        const Tensor some = adjacent(gemm(mu, torch::stable::narrow(x, 0, first, count)));
        const double* found = static_cast<const double*>(some.const_data_ptr());
        for (int64_t c = 0; c < k; ++c) std::copy_n(found + c * count, count, line + c * kPoints);
      });
    }
    return std::make_tuple(labels, distances);
  });
}

TINYCOMP_CPU_KERNEL(kmeans_assign, kmeans_assign)

}  // namespace
}  // namespace tinycomp
