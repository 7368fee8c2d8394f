// swsc_linear: shared centroids and a low-rank correction, in one parallel region.
#include "../common/beside.h"
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
  double estimate(int64_t m) const {
    return weight_estimate(centroids, m) + weight_estimate(b, m) + weight_estimate(a, m);
  }
};

// Output channels share: everything that reads x is one stage, the second gathers and corrects.
template <class T>
void stream_outputs(const Layer<T>& layer, const Inputs& x, const Output<T>& y) {
  const int64_t m = x.rows, k = layer.clusters, rank = layer.b.rows;
  const Middle shared(kMiddleSlot, m, k), low(kLowSlot, m, rank, T{});
  const int64_t begin = Middle::whole_units(k);  // of b, in a stage with the centroids
  const Stage last_stage = rank > 0 ? row_stage(layer.a, m) : Stage{layer.out_features, kBatch};
  const Stage stages[] = {x.stage(), row_stage(layer.centroids, begin, layer.b, m), last_stage};
  run_stages(stages, layer.estimate(m), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      x.prepare(first, last);
    } else if (stage == 1) {
      if (first < k) dot_rows(layer.centroids, x.operand(), m, first, std::min(last, k), shared.row(0), shared.stride);
      if (last > begin) {
        dot_rows(layer.b, x.operand(), m, std::max(first, begin) - begin, last - begin, low.row(0), low.stride);
        low.done(rank, std::max(first, begin) - begin, last - begin);
      }
    } else {
      dot_rows(layer.a, low.operand(0, rank), m, first, last, [&](int64_t j, int64_t i, float* values, int64_t n) {
        add_gathered(shared.row(j), layer.labels, layer.scales, i, n, values);
        y.store(j, i, values, n);
      });
    }
  });
}

// Input channels share: their sums replace the inputs of the centroids.
template <class T>
void stream_inputs(const Layer<T>& layer, const Inputs& x, const Output<T>& y) {
  const int64_t m = x.rows, k = layer.clusters, rank = layer.b.rows, n = layer.out_features;
  const Middle sums(kMiddleSlot, m, k, T{}), low(kLowSlot, m, rank, T{});
  const Middle shared(kLinkSlot, m, n);
  const int64_t begin = Middle::whole_units(k);  // of b, in a stage with the sums' arrangement
  const Stage readers{begin + rank, row_stage(layer.b, m).chunk};
  const Stage stages[] = {x.stage(), {m, 1}, readers, row_stage(layer.centroids, m)};
  run_stages(stages, layer.estimate(m), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      x.prepare(first, last);
    } else if (stage == 1) {
      const Scratch line(kResultSlot, x.cols);
      for (int64_t j = first; j < last; ++j) {
        x.take(j, 0, x.cols, line.data());
        float* to = std::fill_n(sums.row(j), k, 0.0f) - k;
        for (int64_t i = 0; i < x.cols; ++i) to[layer.labels[i]] += layer.scale(i) * line.data()[i];
      }
    } else if (stage == 2) {
      if (first < k) sums.done(k, first, std::min(last, k));
      if (last > begin) {
        dot_rows(layer.b, x.operand(), m, std::max(first, begin) - begin, last - begin, low.row(0), low.stride);
        low.done(rank, std::max(first, begin) - begin, last - begin);
      }
    } else {
      dot_rows(layer.centroids, sums.operand(0, k), m, first, last, shared.row(0), shared.stride);
      dot_rows(layer.a, low.operand(0, rank), m, first, last, [&](int64_t j, int64_t i, float* values, int64_t count) {
        for (int64_t c = 0; c < count; ++c) values[c] += shared.row(j)[i + c];
        y.store(j, i, values, count);
      });
    }
  });
}

// to[i] = scales[i] from[labels[i]]
template <class T>
void take(const T* __restrict from, const std::vector<int32_t>& labels, const std::vector<T>& scales,
          T* __restrict to) {
  const int64_t n = static_cast<int64_t>(labels.size());
  const int32_t* __restrict at = labels.data();
  const T* __restrict scale = scales.data();
  if (scales.empty())
    for (int64_t i = 0; i < n; ++i) to[i] = from[at[i]];
  else
    for (int64_t i = 0; i < n; ++i) to[i] = scale[i] * from[at[i]];
}

// to[labels[i]] += scales[i] from[i]
template <class T>
void give(const T* __restrict from, const std::vector<int32_t>& labels, const std::vector<T>& scales,
          T* __restrict to) {
  const int64_t n = static_cast<int64_t>(labels.size());
  for (int64_t i = 0; i < n; ++i) to[labels[i]] += scales.empty() ? from[i] : scales[i] * from[i];
}

template <class T>
void through_torch(const Layer<T>& layer, const Tensor& x, const Tensor& centroids, const Tensor& b, const Tensor& a,
                   int64_t axis, const Tensor& y) {
  const int64_t m = x.size(0), n = layer.out_features, k = layer.clusters, in = layer.in_features;
  const int64_t matrix[] = {m, n};
  T* const results = static_cast<T*>(y.mutable_data_ptr());
  if (axis == 0) {
    const Tensor shared = adjacent(gemm(x, centroids));
    const T* z = static_cast<const T*>(shared.const_data_ptr());
    parallel_rows(m, n, [&](int64_t j) { take(z + j * k, layer.labels, layer.scales, results + j * n); });
  } else {
    const Tensor inputs = adjacent(x), sums = empty({m, k}, scalar_type<T>);
    const T* from = static_cast<const T*>(inputs.const_data_ptr());
    T* to = static_cast<T*>(sums.mutable_data_ptr());
    parallel_rows(m, in, [&](int64_t j) {
      give(from + j * in, layer.labels, layer.scales, std::fill_n(to + j * k, k, T(0)) - k);
    });
    gemm(sums, centroids, torch::stable::view(y, {matrix, 2}));
  }
  if (layer.b.rows > 0) {
    const Tensor low = adjacent(gemm(gemm(x, b), a));
    const T* rest = static_cast<const T*>(low.const_data_ptr());
    parallel_rows(m, n, [&](int64_t j) {
      for (int64_t i = j * n; i < (j + 1) * n; ++i) results[i] += rest[i];
    });
  }
  add_bias<T>(results, m, n, layer.bias);
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
    const Tensor y = empty(shape_with_last(x, out), scalar_type<T>);
    if constexpr (may_use_torch<T>) {
      if (uses_torch<T>(row_count(x))) {
        through_torch(layer, as_matrix(x), centroids, b, a, axis, y);
        return y;
      }
    }
    if constexpr (!std::is_same_v<T, double>) {
      const Inputs inputs(x, zero, kAny);
      const Output<T> results{static_cast<T*>(y.mutable_data_ptr()), out, layer.bias};
      axis == 0 ? stream_outputs(layer, inputs, results) : stream_inputs(layer, inputs, results);
    }
    return y;
  });
}

TINYCOMP_CPU_KERNEL(swsc_linear, swsc_linear)
TINYCOMP_CPU_KERNEL_BESIDE(swsc_linears, swsc_linear, 6)

}  // namespace
}  // namespace tinycomp
