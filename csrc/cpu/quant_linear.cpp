// quant_linear: integer weights are streamed as they are stored, the scale of a group is applied to its dot product.
// Many inputs: the weight is rebuilt once in the dtype of x and torch multiplies.
#include "../common/linear.h"

namespace tinycomp {
namespace {

constexpr int64_t kFewRows = 16;
inline int64_t blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
template <class Body>
void parallel_blocks(int64_t count, int64_t bytes_per_row, Body body) {
  const int64_t grain = 1 + 65536 / (kBlockRows * std::max<int64_t>(bytes_per_row, 1));
  torch::stable::parallel_for(0, count, grain, body);
}

// The weight after checking; S is the type of scales and zeros, which are contiguous (rows, groups).
template <class S>
struct Rounded {
  const Weight& stored;
  int64_t cols, group, groups;
  const S *scales, *zeros;  // zeros may be null

  bool four_bits() const { return stored.type == Type::u4; }
  int64_t size(int64_t g) const { return std::min(group, cols - g * group); }
  const char* at(int64_t row, int64_t column) const {
    return stored.data + row * stored.stride + (four_bits() ? column / 2 : column);
  }
  // What the stored level must be lowered by: four-bit levels are read as value - 8 already.
  template <class A>
  A zero(int64_t s) const {
    return zeros ? static_cast<A>(zeros[s]) - (four_bits() ? 8 : 0) : A(0);
  }
};

// Inputs in the order in which the dot product of a group reads them: for four bits, even ones before odd ones.
struct GroupInputs {
  std::vector<float> values, sums;  // sums: (m, groups), what a zero is multiplied by
  int64_t width;                    // floats per input row; an odd last group of four-bit weights is padded with 0

  template <class S>
  GroupInputs(const Rounded<S>& w, const float* x, int64_t m)
      : values(m * (w.cols + 1), 0.0f), sums(m * w.groups, 0.0f), width(w.cols + 1) {
    for (int64_t j = 0; j < m; ++j)
      for (int64_t g = 0; g < w.groups; ++g) {
        const float* from = x + j * w.cols + g * w.group;
        float* to = values.data() + j * width + g * w.group;
        const int64_t size = w.size(g), odd = (size + 1) / 2;
        for (int64_t i = 0; i < size; ++i) {
          to[w.four_bits() ? i / 2 + (i % 2 ? odd : 0) : i] = from[i];
          sums[j * w.groups + g] += from[i];
        }
      }
  }
};

template <class T, class S>
void few(const Rounded<S>& w, const GroupInputs& x, int64_t m, const std::vector<float>& bias, T* y) {
  const int64_t rows = w.stored.rows;
  parallel_blocks(blocks(rows), w.stored.stride, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * kBlockRows, rows);
    for (int64_t i = first * kBlockRows; i < end; i += kBlockRows) {
      const int64_t n = std::min(kBlockRows, end - i);
      float total[kFewRows * kBlockRows] = {}, part[kFewRows * kBlockRows];
      for (int64_t g = 0; g < w.groups; ++g) {
        dot(w.stored.type, w.at(i, g * w.group), w.stored.stride, n, w.size(g), x.values.data() + g * w.group, x.width,
            m, part, kBlockRows);
        for (int64_t r = 0; r < n; ++r) {
          const int64_t s = (i + r) * w.groups + g;
          const float scale = static_cast<float>(w.scales[s]), zero = w.template zero<float>(s);
          for (int64_t j = 0; j < m; ++j)
            total[j * kBlockRows + r] += scale * (part[j * kBlockRows + r] - zero * x.sums[j * w.groups + g]);
        }
      }
      for (int64_t j = 0; j < m; ++j)
        for (int64_t r = 0; r < n; ++r)
          y[j * rows + i + r] = static_cast<T>(total[j * kBlockRows + r] + (bias.empty() ? 0.0f : bias[i + r]));
    }
  });
}

template <class T, class S>
void rebuild(const Rounded<S>& w, T* to) {
  using A = Accumulate<S>;
  parallel_rows(w.stored.rows, w.cols, [&](int64_t i) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t s = i * w.groups + g, start = g * w.group;
      const A scale = static_cast<A>(w.scales[s]), zero = w.template zero<A>(s);
      const uint8_t* from = reinterpret_cast<const uint8_t*>(w.at(i, start));
      T* row = to + i * w.cols + start;
      for (int64_t c = 0; c < w.size(g); ++c) {
        const int level =
            !w.four_bits() ? static_cast<int8_t>(from[c]) : (c % 2 ? from[c / 2] >> 4 : from[c / 2] & 15) - 8;
        row[c] = static_cast<T>((level - zero) * scale);
      }
    }
  });
}

template <class T, class S>
Tensor run(const Tensor& x, const Rounded<S>& w, const std::optional<Tensor>& bias) {
  const auto shift = entries<T>(bias, w.stored.rows, "quant_linear: bias");
  const Tensor inputs = as_matrix(x);
  const int64_t m = inputs.size(0);
  const std::vector<int64_t> shape = shape_with_last(x, w.stored.rows);
  if constexpr (!std::is_same_v<T, double>) {
    if (m <= kFewRows) {
      const Tensor y = empty(x, shape, scalar_type<T>);
      const Inputs wide(inputs, T{});
      wide.prepare(0, wide.stage().size);
      few<T>(w, GroupInputs(w, wide.data(), m), m, shift, static_cast<T*>(y.mutable_data_ptr()));
      return y;
    }
  }
  const Tensor dense = empty(x, {w.stored.rows, w.cols}, scalar_type<T>);
  rebuild<T>(w, static_cast<T*>(dense.mutable_data_ptr()));
  const Tensor y = torch::stable::contiguous(gemm(inputs, dense));
  add_bias<T>(static_cast<T*>(y.mutable_data_ptr()), m, w.stored.rows, shift);
  return torch::stable::view(y, {shape.data(), shape.size()});
}

Tensor quant_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t bits, int64_t group_size) {
  STD_TORCH_CHECK(x.dim() >= 1 && (bits == 8 || bits == 4) && group_size >= 0 && group_size % 2 == 0,
                  "quant_linear: x, bits or group_size do not fit");
  const int64_t in = x.size(x.dim() - 1), group = group_size ? group_size : std::max<int64_t>(in, 1);
  const int64_t groups = group_size ? (in + group - 1) / group : 1;
  const Weight stored(qweight, bits == 8 ? Type::i8 : Type::u4, bits == 8 ? ScalarType::Char : ScalarType::Byte,
                      bits == 8 ? in : (in + 1) / 2, "quant_linear: qweight");
  auto checked = [&](const Tensor& t) {
    STD_TORCH_CHECK(
        t.dim() == 2 && t.size(0) == stored.rows && t.size(1) == groups && t.scalar_type() == scales.scalar_type(),
        "quant_linear: scales or zeros: shape or dtype does not fit");
    return torch::stable::contiguous(t);
  };
  const Tensor steps = checked(scales), levels = zeros ? checked(*zeros) : steps;
  return with_float_type(scales.scalar_type(), "quant_linear: scales", [&](auto scale) {
    using S = decltype(scale);
    const Rounded<S> w{stored,
                       in,
                       group,
                       groups,
                       static_cast<const S*>(steps.const_data_ptr()),
                       zeros ? static_cast<const S*>(levels.const_data_ptr()) : nullptr};
    return with_float_type(x.scalar_type(), "quant_linear", [&](auto zero) { return run<decltype(zero)>(x, w, bias); });
  });
}

TINYCOMP_CPU_KERNEL(quant_linear, quant_linear)

}  // namespace
}  // namespace tinycomp
