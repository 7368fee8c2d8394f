// quant_swsc_linear: swsc_linear on rounded centroids and factors, in one parallel region; what lies between two
// products stays in float32, or is rounded again for the next one.
#include "../common/beside.h"
#include "../common/rounded_linear.h"

namespace tinycomp {
namespace {

// Arguments after checking.
template <class T>
struct Layer {
  const RoundedWeight &centroids, &b, &a;
  std::vector<int32_t> labels;
  std::vector<Accumulate<T>> scales, bias;
  int64_t clusters, out_features;

  Accumulate<T> scale(int64_t i) const { return scales.empty() ? 1 : scales[i]; }
  double estimate(int64_t m) const { return centroids.estimate(m) + b.estimate(m) + a.estimate(m); }
  // to[c] = sum of scales[i] from[i] over labels[i] = c
  void sum(const Accumulate<T>* from, Accumulate<T>* to) const {
    std::fill_n(to, clusters, Accumulate<T>(0));
    for (size_t i = 0; i < labels.size(); ++i) to[labels[i]] += scale(i) * from[i];
  }
};

// The rank-0 form of a's product: store(j, i, zeros, n).
template <class Store>
void no_correction(int64_t m, int64_t first, int64_t last, const Store& store) {
  float values[kBatch];
  for (int64_t i = first; i < last; i += kBatch)
    for (int64_t j = 0; j < m; ++j) {
      const int64_t n = std::min(kBatch, last - i);
      std::fill_n(values, n, 0.0f);
      store(j, i, values, n);
    }
}

// A store of dot_rows that copies.
auto copy_into(const Middle& to) {
  return [&to](int64_t j, int64_t i, const float* values, int64_t n) { std::copy_n(values, n, to.row(j) + i); };
}

// Output channels share: everything that reads x is one stage, the last one gathers and corrects.
template <class T>
void stream_outputs(const Layer<T>& layer, const Inputs& wide, const Output<T>& y) {
  const int64_t m = wide.rows, k = layer.clusters, rank = layer.b.rows;
  const Middle shared(kMiddleSlot, m, k), low(kLowSlot, m, rank, false);
  const RoundedInputs x(layer.centroids, wide.data(), m, kLevelSlot, in_pairs<T>(0), layer.b.has_zeros());
  const RoundedInputs inner(layer.a, low.row(0), m, kMiddleLevelSlot, in_pairs<T>(0));
  const Stage middle{rank > 0 ? m : 0, inner.stage().chunk};
  const Stage stages[] = {wide.stage(), x.stage(), layer.centroids.stage(k, layer.b, m), middle, layer.a.stage(m)};
  run_stages(stages, layer.estimate(m), [&](int stage, int64_t first, int64_t last) {
    const auto corrected = [&](int64_t j, int64_t i, float* values, int64_t n) {
      add_gathered(shared.row(j), layer.labels, layer.scales, i, n, values);
      y.store(j, i, values, n);
    };
    if (stage == 0) {
      wide.prepare(first, last);
    } else if (stage == 1) {
      x.prepare(first, last);
    } else if (stage == 2) {
      if (first < k) x.dot_rows(first, std::min(last, k), copy_into(shared));
      if (last > k) x.dot_rows(layer.b, std::max(first, k) - k, last - k, copy_into(low));
    } else if (stage == 3) {
      inner.prepare(first, last);
    } else if (rank > 0) {
      inner.dot_rows(first, last, corrected);
    } else {
      no_correction(m, first, last, corrected);
    }
  });
}

// Input channels share: their sums replace the inputs of the centroids.
template <class T>
void stream_inputs(const Layer<T>& layer, const Inputs& wide, const Output<T>& y) {
  const int64_t m = wide.rows, rank = layer.b.rows, n = layer.out_features;
  const Middle sums(kMiddleSlot, m, layer.clusters, false), low(kLowSlot, m, rank, false);
  const Middle shared(kLinkSlot, rank > 0 ? m : 0, n);
  const RoundedInputs x(layer.b, wide.data(), m, kLevelSlot, in_pairs<T>(0));
  const RoundedInputs inner(layer.a, low.row(0), m, kMiddleLevelSlot, in_pairs<T>(0));
  const RoundedInputs summed(layer.centroids, sums.row(0), m, kSumLevelSlot, in_pairs<T>(0));
  const Stage middle{rank > 0 ? m : 0, inner.stage().chunk};
  const Stage last_stage = (rank > layer.clusters ? layer.a : layer.centroids).stage(m);
  const Stage stages[] = {wide.stage(), {m, 1}, layer.b.stage(m), middle, last_stage};
  run_stages(stages, layer.estimate(m), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) {
      wide.prepare(first, last);
    } else if (stage == 1) {
      for (int64_t j = first; j < last; ++j) layer.sum(wide.data() + j * wide.stride, sums.row(j));
      summed.prepare(first, last);
      if (rank > 0) x.prepare(first, last);
    } else if (stage == 2) {
      x.dot_rows(first, last, copy_into(low));
    } else if (stage == 3) {
      inner.prepare(first, last);
    } else if (rank > 0) {
      summed.dot_rows(first, last, copy_into(shared));
      inner.dot_rows(first, last, [&](int64_t j, int64_t i, float* values, int64_t count) {
        for (int64_t c = 0; c < count; ++c) values[c] += shared.row(j)[i + c];
        y.store(j, i, values, count);
      });
    } else {
      summed.dot_rows(first, last,
                      [&](int64_t j, int64_t i, float* values, int64_t count) { y.store(j, i, values, count); });
    }
  });
}

// All in double, the products through torch.
void through_torch(const Layer<double>& layer, const Tensor& x, int64_t axis, const Tensor& y) {
  const int64_t m = x.size(0), in = x.size(1), n = layer.out_features, k = layer.clusters;
  const auto product = [](const RoundedWeight& w, const Tensor& inputs) {
    return adjacent(gemm(w.inputs(inputs), w.dense()));
  };
  Tensor read = adjacent(x);
  if (axis == 1) {
    const Tensor sums = empty({m, k}, ScalarType::Double);
    const auto* from = static_cast<const double*>(read.const_data_ptr());
    auto* to = static_cast<double*>(sums.mutable_data_ptr());
    parallel_rows(m, in, [&](int64_t j) { layer.sum(from + j * in, to + j * k); });
    read = sums;
  }
  const Tensor shared = product(layer.centroids, read);
  std::optional<Tensor> low;
  if (layer.b.rows > 0) low = product(layer.a, product(layer.b, x));
  const auto* z = static_cast<const double*>(shared.const_data_ptr());
  const auto* rest = low ? static_cast<const double*>(low->const_data_ptr()) : nullptr;
  auto* to = static_cast<double*>(y.mutable_data_ptr());
  parallel_rows(m, n, [&](int64_t j) {
    for (int64_t i = 0; i < n; ++i) {
      const double value = axis == 0 ? layer.scale(i) * z[j * k + layer.labels[i]] : z[j * n + i];
      to[j * n + i] = rest != nullptr ? value + rest[j * n + i] : value;
    }
  });
  add_bias<double>(to, m, n, layer.bias);
}

Tensor quant_swsc_linear(const Tensor& x, const Tensor& centroids, const Tensor& centroid_scales, const Tensor& labels,
                         const Tensor& b, const Tensor& b_scales, const Tensor& a, const Tensor& a_scales,
                         const std::optional<Tensor>& centroid_zeros, const std::optional<Tensor>& b_zeros,
                         const std::optional<Tensor>& a_zeros, const std::optional<Tensor>& scales,
                         const std::optional<Tensor>& bias, int64_t axis, int64_t bits, int64_t group_size,
                         int64_t activation_bits) {
  STD_TORCH_CHECK(x.dim() >= 1 && a.dim() == 2 && centroids.dim() == 2 && (axis == 0 || axis == 1),
                  "quant_swsc_linear: shapes or axis do not fit");
  const int64_t in = x.size(x.dim() - 1), out = a.size(0), channels = axis == 0 ? out : in;
  // Of packed columns there may be one more than clusters: one that no label names, whose sum is zero.
  const int64_t clusters = axis == 0 ? centroids.size(0) : centroids.size(1) * (bits == 4 ? 2 : 1);
  const RoundedWeight shared(centroids, centroid_scales, centroid_zeros, axis == 0 ? in : clusters, bits, group_size,
                             activation_bits, "quant_swsc_linear: centroids");
  const RoundedWeight down(b, b_scales, b_zeros, in, bits, group_size, activation_bits, "quant_swsc_linear: b");
  const RoundedWeight up(a, a_scales, a_zeros, down.rows, bits, group_size, activation_bits, "quant_swsc_linear: a");
  STD_TORCH_CHECK(axis == 0 || shared.rows == out, "quant_swsc_linear: centroids: shape does not fit");
  return with_float_type(x.scalar_type(), "quant_swsc_linear", [&](auto zero) {
    using T = decltype(zero);
    const Layer<T> layer{shared,
                         down,
                         up,
                         indices(labels, channels, clusters, "quant_swsc_linear: labels"),
                         entries<T>(scales, channels, "quant_swsc_linear: scales"),
                         entries<T>(bias, out, "quant_swsc_linear: bias"),
                         clusters,
                         out};
    const Tensor y = empty(shape_with_last(x, out), scalar_type<T>);
    if constexpr (std::is_same_v<T, double>) {
      through_torch(layer, as_matrix(x), axis, y);
    } else {
      const Inputs inputs(x, zero, kWide);
      const Output<T> results{static_cast<T*>(y.mutable_data_ptr()), out, layer.bias};
      axis == 0 ? stream_outputs(layer, inputs, results) : stream_inputs(layer, inputs, results);
    }
    return y;
  });
}

TINYCOMP_CPU_KERNEL(quant_swsc_linear, quant_swsc_linear)
TINYCOMP_CPU_KERNEL_BESIDE(quant_swsc_linears, quant_swsc_linear, 12)

}  // namespace
}  // namespace tinycomp
