// Rows of a weight rounded to 8 or 4 bits against a few input rows, which are float32 or rounded to 8 bits themselves.
#pragma once

#include <cstdint>

namespace tinycomp {

// Inputs that share an activation scale where weights have one scale for the whole row.
constexpr int64_t kActivationGroup = 128;

// w[i, c] = (level(i, c) - middle) * scales[i, group of c], with levels as stored: signed bytes and middle 0 for 8
// bits, two to a byte (even input in the low half) and middle 8 for 4 bits. Groups begin at even inputs.
struct RoundedRows {
  const uint8_t* data;
  int64_t stride;  // bytes between rows
  int64_t cols, group, groups;
  bool four_bits;
  const float* scales;   // (rows, scale_groups)
  int64_t scale_groups;  // groups, or 1
  int64_t size(int64_t g) const { return cols - g * group < group ? cols - g * group : group; }
};

// Inputs in the order in which the levels of a group are read: 4-bit levels read even inputs first, then odd ones.
// Every half of a group is padded with zeros to a multiple of kPad.
constexpr int64_t kPad = 64;

// Levels are read as unsigned numbers around `middle` (8 or 128). What that adds to each 32-bit sum is kept for each
// input row and group, negated, as the value a sum starts from: kLanes numbers.
constexpr int64_t kLanes = 16;

// Rounded inputs, each with its groups `group_step` levels and `scale_step` scales and sums apart. Few inputs lie one
// after the other; of many, groups do: what a tile reads is adjacent then, whatever their width.
struct RoundedLevels {
  int8_t* levels;  // of the first input's first group
  int64_t group_step;
  float* scales;  // largest / 127
  int32_t* sums;  // of levels
  int64_t scale_step;
};

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
inline int64_t half_width(const RoundedRows& w) { return padded(w.four_bits ? (w.group + 1) / 2 : w.group); }
inline int64_t group_width(const RoundedRows& w) { return half_width(w) * (w.four_bits ? 2 : 1); }
inline int64_t input_width(const RoundedRows& w) { return group_width(w) * w.groups; }

// Where the first row's levels of a group begin.
inline const uint8_t* group_of(const RoundedRows& w, int64_t g) { return w.data + g * w.group / (w.four_bits ? 2 : 1); }

struct RoundedTable {
  // One input row rounded by group: levels = round(x * 127 / largest); starts may be null.
  void (*round_inputs)(const RoundedRows& w, const float* x, const RoundedLevels& to, int32_t* starts);
  // One input row in group order; sums may be null.
  void (*order_inputs)(const RoundedRows& w, const float* x, float* ordered, float* sums);
  // out[j * ldo + i] for i < rows, j < m: integer products within a group, float32 beyond.
  void (*dot_levels)(const RoundedRows& w, int64_t rows, const int8_t* levels, const float* scales,
                     const int32_t* starts, int64_t m, float* out, int64_t ldo);
  // The same for many inputs, whose groups are adjacent; null: no faster way.
  void (*dot_many_levels)(const RoundedRows& w, int64_t rows, const RoundedLevels& inputs, int64_t m, float* out,
                          int64_t ldo);
  // The same with ordered float32 inputs.
  void (*dot_floats)(const RoundedRows& w, int64_t rows, const float* x, int64_t m, float* out, int64_t ldo);
  // Rows rebuilt in float32, in the order of inputs and `input_width` apart; what meets padding is finite.
  void (*rebuild)(const RoundedRows& w, int64_t rows, float* out);
  // The same in bfloat16, rows `distance` apart; levels alone, which are exact, where a row has one scale. Null: none.
  void (*rebuild_pairs)(const RoundedRows& w, int64_t rows, uint16_t* out, int64_t distance);
  // Rounded levels of up to kTogether inputs, `input_width` apart, as dot_many_levels wants these, in no more memory;
  // null: as they are.
  static constexpr int64_t kTogether = 16;
  void (*arrange)(const RoundedRows& w, const int8_t* levels, int64_t inputs, int8_t* to);
};

const RoundedTable& rounded();

extern const RoundedTable portable_rounded;
#if defined(__x86_64__)
extern const RoundedTable avx2_rounded;
extern const RoundedTable avx512_rounded;
extern const RoundedTable avx512vnni_rounded;
const RoundedTable& amx_rounded();
#endif

}  // namespace tinycomp
