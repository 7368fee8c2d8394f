// Launches of the linear layers: views of the tensors that hold a weight, and the choice between decode and tiles.
#pragma once

#include "config.h"
#include "host.cuh"
#include "linear.cuh"

#define TINYCOMP_PASS_INPUT(x) x.data, x.stride, x.vector
#define TINYCOMP_PASS_WEIGHT(w) \
  w.data, w.mask, w.offsets, w.scales, w.zeros, w.stride, w.rows, w.columns, w.group, w.wide_scales, w.vector
#define TINYCOMP_PASS_OUTPUT(o) \
  o.y, o.y_stride, o.kept, o.kept_stride, o.order, o.bias, o.base, o.base_stride, o.labels, o.label_bytes, o.scales

namespace tinycomp::cuda {

template <class T>
Storage dense(const Rows<T>& w) {
  return {w.data, nullptr, nullptr, nullptr, nullptr, w.stride, w.rows, w.columns, 1, 0, w.vector};
}

// Scales or zeros of rounded weights: adjacent, float32 or the dtype of the inputs.
template <class T>
struct Scales {
  std::optional<Tensor> tensor;
  const void* data = nullptr;
  int wide = 0;
  Scales(const std::optional<Tensor>& t, int64_t rows, int64_t groups, const char* name) {
    if (!t) return;
    wide = t->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(
        t->dim() == 2 && t->size(0) == rows && t->size(1) == groups && (wide || t->scalar_type() == scalar_type<T>),
        name, ": shape or dtype does not fit");
    tensor = adjacent(*t);
    data = tensor->const_data_ptr();
  }
};

// A weight rounded to int8 or packed int4, with the tensors that hold it.
template <class T>
struct RoundedWeight {
  Rows<uint8_t> levels;
  int64_t groups;
  Scales<T> scales, zeros;
  Storage storage;
  RoundedWeight(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero, int64_t columns, int64_t bits,
                int64_t group_size, const char* name)
      : levels(q, bits == 8 ? ScalarType::Char : ScalarType::Byte, bits == 8 ? columns : (columns + 1) / 2, name),
        groups(group_size ? ceil_div(columns, group_size) : 1),
        scales(scale, levels.rows, groups, name),
        zeros(zero, levels.rows, groups, name),
        storage{levels.data,
                nullptr,
                nullptr,
                scales.data,
                zeros.data,
                levels.stride,
                levels.rows,
                to_int(columns, name),
                static_cast<int>(group_size    ? group_size
                                 : columns > 0 ? columns
                                               : 1),
                scales.wide,
                vector_aligned(levels.data, levels.stride)} {
    STD_TORCH_CHECK((bits == 8 || bits == 4) && group_size >= 0, name, ": bits or group_size is not allowed");
    STD_TORCH_CHECK(!zero || zeros.wide == scales.wide, name, ": zeros and scales differ in dtype");
  }
};

template <class T, class W, int kTiles>
void launch_decode(const Device& device, const Matrix<T>& x, const Storage& w, const Output<T>& o, int inputs) {
  TINYCOMP_LAUNCH((product_decode<T, W, kTiles>), dim3(ceil_div(w.rows, 8 * kTiles)), dim3(kDecodeThreads),
                  decode_shared_bytes<kTiles>, device.stream, TINYCOMP_PASS_INPUT(x), TINYCOMP_PASS_WEIGHT(w),
                  TINYCOMP_PASS_OUTPUT(o), inputs);
  device.check_launch();
}

template <class T, class W, class Tile>
void launch_tiles(const Device& device, const Matrix<T>& x, const Storage& w, const Output<T>& o, int inputs) {
  allow_shared_memory(product_tiles<T, W, Tile>, Tile::kSharedBytes);
  TINYCOMP_LAUNCH((product_tiles<T, W, Tile>), dim3(ceil_div(inputs, Tile::kM), ceil_div(w.rows, Tile::kN)),
                  dim3(Tile::kThreads), Tile::kSharedBytes, device.stream, TINYCOMP_PASS_INPUT(x),
                  TINYCOMP_PASS_WEIGHT(w), TINYCOMP_PASS_OUTPUT(o), inputs);
  device.check_launch();
}

template <class T>
void launch_wgmma(const Device&, const Matrix<T>&, const Storage&, const Output<T>&, int inputs);
template <class T>
void launch_tcgen05(const Device&, const Matrix<T>&, const Storage&, const Output<T>&, int inputs);

// Storages that are unpacked in registers run on small tiles: their work per block is the unpacking. So does float32,
// whose products take registers, not tensor cores.
template <class T, class W>
void product(const Device& device, const Matrix<T>& x, int inputs, const Storage& w, const Output<T>& o) {
  if (inputs == 0 || w.rows == 0) return;
  const Config config = pick_config({{inputs, w.columns, w.rows}}, device.processors, device.instructions);
  if constexpr (W::kCopies)
    if (config.decode && config.row_tiles == 2) return launch_decode<T, W, 2>(device, x, w, o, inputs);
  if constexpr (W::kCopies && sizeof(T) == 2) {
    // Tensor copies want what 16-byte copies want, and at least one column.
    if (x.vector && w.vector && w.columns > 0) {
      if (config.instructions == kWgmma) return launch_wgmma<T>(device, x, w, o, inputs);
      if (config.instructions == kTcgen05) return launch_tcgen05<T>(device, x, w, o, inputs);
    }
    if (!config.decode && config.large) return launch_tiles<T, W, LargeTile>(device, x, w, o, inputs);
  }
  if (config.decode)
    launch_decode<T, W, 1>(device, x, w, o, inputs);
  else
    launch_tiles<T, W, SmallTile>(device, x, w, o, inputs);
}

// b (a x): one launch for few inputs.
template <class T, class A, class B>
void chain(const Device& device, const Matrix<T>& x, int inputs, const Storage& a, const Output<T>& p, const Storage& b,
           const Output<T>& q) {
  if (inputs == 0 || b.rows + a.rows == 0) return;
  const Config config = pick_config({{inputs, a.columns, a.rows}, {inputs, b.columns, b.rows}}, device.processors);
  if (!config.decode) {
    product<T, A>(device, x, inputs, a, p);
    return product<T, B>(device, p.next(), inputs, b, q);
  }
  const auto launch = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    TINYCOMP_LAUNCH((chain2_decode<T, A, B, kTiles>), dim3(config.blocks), dim3(kDecodeThreads),
                    decode_shared_bytes<kTiles>, device.stream, TINYCOMP_PASS_INPUT(x), TINYCOMP_PASS_WEIGHT(a),
                    TINYCOMP_PASS_OUTPUT(p), TINYCOMP_PASS_WEIGHT(b), TINYCOMP_PASS_OUTPUT(q), device.counters(),
                    inputs);
    device.check_launch();
  };
  if constexpr (A::kCopies && B::kCopies)
    if (config.row_tiles == 2) return launch(std::integral_constant<int, 2>{});
  launch(std::integral_constant<int, 1>{});
}

// c (b (a x)), or with kForked a x and c (b x), the third product adding what the first one kept.
template <class T, bool kForked, class W = Dense<T>>
void chain(const Device& device, const Matrix<T>& x, int inputs, const Storage& a, const Output<T>& p, const Storage& b,
           const Output<T>& q, const Storage& c, const Output<T>& o) {
  if (inputs == 0 || c.rows == 0) return;
  const Config config = pick_config(
      {{inputs, a.columns, a.rows}, {inputs, b.columns, b.rows}, {inputs, c.columns, c.rows}}, device.processors);
  if (!config.decode) {
    product<T, W>(device, x, inputs, a, p);
    product<T, W>(device, kForked ? x : p.next(), inputs, b, q);
    return product<T, W>(device, q.next(), inputs, c, o);
  }
  const auto launch = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    TINYCOMP_LAUNCH((chain3_decode<T, W, W, W, kForked, kTiles>), dim3(config.blocks), dim3(kDecodeThreads),
                    decode_shared_bytes<kTiles>, device.stream, TINYCOMP_PASS_INPUT(x), TINYCOMP_PASS_WEIGHT(a),
                    TINYCOMP_PASS_OUTPUT(p), TINYCOMP_PASS_WEIGHT(b), TINYCOMP_PASS_OUTPUT(q), TINYCOMP_PASS_WEIGHT(c),
                    TINYCOMP_PASS_OUTPUT(o), device.counters(), inputs);
    device.check_launch();
  };
  if constexpr (W::kCopies)
    if (config.row_tiles == 2) return launch(std::integral_constant<int, 2>{});
  launch(std::integral_constant<int, 1>{});
}

// Kernels that several ops launch are compiled once: in the file of the op that is no more than that launch.
#define TINYCOMP_SHARED_PRODUCT(declared, W)                                                                \
  declared template void product<float, W(float)>(const Device&, const Matrix<float>&, int, const Storage&, \
                                                  const Output<float>&);                                    \
  declared template void product<bf16, W(bf16)>(const Device&, const Matrix<bf16>&, int, const Storage&,    \
                                                const Output<bf16>&);                                       \
  declared template void product<f16, W(f16)>(const Device&, const Matrix<f16>&, int, const Storage&,       \
                                              const Output<f16>&);
#define TINYCOMP_DENSE(T) Dense<T>
#define TINYCOMP_ROUNDED8(T) Rounded<T, 8>
#define TINYCOMP_ROUNDED4(T) Rounded<T, 4>
TINYCOMP_SHARED_PRODUCT(extern, TINYCOMP_DENSE)
TINYCOMP_SHARED_PRODUCT(extern, TINYCOMP_ROUNDED8)
TINYCOMP_SHARED_PRODUCT(extern, TINYCOMP_ROUNDED4)
extern template void chain<float, Dense<float>, Dense<float>>(const Device&, const Matrix<float>&, int, const Storage&,
                                                              const Output<float>&, const Storage&,
                                                              const Output<float>&);
extern template void chain<bf16, Dense<bf16>, Dense<bf16>>(const Device&, const Matrix<bf16>&, int, const Storage&,
                                                           const Output<bf16>&, const Storage&, const Output<bf16>&);
extern template void chain<f16, Dense<f16>, Dense<f16>>(const Device&, const Matrix<f16>&, int, const Storage&,
                                                        const Output<f16>&, const Storage&, const Output<f16>&);

// The result of a layer, and the outputs that fill it or a matrix between two products.
template <class T>
Output<T> into(const Tensor& y, int64_t features, const T* bias = nullptr, const int* order = nullptr) {
  return {static_cast<T*>(y.mutable_data_ptr()), features, nullptr, 0, order, bias};
}
template <class T>
Output<T> keep(const Between<T>& z) {
  return {nullptr, 0, z.data, z.stride};
}

}  // namespace tinycomp::cuda
