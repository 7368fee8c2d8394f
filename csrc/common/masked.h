// The packed weight of masked_linear: its arguments, and what its rows and batches of rows hold.
#pragma once

#include <string>

#include "expand.h"
#include "linear.h"

namespace tinycomp {

// The largest of n numbers, 0 of none.
inline int64_t largest(const uint16_t* numbers, int64_t n) {
  uint16_t found = 0;
  vectorised([&] {
    uint16_t most = 0;
    for (int64_t c = 0; c < n; ++c) most = std::max(most, numbers[c]);
    found = most;
  });
  return found;
}

// Arguments after checking; what an index or an offset holds is checked where it is used, and `bad` reports it.
struct Masked {
  const std::string& format;
  Type type;
  Tensor values, mask, offsets;
  int64_t rows, cols, count;  // count: stored values
  bool two_of_four;
  // Of the tensors, which take as long to say as a row takes to read.
  const char* value_data;
  const uint8_t* mask_data;
  const int32_t* offset_data;
  std::vector<float> scale;
  mutable std::atomic<bool> bad{false};

  Masked(const std::string& format, Type type, const Tensor& packed, const Tensor& kept,
         const std::optional<Tensor>& begins, int64_t rows, int64_t cols)
      : format(format),
        type(type),
        values(adjacent(packed)),
        mask(adjacent(kept)),
        offsets(begins ? adjacent(*begins) : values),
        rows(rows),
        cols(cols),
        count(values.numel() * (type == Type::u4 ? 2 : 1)),
        two_of_four(format == "2:4"),
        value_data(static_cast<const char*>(values.const_data_ptr())),
        mask_data(static_cast<const uint8_t*>(mask.const_data_ptr())),
        offset_data(static_cast<const int32_t*>(offsets.const_data_ptr())) {}

  bool floating() const { return type != Type::i8 && type != Type::u4; }
  int64_t value_size() const { return type == Type::f32 ? 4 : floating() ? 2 : 1; }  // bytes; of double, nobody asks
  const uint16_t* index() const { return reinterpret_cast<const uint16_t*>(mask_data); }
  const uint16_t* words() const { return reinterpret_cast<const uint16_t*>(value_data); }
  // Where the values of row (or row of blocks) i begin and end; empty if the offsets cannot be right.
  std::pair<int64_t, int64_t> range(int64_t i, int64_t stored) const {
    const int64_t first = offset_data[i], last = offset_data[i + 1];
    if (first >= 0 && first <= last && last <= stored) return {first, last};
    bad = true;
    return {0, 0};
  }
  // The mask of a row as 16-bit words; 2:4 codes become the bits that they name.
  void words(int64_t i, uint16_t* to) const {
    const int64_t bytes = (cols + 7) / 8, blocks = (cols + 15) / 16;
    const uint8_t* from = mask_data + i * bytes;
    to[blocks - 1] = 0;
    if (!two_of_four) {
      __builtin_memcpy(to, from, bytes);
      // Bits beyond the last column have no values.
      if (cols % 8 > 0) reinterpret_cast<uint8_t*>(to)[bytes - 1] &= static_cast<uint8_t>((1 << cols % 8) - 1);
      return;
    }
    auto* bits = reinterpret_cast<uint8_t*>(to);
    expansion().code_bits(from, bytes, bits);
    // A missing last group has no code.
    if (cols % 8 > 0 && cols % 8 <= 4) bits[bytes - 1] &= 15;
  }
  // Where the values of row i of a bit mask or of 2:4 begin and end.
  std::pair<int64_t, int64_t> value_range(int64_t i) const {
    const int64_t each = 2 * ((cols + 3) / 4);
    return two_of_four ? std::pair{i * each, (i + 1) * each} : range(i, count);
  }
  // Row i in bfloat16, up to the end of a register of 32.
  void expand_words(int64_t i, uint16_t* scratch, uint16_t* to) const {
    const int64_t blocks = (cols + 31) / 32 * 2;
    scratch[blocks - 1] = 0;
    words(i, scratch);
    const auto [first, last] = value_range(i);
    if (expansion().words(words(), first, count, scratch, blocks, to) != last) bad = true;
  }
  // Row i of a list, the same.
  void scatter_words(int64_t i, uint16_t* to) const {
    std::fill_n(to, (cols + 31) / 32 * 32, uint16_t{0});
    const auto [first, last] = range(i, count);
    const uint16_t *at = index() + first, *from = words() + first;
    const int64_t n = last - first;
    if (n > 0 && largest(at, n) >= cols) {
      bad = true;
      return;
    }
#pragma GCC unroll 8
    for (int64_t c = 0; c < n; ++c) to[at[c]] = from[c];
  }
  // Row i in float32; `to` has room for a multiple of 16.
  void expand_row(int64_t i, uint16_t* scratch, float* to) const {
    if (cols == 0) return;
    words(i, scratch);
    const auto [first, last] = value_range(i);
    if (expansion().expand(type, value_data, first, count, scratch, (cols + 15) / 16, to) != last) bad = true;
  }
};

// Where the values of `n` rows from row i on begin and end, and their columns, checked: numbers, and whether all are
// columns. Rows that cannot be right are empty, and `bad` says so.
struct Kept {
  std::pair<int64_t, int64_t> row[kBatch];

  Kept(const Masked& w, const uint16_t* index, int64_t i, int64_t n) {
    bool fits = true;
    for (int64_t r = 0; r < n; ++r) {
      row[r] = w.range(i + r, w.count);
      fits &= row[r].second - row[r].first <= w.cols;
    }
    const int64_t all = row[n - 1].second - row[0].first;
    if (fits && !w.bad && (all == 0 || largest(index + row[0].first, all) < w.cols)) return;
    w.bad = true;
    std::fill_n(row, n, std::pair<int64_t, int64_t>{0, 0});
  }

  // Of bits, which are written to `words` words for each row.
  Kept(const Masked& w, uint16_t* bits, int64_t words, int64_t i, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      w.words(i + r, bits + r * words);
      row[r] = w.value_range(i + r);
      if (expansion().count(bits + r * words, words) == row[r].second - row[r].first) continue;
      w.bad = true;
      row[r] = {0, 0};
      std::fill_n(bits + r * words, words, uint16_t{0});
    }
  }
};

// Values [from, to) in float32; `scratch` has room for them and 15 more.
inline const float* widened(const Masked& w, int64_t from, int64_t to, const Scratch& scratch) {
  const char* const values = w.value_data;
  if (w.floating()) {
    // To the end of a register, where there are as many values.
    const int64_t some = std::min((to - from + 15) / 16 * 16, w.count - from);
    widen(w.type, values + from * w.value_size(), scratch.data(), some);
    return scratch.data();
  }
  static const std::vector<uint16_t> all(65536 / 16, 0xffff);
  // Only whole words of values are read together, what lies beyond `to` is not used.
  const int64_t blocks = (to - from) / 16;
  const uint16_t rest = static_cast<uint16_t>((1u << (to - from) % 16) - 1);
  expansion().expand(w.type, values, from, to, all.data(), blocks, scratch.data());
  if (rest != 0) expansion().expand(w.type, values, from + 16 * blocks, to, &rest, 1, scratch.data() + 16 * blocks);
  return scratch.data();
}

}  // namespace tinycomp
