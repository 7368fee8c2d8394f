// Launches of layers whose inputs are rounded to int8: one layer, or those that read the same input.
#pragma once

#include "integer.cuh"
#include "linear_host.cuh"

#define TINYCOMP_PASS_LEVELS(x) x.levels, x.stride, x.scales, x.inputs, x.columns, x.group, x.padded

namespace tinycomp::cuda {

// Inputs that share a scale where those of a row of the weight all do: ACTIVATION_GROUP of the contract.
constexpr int kActivationGroup = 128;
constexpr int kIntegerLayers = 3;

template <class T, int kBits, int kBytes>
void launch_integer_decode(const Device& device, const Rows<T>& x, const RoundedInputs& rounded,
                           const IntegerLayer<T> (&layers)[kIntegerLayers], int64_t features) {
  const auto& [a, b, c] = layers;
  int64_t items = static_cast<int64_t>(x.rows) * ceil_div(ceil_div(x.columns, rounded.group), kDecodeWarps);
  for (const IntegerLayer<T>& l : layers) items += ceil_div(l.w.rows, 8);
  const int64_t fit = 3 * static_cast<int64_t>(device.processors);
  TINYCOMP_LAUNCH((integer_decode<T, kBits, kBytes>), dim3(items < fit ? items : fit), dim3(kDecodeThreads),
                  decode_shared_bytes<1>, device.stream, TINYCOMP_PASS_INPUT(x.matrix()), x.columns,
                  TINYCOMP_PASS_LEVELS(rounded), TINYCOMP_PASS_WEIGHT(a.w), a.bias, a.y, TINYCOMP_PASS_WEIGHT(b.w),
                  b.bias, b.y, TINYCOMP_PASS_WEIGHT(c.w), c.bias, c.y, features, device.counters());
  device.check_launch();
}

template <class T, int kBits, class Tile, int kSteps>
void launch_integer_tiles(const Device& device, const RoundedInputs& x, const Storage& w, const Output<T>& o) {
  allow_shared_memory(integer_tiles<T, kBits, Tile, kSteps>, Tile::kSharedBytes);
  TINYCOMP_LAUNCH((integer_tiles<T, kBits, Tile, kSteps>),
                  dim3(ceil_div(x.inputs, Tile::kM), ceil_div(w.rows, Tile::kN)), dim3(Tile::kThreads),
                  Tile::kSharedBytes, device.stream, TINYCOMP_PASS_LEVELS(x), TINYCOMP_PASS_WEIGHT(w),
                  TINYCOMP_PASS_OUTPUT(o));
  device.check_launch();
}

template <class T, int kBits>
void launch_integer_tiles(const Device& device, const RoundedInputs& x, const Storage& w, const Output<T>& o) {
  if (w.rows == 0) return;
  if (x.padded % 128 != 0) return launch_integer_tiles<T, kBits, SmallTile, 1>(device, x, w, o);
  if (pick_config({{x.inputs, w.columns, w.rows}}, device.processors).large)
    return launch_integer_tiles<T, kBits, LargeIntegerTile, 4>(device, x, w, o);
  launch_integer_tiles<T, kBits, SmallTile, 4>(device, x, w, o);
}

// Outputs, `features` apart, of layers of one group size, with x rounded by row and group: one launch for few inputs,
// otherwise one for rounding and one for each layer.
template <class T, int kBits>
void integer_products(const Device& device, const Tensor& like, const Rows<T>& x,
                      const IntegerLayer<T> (&layers)[kIntegerLayers], int64_t features, int64_t group_size) {
  if (x.rows == 0 || features == 0) return;
  // A group that is longer than a row ends with it; a row without columns has none.
  int group = group_size ? layers[0].w.group : kActivationGroup;
  group = x.columns == 0 ? 1 : x.columns < group ? x.columns : group;
  STD_TORCH_CHECK(group <= 1 << 17, "quant_linear: a group is too long for sums in int32");
  const int groups = static_cast<int>(ceil_div(x.columns, group)), padded = static_cast<int>(ceil_div(group, 32) * 32);
  const int64_t stride = ceil_div(static_cast<int64_t>(groups) * padded, 128) * 128;
  const bool few = x.rows <= kDecodeRows;
  const Kept<int8_t> levels(device, like, x.rows * stride, few);
  const Kept<float> scales(device, like, static_cast<int64_t>(groups) * x.rows, few);
  const RoundedInputs rounded{
      levels.data, stride, scales.data, x.rows, to_int(static_cast<int64_t>(groups) * padded, "x"), group, padded};
  if (few) {
    constexpr int kWide = 4 * 128 / kBits;  // columns that a warp reads 16 bytes at a time
    if (padded % kWide == 0) return launch_integer_decode<T, kBits, 16>(device, x, rounded, layers, features);
    return launch_integer_decode<T, kBits, kBits>(device, x, rounded, layers, features);
  }
  if (groups > 0) {
    const int64_t blocks = ceil_div(groups, kRoundThreads / 32);
    TINYCOMP_LAUNCH(round_kernel<T>, dim3(x.rows, blocks < 65535 ? blocks : 65535), dim3(kRoundThreads), 0,
                    device.stream, TINYCOMP_PASS_INPUT(x.matrix()), x.columns, TINYCOMP_PASS_LEVELS(rounded));
    device.check_launch();
  }
  for (const IntegerLayer<T>& l : layers)
    launch_integer_tiles<T, kBits>(
        device, rounded, l.w, Output<T>{l.y, features, nullptr, 0, nullptr, l.bias, nullptr, 0, nullptr, 0, nullptr});
}

// Compiled once: in quant_linear.cu.
#define TINYCOMP_SHARED_INTEGER(declared, T)                                                                 \
  declared template void integer_products<T, 8>(const Device&, const Tensor&, const Rows<T>&,                \
                                                const IntegerLayer<T>(&)[kIntegerLayers], int64_t, int64_t); \
  declared template void integer_products<T, 4>(const Device&, const Tensor&, const Rows<T>&,                \
                                                const IntegerLayer<T>(&)[kIntegerLayers], int64_t, int64_t);
TINYCOMP_SHARED_INTEGER(extern, float)
TINYCOMP_SHARED_INTEGER(extern, bf16)
TINYCOMP_SHARED_INTEGER(extern, f16)

}  // namespace tinycomp::cuda
