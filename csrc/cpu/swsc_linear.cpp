// swsc_linear: shared centroids and a low-rank correction. Few inputs: two parallel regions, the first over the rows of
// everything that reads x, the second over the outputs.
#include "../common/linear.h"

namespace tinycomp {
namespace {

// Arguments after checking.
template <class T>
struct Layer {
  Weight centroids, b, a;
  std::vector<int32_t> labels;
  std::vector<Accumulate<T>> scales, bias;
  int64_t clusters, in_features, out_features;

  Accumulate<T> scale(int64_t i) const { return scales.empty() ? 1 : scales[i]; }
  Accumulate<T> shift(int64_t i) const { return bias.empty() ? 0 : bias[i]; }
};

template <class T>
void few_outputs_shared(const Layer<T>& layer, const float* x, int64_t m, T* y) {
  const int64_t k = layer.clusters, rank = layer.b.rows, first_b = blocks(k);
  std::vector<float> z(m * k), low(m * rank);
  parallel_blocks(first_b + blocks(rank), layer.b.stride, [&](int64_t first, int64_t last) {
    dot_blocks(layer.centroids, x, m, first, std::min(last, first_b),
               [&](int64_t j, int64_t i, float value) { z[j * k + i] = value; });
    dot_blocks(layer.b, x, m, std::max<int64_t>(first - first_b, 0), std::max<int64_t>(last - first_b, 0),
               [&](int64_t j, int64_t i, float value) { low[j * rank + i] = value; });
  });
  rows_dot(layer.a, low.data(), m, [&](int64_t j, int64_t i, float value) {
    y[j * layer.out_features + i] =
        static_cast<T>(layer.scale(i) * z[j * k + layer.labels[i]] + value + layer.shift(i));
  });
}

template <class T>
void few_inputs_shared(const Layer<T>& layer, const float* x, int64_t m, T* y) {
  const int64_t k = layer.clusters, rank = layer.b.rows, n = layer.out_features;
  std::vector<float> sums(m * k, 0.0f), low(m * rank), shared(m * n);
  for (int64_t j = 0; j < m; ++j)
    for (int64_t i = 0; i < layer.in_features; ++i)
      sums[j * k + layer.labels[i]] += layer.scale(i) * x[j * layer.in_features + i];
  rows_dot(layer.b, x, m, [&](int64_t j, int64_t i, float value) { low[j * rank + i] = value; });
  parallel_blocks(blocks(n), layer.centroids.stride + layer.a.stride, [&](int64_t first, int64_t last) {
    dot_blocks(layer.centroids, sums.data(), m, first, last,
               [&](int64_t j, int64_t i, float value) { shared[j * n + i] = value; });
    dot_blocks(layer.a, low.data(), m, first, last, [&](int64_t j, int64_t i, float value) {
      y[j * n + i] = static_cast<T>(shared[j * n + i] + value + layer.shift(i));
    });
  });
}

template <class T>
void many(const Layer<T>& layer, const Tensor& x, const Tensor& centroids, const Tensor& b, const Tensor& a,
          int64_t axis, T* y) {
  const int64_t m = x.size(0), n = layer.out_features, k = layer.clusters;
  Tensor shared;
  if (axis == 0) {
    shared = gemm(x, centroids);
  } else {
    const Tensor inputs = torch::stable::contiguous(x), sums = empty(x, {m, k}, scalar_type<T>);
    const T* from = static_cast<const T*>(inputs.const_data_ptr());
    T* to = static_cast<T*>(sums.mutable_data_ptr());
    parallel_rows(m, layer.in_features, [&](int64_t j) {
      std::vector<Accumulate<T>> total(k, 0);
      for (int64_t i = 0; i < layer.in_features; ++i)
        total[layer.labels[i]] += layer.scale(i) * static_cast<Accumulate<T>>(from[j * layer.in_features + i]);
      for (int64_t c = 0; c < k; ++c) to[j * k + c] = static_cast<T>(total[c]);
    });
    shared = gemm(sums, centroids);
  }
  shared = torch::stable::contiguous(shared);
  const Tensor low = torch::stable::contiguous(gemm(gemm(x, b), a));
  const T *z = static_cast<const T*>(shared.const_data_ptr()), *rest = static_cast<const T*>(low.const_data_ptr());
  using A = Accumulate<T>;
  parallel_rows(m, n, [&](int64_t j) {
    for (int64_t i = 0; i < n; ++i) {
      const A value =
          axis == 0 ? layer.scale(i) * static_cast<A>(z[j * k + layer.labels[i]]) : static_cast<A>(z[j * n + i]);
      y[j * n + i] = static_cast<T>(value + static_cast<A>(rest[j * n + i]) + layer.shift(i));
    }
  });
}

Tensor swsc_linear(const Tensor& x, const Tensor& centroids, const Tensor& labels, const Tensor& b, const Tensor& a,
                   const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t axis) {
  STD_TORCH_CHECK(x.dim() >= 1 && a.dim() == 2 && centroids.dim() == 2 && (axis == 0 || axis == 1),
                  "swsc_linear: shapes or axis do not fit");
  return with_float_type(x.scalar_type(), "swsc_linear", [&](auto zero) {
    using T = decltype(zero);
    const int64_t in = x.size(x.dim() - 1), out = a.size(0), clusters = centroids.size(axis);
    const int64_t channels = axis == 0 ? out : in;
    const Weight rows(b, dot_type<T>, scalar_type<T>, in, "swsc_linear: b");
    const Layer<T> layer{
        Weight(centroids, dot_type<T>, scalar_type<T>, axis == 0 ? in : clusters, "swsc_linear: centroids"),
        rows,
        Weight(a, dot_type<T>, scalar_type<T>, rows.rows, "swsc_linear: a"),
        indices(labels, channels, clusters, "swsc_linear: labels"),
        entries<T>(scales, channels, "swsc_linear: scales"),
        entries<T>(bias, out, "swsc_linear: bias"),
        clusters,
        in,
        out};
    STD_TORCH_CHECK(axis == 0 || layer.centroids.rows == out, "swsc_linear: centroids: shape does not fit");
    const Tensor y = empty(x, shape_with_last(x, out), scalar_type<T>);
    const Tensor inputs = as_matrix(x);
    const int64_t m = inputs.size(0);
    T* to = static_cast<T*>(y.mutable_data_ptr());
    if constexpr (!std::is_same_v<T, double>) {
      if (m <= kFewRows) {
        const FewInputs few(inputs, zero);
        axis == 0 ? few_outputs_shared<T>(layer, few.data(), m, to) : few_inputs_shared<T>(layer, few.data(), m, to);
        return y;
      }
    }
    many<T>(layer, inputs, centroids, b, a, axis, to);
    return y;
  });
}

TINYCOMP_CPU_KERNEL(swsc_linear, swsc_linear)

}  // namespace
}  // namespace tinycomp
