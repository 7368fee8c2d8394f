// quant_linear: int8 or int4 weights, rebuilt in registers on their way to the tensor cores; with rounded inputs,
// multiplied as integers.
#include "integer.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

#define TINYCOMP_PASS_LEVELS(x) x.levels, x.stride, x.scales, x.inputs, x.columns, x.group, x.padded

namespace tinycomp::cuda {

// Inputs that share a scale where those of a row of the weight all do: ACTIVATION_GROUP of the contract.
constexpr int kActivationGroup = 128;

template <class T, int kBits, int kBytes>
void launch_integer_decode(const Device& device, const RoundedInputs& x, const Storage& w, const Output<T>& o) {
  TINYCOMP_LAUNCH((integer_decode<T, kBits, kBytes>), dim3(ceil_div(w.rows, 8)), dim3(kDecodeThreads),
                  decode_shared_bytes<1>, device.stream, TINYCOMP_PASS_LEVELS(x), TINYCOMP_PASS_WEIGHT(w),
                  TINYCOMP_PASS_OUTPUT(o));
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

// y = x wᵀ with x rounded by row and group: two launches.
template <class T, int kBits>
void integer_product(const Device& device, const Tensor& like, const Rows<T>& x, const Storage& w, int64_t group_size,
                     const Output<T>& o) {
  if (x.rows == 0 || w.rows == 0) return;
  // A group that is longer than a row ends with it; a row without columns has none.
  int group = group_size ? w.group : kActivationGroup;
  group = w.columns == 0 ? 1 : w.columns < group ? w.columns : group;
  STD_TORCH_CHECK(group <= 1 << 17, "quant_linear: a group is too long for sums in int32");
  const int groups = static_cast<int>(ceil_div(w.columns, group)), padded = static_cast<int>(ceil_div(group, 32) * 32);
  const int64_t stride = ceil_div(static_cast<int64_t>(groups) * padded, 128) * 128;
  const Tensor levels = empty(like, {x.rows, stride}, ScalarType::Char);
  const Tensor scales = empty(like, {groups, x.rows}, ScalarType::Float);
  auto* to_levels = static_cast<int8_t*>(levels.mutable_data_ptr());
  auto* to_scales = static_cast<float*>(scales.mutable_data_ptr());
  const RoundedInputs rounded{to_levels, stride, to_scales, x.rows, to_int(static_cast<int64_t>(groups) * padded, "x"),
                              group,     padded};
  if (groups > 0) {
    const int64_t blocks = ceil_div(groups, kRoundThreads / 32);
    TINYCOMP_LAUNCH(round_kernel<T>, dim3(x.rows, blocks < 65535 ? blocks : 65535), dim3(kRoundThreads), 0,
                    device.stream, TINYCOMP_PASS_INPUT(x), to_levels, stride, to_scales, x.columns, group, padded);
    device.check_launch();
  }
  const Config config = pick_config({{x.rows, w.columns, w.rows}}, device.processors);
  constexpr int kWide = 4 * 128 / kBits;  // columns that a warp reads 16 bytes at a time
  if (config.decode && padded % kWide == 0)
    launch_integer_decode<T, kBits, 16>(device, rounded, w, o);
  else if (config.decode)
    launch_integer_decode<T, kBits, kBits>(device, rounded, w, o);
  else if (padded % 128 != 0)
    launch_integer_tiles<T, kBits, SmallTile, 1>(device, rounded, w, o);
  else if (config.large)
    launch_integer_tiles<T, kBits, LargeIntegerTile, 4>(device, rounded, w, o);
  else
    launch_integer_tiles<T, kBits, SmallTile, 4>(device, rounded, w, o);
}

Tensor quant_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t bits, int64_t group_size, int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0 || activation_bits == 8, "quant_linear: activation_bits is not allowed");
  return with_float_type(x.scalar_type(), "quant_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "quant_linear: x");
    const RoundedWeight<T> w(qweight, scales, zeros, inputs.columns, bits, group_size, "quant_linear: qweight");
    const Vector<T> shift(bias, scalar_type<T>, w.storage.rows, "quant_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, w.storage.rows), scalar_type<T>);
    const Output<T> out = into(y, w.storage.rows, shift.data);
    if (activation_bits == 8 && bits == 8)
      integer_product<T, 8>(device, x, inputs, w.storage, group_size, out);
    else if (activation_bits == 8)
      integer_product<T, 4>(device, x, inputs, w.storage, group_size, out);
    else if (bits == 8)
      product<T, Rounded<T, 8>>(device, inputs.matrix(), inputs.rows, w.storage, out);
    else
      product<T, Rounded<T, 4>>(device, inputs.matrix(), inputs.rows, w.storage, out);
    return y;
  });
}

TINYCOMP_SHARED_PRODUCT(, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_PRODUCT(, TINYCOMP_ROUNDED4)
TINYCOMP_CUDA_KERNEL(quant_linear, quant_linear)

}  // namespace tinycomp::cuda
#endif
