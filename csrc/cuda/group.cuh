// Launches of layers that read the same input: low-rank ones, or those of one weight, whose first factor has no rows.
#pragma once

#include "linear_host.cuh"

#define TINYCOMP_PASS_LAYER(l) \
  TINYCOMP_PASS_WEIGHT(l.r), TINYCOMP_PASS_WEIGHT(l.t), l.z, l.z_stride, l.order, l.bias, l.y

namespace tinycomp::cuda {

constexpr int kGroupLayers = 3;

// The layers of a call, with the tensors that hold what their pointers point to.
template <class T>
struct Group {
  GroupLayer<T> layers[kGroupLayers] = {};
  std::vector<Tensor> held;
  int64_t features = 0;

  void hold(const RoundedWeight<T>& w) {
    held.push_back(w.levels.tensor);
    if (w.scales.tensor) held.push_back(*w.scales.tensor);
    if (w.zeros.tensor) held.push_back(*w.zeros.tensor);
  }
  // y = x wᵀ: the second stage alone.
  void add(int at, const Storage& w, const std::optional<Tensor>& bias) {
    const Vector<T> shift(bias, scalar_type<T>, w.rows, "bias");
    layers[at] = {{}, w, nullptr, 0, nullptr, shift.data, nullptr};
    if (shift.tensor) held.push_back(*shift.tensor);
    features += w.rows;
  }
  void add(int at, const Device& device, const Tensor& x, int inputs, const Storage& r, const Storage& t,
           const std::optional<Tensor>& order, const std::optional<Tensor>& bias) {
    const int64_t rows = t.rows + (order ? r.rows : 0);
    const Vector<int> places(order, ScalarType::Int, rows, "order");
    const Vector<T> shift(bias, scalar_type<T>, rows, "bias");
    const Between<T> z(device, x, inputs, r.rows);
    layers[at] = {r, t, z.data, z.stride, places.data, shift.data, nullptr};
    if (z.tensor) held.push_back(*z.tensor);
    for (const auto& tensor : {places.tensor, shift.tensor})
      if (tensor) held.push_back(*tensor);
    features += rows;
  }
  // An empty result for all layers, which from now on have their places in it.
  Tensor outputs(const Tensor& x) {
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    for (GroupLayer<T>& l : layers) l.y = out, out += l.t.rows + (l.order ? l.r.rows : 0);
    return y;
  }
};

// One launch for few inputs, otherwise one for each factor.
template <class T, class W>
Tensor run_group(const Device& device, const Tensor& x, const Rows<T>& inputs, Group<T>& group) {
  const Tensor y = group.outputs(x);
  int64_t ranks = 0, rows = 0;
  int longest = 0;
  for (const GroupLayer<T>& l : group.layers) {
    ranks += l.r.rows, rows += l.t.rows, longest = l.r.rows > longest ? l.r.rows : longest;
  }
  if (inputs.rows == 0 || group.features == 0) return y;
  const Config config =
      ranks > 0 ? pick_config({{inputs.rows, inputs.columns, ranks}, {inputs.rows, longest, rows}}, device.processors)
                : pick_config({{inputs.rows, inputs.columns, rows}}, device.processors);
  if (!config.decode) {
    for (const GroupLayer<T>& l : group.layers) {
      const Output<T> p{l.order ? l.y : nullptr, group.features, l.z, l.z_stride, l.order, l.bias};
      const Output<T> q{l.y, group.features, nullptr, 0, l.order ? l.order + l.r.rows : nullptr, l.bias};
      product<T, W>(device, inputs.matrix(), inputs.rows, l.r, p);
      product<T, W>(device, l.z ? p.next() : inputs.matrix(), inputs.rows, l.t, q);
    }
    return y;
  }
  const auto launch = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    const auto& [a, b, c] = group.layers;
    TINYCOMP_LAUNCH((group_decode<T, W, kTiles>), dim3(config.blocks), dim3(kDecodeThreads),
                    decode_shared_bytes<kTiles>, device.stream, TINYCOMP_PASS_INPUT(inputs.matrix()),
                    TINYCOMP_PASS_LAYER(a), TINYCOMP_PASS_LAYER(b), TINYCOMP_PASS_LAYER(c), group.features,
                    device.counters(), inputs.rows);
    device.check_launch();
  };
  // In float32, two tiles and the layer that was picked take more registers than two blocks have.
  if constexpr (W::kCopies && sizeof(T) == 2)
    if (config.row_tiles == 2) {
      launch(std::integral_constant<int, 2>{});
      return y;
    }
  launch(std::integral_constant<int, 1>{});
  return y;
}

// Compiled once: in the file of the low-rank op.
#define TINYCOMP_SHARED_GROUP(declared, W)                                                                          \
  declared template Tensor run_group<float, W(float)>(const Device&, const Tensor&, const Rows<float>&,             \
                                                      Group<float>&);                                               \
  declared template Tensor run_group<bf16, W(bf16)>(const Device&, const Tensor&, const Rows<bf16>&, Group<bf16>&); \
  declared template Tensor run_group<f16, W(f16)>(const Device&, const Tensor&, const Rows<f16>&, Group<f16>&);
TINYCOMP_SHARED_GROUP(extern, TINYCOMP_DENSE)
TINYCOMP_SHARED_GROUP(extern, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_GROUP(extern, TINYCOMP_ROUNDED4)

}  // namespace tinycomp::cuda
