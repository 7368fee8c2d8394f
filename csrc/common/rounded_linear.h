// What kernels with rounded weights share: a checked weight, its inputs, and products of both.
#pragma once

#include "linear.h"
#include "rounded.h"

namespace tinycomp {

// Up to this many unrounded inputs, levels are widened in registers; for more, rows are rebuilt once, in float32 or,
// where that is what they are rounded to and its products are faster, in bfloat16.
constexpr int64_t kFewInputs = 8, kFewBeforePairs = 2;
// From this many rounded inputs on, transposing levels of 8 bits, or of 4, costs less than summing across registers,
// and tiles are as fast.
constexpr int64_t kManyInputs = 10, kManyBeforeNibbles = 8, kManyBeforeTiles = 4, kManyBeforeNibbleTiles = 6;

class RoundedWeight {
 public:
  RoundedWeight(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t cols,
                int64_t bits, int64_t group_size, int64_t activation_bits, const char* name)
      : cols(cols),
        four_bits(bits == 4),
        rounds_inputs(activation_bits == 8),
        stored_(qweight, four_bits ? Type::u4 : Type::i8, four_bits ? ScalarType::Byte : ScalarType::Char,
                four_bits ? (cols + 1) / 2 : cols, name),
        rows(stored_.rows) {
    STD_TORCH_CHECK((bits == 8 || bits == 4) && group_size >= 0 && group_size % 2 == 0 &&
                        (activation_bits == 0 || activation_bits == 8),
                    name, ": bits, group_size or activation_bits do not fit");
    const int64_t whole = rounds_inputs ? kActivationGroup : std::max<int64_t>(cols, 1);
    group = group_size ? group_size : whole;
    scale_groups = group_size ? (cols + group_size - 1) / group_size : 1;
    groups = std::max<int64_t>(1, (cols + group - 1) / group);
    scales_ = checked(scales, scales.scalar_type(), name);
    if (zeros) zeros_ = checked(*zeros, scales.scalar_type(), name);
  }

  Stage stage(int64_t m) const { return row_stage(stored_, m); }
  // Its rows, and from item `begin` on another's.
  Stage stage(int64_t begin, const RoundedWeight& second, int64_t m) const {
    return row_stage(stored_, begin, second.stored_, m);
  }
  // Levels cost about a quarter of what float32 multiply-adds do where inputs are rounded.
  double estimate(int64_t m) const { return weight_estimate(stored_, rounds_inputs ? (m + 3) / 4 : m); }
  void prefetch(int64_t first, int64_t last) const {
    const char* const from = stored_.data + first * stored_.stride;
    prefetch_beginning(from, (last - first) * stored_.stride, stored_.data + last * stored_.stride);
  }
  bool has_zeros() const { return zeros_.has_value(); }

  // `n` rows from `first`; their scales are put, in float32, into `scales`.
  RoundedRows at(int64_t first, int64_t n, float* scales) const {
    widened(scales_, first, n, scales);
    const auto* data = reinterpret_cast<const uint8_t*>(stored_.data) + first * stored_.stride;
    return {data, stored_.stride, cols, group, groups, four_bits, scales, scale_groups};
  }
  // What the zeros of `n` rows subtract per unit of the sum of a group's inputs.
  void shifts(int64_t first, int64_t n, const float* scales, float* to) const {
    widened(*zeros_, first, n, to);
    for (int64_t i = 0; i < n * scale_groups; ++i) to[i] = scales[i] * (to[i] - (four_bits ? 8.0f : 0.0f));
  }

  // The (rows, cols) weight in double.
  Tensor dense() const {
    const Tensor w = empty({rows, cols}, ScalarType::Double);
    double* to = static_cast<double*>(w.mutable_data_ptr());
    with_float_type(scales_.scalar_type(), "scales", [&](auto zero) {
      using S = decltype(zero);
      using A = Accumulate<S>;
      const S* scales = static_cast<const S*>(scales_.const_data_ptr());
      const S* zeros = zeros_ ? static_cast<const S*>(zeros_->const_data_ptr()) : nullptr;
      for (int64_t i = 0; i < rows * cols; ++i) {
        const int64_t row = i / cols, c = i % cols;
        const auto* from = reinterpret_cast<const uint8_t*>(stored_.data) + row * stored_.stride;
        const int level = four_bits ? (c % 2 ? from[c / 2] >> 4 : from[c / 2] & 15) : static_cast<int8_t>(from[c]);
        const int64_t at = row * scale_groups + (scale_groups == 1 ? 0 : c / group);
        const A middle = zeros != nullptr ? static_cast<A>(zeros[at]) : A(four_bits ? 8 : 0);
        to[i] = (static_cast<A>(level) - middle) * static_cast<A>(scales[at]);
      }
    });
    return w;
  }
  // A double matrix of inputs after rounding, where this weight rounds them.
  Tensor inputs(const Tensor& x) const {
    if (!rounds_inputs) return x;
    const Tensor from = adjacent(x), to = torch::stable::clone(from);
    const RoundedRows plain{nullptr, 0, cols, group, groups, false, nullptr, 1};
    std::vector<float> row(cols), scales(groups);
    std::vector<int8_t> levels(input_width(plain));
    std::vector<int32_t> sums(groups);
    for (int64_t j = 0; j < x.size(0); ++j) {
      std::copy_n(static_cast<const double*>(from.const_data_ptr()) + j * cols, cols, row.data());
      rounded().round_inputs(plain, row.data(), {levels.data(), group_width(plain), scales.data(), sums.data(), 1},
                             nullptr);
      for (int64_t c = 0; c < cols; ++c)
        static_cast<double*>(to.mutable_data_ptr())[j * cols + c] =
            static_cast<double>(scales[c / group]) * levels[c / group * group_width(plain) + c % group];
    }
    return to;
  }

  const int64_t cols;
  const bool four_bits, rounds_inputs;

 private:
  Tensor checked(const Tensor& t, ScalarType type, const char* name) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == scale_groups && t.scalar_type() == type, name,
                    ": scales or zeros: shape or dtype does not fit");
    with_float_type(type, name, [](auto) {});
    return adjacent(t);
  }
  void widened(const Tensor& t, int64_t first, int64_t n, float* to) const {
    with_float_type(t.scalar_type(), "scales", [&](auto zero) {
      using S = decltype(zero);
      const S* from = static_cast<const S*>(t.const_data_ptr()) + first * scale_groups;
      if constexpr (std::is_same_v<S, double>)
        std::copy_n(from, n * scale_groups, to);
      else
        widen(dot_type<S>, from, to, n * scale_groups);
    });
  }
  Weight stored_;
  Tensor scales_;
  std::optional<Tensor> zeros_;

 public:
  const int64_t rows;
  int64_t group, groups, scale_groups;
};

// Inputs as a rounded weight reads them, and others of its layout; `prepare` fills rows in a stage of its own.
class RoundedInputs {
  // As many as are arranged, and as many as a step of theirs takes.
  static constexpr int64_t kTogether = RoundedTable::kTogether, kWhole = 2 * kTogether;

 public:
  // `pairs`: whether they and rebuilt weights are rounded to bfloat16, in pairs. `zeros`: whether another weight that
  // reads them has zeros.
  RoundedInputs(const RoundedWeight& w, const float* x, int64_t m, int slot, bool pairs, bool zeros = false)
      : w_(w),
        zeros_(zeros || w.has_zeros()),
        x_(x),
        m(m),
        width_(input_width(layout())),
        // With zeros, products of levels far from them would be rounded before the difference is taken.
        pairs_(pairs && !zeros_ && !w.rounds_inputs && m > kFewBeforePairs && rounded().rebuild_pairs != nullptr),
        rebuilds_(pairs_ || (!w.rounds_inputs && m > kFewInputs)),
        many_(w.rounds_inputs && rounded().dot_many_levels != nullptr &&
              m >= (rounded().arrange != nullptr ? (w.four_bits ? kManyBeforeNibbleTiles : kManyBeforeTiles)
                    : w.four_bits                ? kManyBeforeNibbles
                                                 : kManyInputs)),
        arranged_(many_ && rounded().arrange != nullptr),
        words_(pairs_ ? row_distance(width_ / 2, m) : 0),
        room_(arranged_ ? (m + kTogether - 1) / kTogether * kTogether : m),
        memory_(slot, room_ * (width_ / (w.rounds_inputs ? 4 : 1)) +
                          m * (words_ + (2 + (many_ ? 0 : kLanes)) * w.groups + w.scale_groups)) {
    float* next = memory_.data();
    ordered_ = next, next += room_ * (width_ / (w.rounds_inputs ? 4 : 1));
    scales_ = next, next += m * w.groups;
    sums_ = reinterpret_cast<int32_t*>(next), next += m * w.groups;
    starts_ = reinterpret_cast<int32_t*>(next), next += many_ ? 0 : m * w.groups * kLanes;
    totals_ = next, next += m * w.scale_groups;
    narrowed_ = next;
  }

  Stage stage() const {
    const int64_t share = std::max<int64_t>(1, 8192 / std::max<int64_t>(w_.cols, 1));
    return {m, arranged_ ? (share + kTogether - 1) / kTogether * kTogether : share};
  }

  void prepare(int64_t first, int64_t last) const {
    const Scratch some(kResultSlot, arranged_ ? kTogether * width_ / 4 : 0);
    auto* const rows = reinterpret_cast<int8_t*>(some.data());
    for (int64_t j = first; j < last; ++j) {
      const float* x = x_ + j * w_.cols;
      float* totals = totals_ + j * w_.scale_groups;
      if (!w_.rounds_inputs) {
        rounded().order_inputs(layout(), x, ordered_ + j * width_, zeros_ ? totals : nullptr);
        if (pairs_) narrow(Type::bf16, ordered_ + j * width_, narrowed_ + j * words_, width_);
        continue;
      }
      RoundedLevels to = levels(j);
      if (arranged_) to.levels = rows + (j - first) % kTogether * width_, to.group_step = group_width(layout());
      rounded().round_inputs(layout(), x, to, many_ ? nullptr : starts_ + j * w_.groups * kLanes);
      std::fill_n(totals, w_.scale_groups, 0.0f);
      for (int64_t g = 0; g < w_.groups; ++g)
        totals[w_.scale_groups == 1 ? 0 : g] +=
            to.scales[g * to.scale_step] * static_cast<float>(to.sums[g * to.scale_step]);
      const int64_t done = (j - first) % kTogether + 1;
      if (arranged_ && (done == kTogether || j + 1 == last))
        rounded().arrange(layout(), rows, done, reinterpret_cast<int8_t*>(ordered_) + (j + 1 - done) * width_);
    }
  }

  // store(j, i, values, n) as in dot_rows of linear.h.
  template <class Store>
  void dot_rows(int64_t first, int64_t last, const Store& store) const {
    dot_rows(w_, first, last, store);
  }
  // The rows of another weight: its inputs, groups, bits and rounding are those of the first.
  template <class Store>
  void dot_rows(const RoundedWeight& w, int64_t first, int64_t last, const Store& store) const {
    const int64_t passes = std::max<int64_t>(1, (m + kInputsAtOnce - 1) / kInputsAtOnce);
    // Many inputs have no few at their end.
    const int64_t share = (m + passes - 1) / passes, groups = w.scale_groups;
    const int64_t most = arranged_ ? (share + kWhole - 1) / kWhole * kWhole : share;
    const Scratch out(kResultSlot, 2 * most * kBatch), scales(kScaleSlot, kBatch * groups);
    const Scratch shifts(kShiftSlot, w.has_zeros() ? kBatch * groups : 0);
    const int64_t words = row_distance(width_ / 2, kBatch);
    const Scratch rebuilt(kRebuildSlot, pairs_ ? kBatch * words : rebuilds_ ? kBatch * width_ : 0);
    w.prefetch(first, last);
    float *values = out.data(), *correction = values + most * kBatch;
    for (int64_t i = first; i < last; i += kBatch) {
      const int64_t n = std::min(kBatch, last - i);
      const RoundedRows rows = w.at(i, n, scales.data());
      if (w.has_zeros()) w.shifts(i, n, scales.data(), shifts.data());
      if (pairs_)
        rounded().rebuild_pairs(rows, n, reinterpret_cast<uint16_t*>(rebuilt.data()), 2 * words);
      else if (rebuilds_)
        rounded().rebuild(rows, n, rebuilt.data());
      for (int64_t start = 0; start < m; start += most) {
        const int64_t inputs = std::min(most, m - start);
        multiply(rows, n, start, inputs, rebuilt.data(), words, values);
        if (w.has_zeros()) {
          dot(Type::f32, shifts.data(), groups * 4, n, groups, totals_ + start * groups, groups, inputs, correction,
              kBatch);
          for (int64_t c = 0; c < inputs * kBatch; ++c) values[c] -= correction[c];
        }
        for (int64_t j = 0; j < inputs; ++j) store(start + j, i, values + j * kBatch, n);
      }
    }
  }

 private:
  RoundedRows layout() const { return {nullptr, 0, w_.cols, w_.group, w_.groups, w_.four_bits, nullptr, 1}; }
  // Input j.
  RoundedLevels levels(int64_t j) const {
    auto* const first = reinterpret_cast<int8_t*>(ordered_);
    const int64_t group = group_width(layout());
    if (arranged_) return {first + j * width_, 0, scales_ + j, sums_ + j, m};
    if (many_) return {first + j * group, m * group, scales_ + j, sums_ + j, m};
    return {first + j * width_, group, scales_ + j * w_.groups, sums_ + j * w_.groups, 1};
  }

  void multiply(const RoundedRows& rows, int64_t n, int64_t start, int64_t inputs, const float* dense, int64_t words,
                float* out) const {
    if (pairs_) {
      dot_pairs(dense, words * 4, n, width_ / 2, narrowed_ + start * words_, words_, inputs, out, kBatch);
      for (int64_t j = 0; j < inputs && rows.scale_groups == 1; ++j)
        for (int64_t r = 0; r < n; ++r) out[j * kBatch + r] *= rows.scales[r];
    } else if (rebuilds_)
      dot(Type::f32, dense, width_ * 4, n, width_, ordered_ + start * width_, width_, inputs, out, kBatch);
    else if (many_)
      rounded().dot_many_levels(rows, n, levels(start), inputs, out, kBatch);
    else if (w_.rounds_inputs)
      rounded().dot_levels(rows, n, levels(start).levels, levels(start).scales, starts_ + start * w_.groups * kLanes,
                           inputs, out, kBatch);
    else
      rounded().dot_floats(rows, n, ordered_ + start * width_, inputs, out, kBatch);
  }

  const RoundedWeight& w_;
  const bool zeros_;
  const float* x_;

 public:
  const int64_t m;

 private:
  int64_t width_;
  bool pairs_, rebuilds_, many_, arranged_;
  int64_t words_, room_;
  Scratch memory_;
  float *ordered_, *scales_, *totals_, *narrowed_;
  int32_t *sums_, *starts_;
};

}  // namespace tinycomp
