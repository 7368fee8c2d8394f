// Packed sparse weights of a call: checked, and told apart by their format.
#pragma once

#include "linear_host.cuh"

namespace tinycomp::cuda {

// A weight of one of the formats of masked_linear, with the tensors that hold it.
template <class T>
struct PackedWeight {
  Tensor values;
  Rows<uint8_t> mask;
  Vector<int> offsets;
  Scales<T> scales;
  Storage storage;
  PackedWeight(const Tensor& packed, const Tensor& bits, const std::optional<Tensor>& starts,
               const std::optional<Tensor>& scale, int64_t rows, int columns, const std::string& format,
               int64_t value_bits)
      : values(adjacent(packed)),
        mask(bits, ScalarType::Byte, ceil_div(columns, format == "block32" ? 256 : 8), "mask"),
        offsets(starts, ScalarType::Int, mask.rows + 1, "offsets"),
        scales(scale, rows, 1, "scales"),
        storage{values.const_data_ptr(),
                mask.data,
                offsets.data,
                scales.data,
                nullptr,
                mask.stride,
                to_int(rows, "out_features"),
                columns,
                1,
                scales.wide,
                0} {
    STD_TORCH_CHECK(bits.dim() == 2 && mask.rows == (format == "block32" ? ceil_div(rows, 32) : rows),
                    "mask: shape does not fit");
    STD_TORCH_CHECK(format == "2:4" || offsets.data, "offsets are missing");
    STD_TORCH_CHECK(value_bits == 0 || scales.data, "scales are missing");
  }
};

// Calls `body` with an empty weight of the type that reads `format`.
template <class T, class Body>
Tensor with_format(const std::string& format, int64_t value_bits, Body body) {
  const auto by_bits = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    STD_TORCH_CHECK(format == "bitmask" || format == "2:4" || format == "block32",
                    "format is not supported on the device");
    return format == "bitmask" ? body(Bitmask<T, kBits>{})
           : format == "2:4"   ? body(TwoOfFour<T, kBits>{})
                               : body(Blocks<T, kBits>{});
  };
  STD_TORCH_CHECK(value_bits == 0 || value_bits == 8 || value_bits == 4, "value_bits is not allowed");
  return value_bits == 0   ? by_bits(std::integral_constant<int, 0>{})
         : value_bits == 8 ? by_bits(std::integral_constant<int, 8>{})
                           : by_bits(std::integral_constant<int, 4>{});
}

// Compiled once: in the file of masked_linear.
#define TINYCOMP_SHARED_FORMAT(declared, W, T)                                                                        \
  declared template void product<T, W<T, 0>>(const Device&, const Matrix<T>&, int, const Storage&, const Output<T>&); \
  declared template void product<T, W<T, 8>>(const Device&, const Matrix<T>&, int, const Storage&, const Output<T>&); \
  declared template void product<T, W<T, 4>>(const Device&, const Matrix<T>&, int, const Storage&, const Output<T>&);
#define TINYCOMP_SHARED_FORMATS(declared, T)     \
  TINYCOMP_SHARED_FORMAT(declared, Bitmask, T)   \
  TINYCOMP_SHARED_FORMAT(declared, TwoOfFour, T) \
  TINYCOMP_SHARED_FORMAT(declared, Blocks, T)
TINYCOMP_SHARED_FORMATS(extern, float)
TINYCOMP_SHARED_FORMATS(extern, bf16)
TINYCOMP_SHARED_FORMATS(extern, f16)

}  // namespace tinycomp::cuda
