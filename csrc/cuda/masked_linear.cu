// masked_linear: packed sparse weights, unpacked in registers on their way to the tensor cores.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

template <class T, int kBits>
void by_format(const Device& device, const std::string& format, const Rows<T>& x, const Storage& w,
               const Output<T>& out) {
  if (format == "bitmask")
    product<T, Bitmask<T, kBits>>(device, x.matrix(), x.rows, w, out);
  else if (format == "2:4")
    product<T, TwoOfFour<T, kBits>>(device, x.matrix(), x.rows, w, out);
  else
    product<T, Blocks<T, kBits>>(device, x.matrix(), x.rows, w, out);
}

Tensor masked_linear(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t out_features,
                     std::string format, int64_t value_bits) {
  return with_float_type(x.scalar_type(), "masked_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    STD_TORCH_CHECK(format == "bitmask" || format == "2:4" || format == "block32",
                    "masked_linear: format is not supported on the device");
    STD_TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == ScalarType::Byte && (value_bits == 0 || scales),
                    "masked_linear: mask or scales do not fit");
    const bool blocks = format == "block32";
    const Rows<T> inputs(x, -1, "masked_linear: x");
    const Tensor packed = adjacent(values);
    const Rows<uint8_t> bits(mask, ScalarType::Byte, ceil_div(inputs.columns, blocks ? 256 : 8), "masked_linear: mask");
    STD_TORCH_CHECK(bits.rows == (blocks ? ceil_div(out_features, 32) : out_features),
                    "masked_linear: mask does not fit");
    const Vector<int> starts(offsets, ScalarType::Int, bits.rows + 1, "masked_linear: offsets");
    STD_TORCH_CHECK(format == "2:4" || starts.data, "masked_linear: offsets are missing");
    const Scales<T> scale(scales, out_features, 1, "masked_linear: scales");
    const Vector<T> shift(bias, scalar_type<T>, out_features, "masked_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, out_features), scalar_type<T>);
    const Storage w{packed.const_data_ptr(),
                    bits.data,
                    starts.data,
                    scale.data,
                    nullptr,
                    bits.stride,
                    to_int(out_features, "masked_linear: out_features"),
                    inputs.columns,
                    1,
                    scale.wide,
                    0};
    const Output<T> out = into(y, out_features, shift.data);
    if (value_bits == 0)
      by_format<T, 0>(device, format, inputs, w, out);
    else if (value_bits == 8)
      by_format<T, 8>(device, format, inputs, w, out);
    else
      by_format<T, 4>(device, format, inputs, w, out);
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(masked_linear, masked_linear)

}  // namespace tinycomp::cuda
#endif
