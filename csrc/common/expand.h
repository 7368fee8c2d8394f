// Rows of packed sparse weights, rebuilt in float32 or multiplied as they are.
#pragma once

#include <cstdint>

#include "dot.h"

namespace tinycomp {

// out[c] = the next value where bit c of `mask` is set, else 0, for 16 `blocks` columns; values are numbered `at`, at +
// 1, ... in `values`, of which there are `count`. Returns the number after the last one read, or -1 where there are too
// few. Type::u4 values stand two to a byte, as level + 8.
using Expand = int64_t (*)(Type type, const void* values, int64_t at, int64_t count, const uint16_t* mask,
                           int64_t blocks, float* out);
// sum_i values[i] * x[index[i]] for values of a floating type.
using Gather = float (*)(Type type, const void* values, const uint16_t* index, int64_t count, const float* x);
// The same for float32 values and inputs x[index * ldx + j], j < inputs, at once.
using GatherMany = void (*)(const float* values, const uint16_t* index, int64_t count, const float* x, int64_t ldx,
                            int64_t inputs, float* sums);
// The same for up to 32 inputs in 16 bits, bfloat16, of which word 16 i + k of `x` holds number k (below) and number
// k + 16 (above) of column i; 32 sums.
using GatherPairs = void (*)(const float* values, const uint16_t* index, int64_t count, const uint32_t* x, float* sums);
// Set bits of 16 `blocks` columns.
using CountBits = int64_t (*)(const uint16_t* mask, int64_t blocks);
// Four rows of which row r takes values from number at[r] on, with `x` (16 `blocks` floats, arranged): their four sums.
// Reads up to 16 values beyond the last one of a row, which must exist.
using ExpandDot = void (*)(Type type, const void* values, const int64_t (&at)[4], const uint16_t* const (&mask)[4],
                           int64_t blocks, const float* x, float* sums);
// The same for rows of 2:4, with their codes (two bytes for a block); nothing is read beyond the values. False, and no
// sums, if a code does not name two columns in their order.
using PairsDot = bool (*)(Type type, const void* values, const int64_t (&at)[4], const uint8_t* const (&codes)[4],
                          int64_t blocks, const float* x, float* sums);

struct ExpandTable {
  Expand expand;
  Gather gather;
  GatherMany gather_many;
  GatherPairs gather_pairs;
  CountBits count;
  bool (*dots)(Type);  // types for which expand_dot is there
  ExpandDot expand_dot;
  bool (*pairs)(Type);
  PairsDot pairs_dot;
};
const ExpandTable& expansion();
extern const ExpandTable portable_expand;
#if defined(__x86_64__)
extern const ExpandTable avx2_expand;
extern const ExpandTable avx512_expand;

// Values of 16 bits, by look-up of where each goes in a register; part of both tables.
bool looked_up(Type type);
void lookup_dot(Type type, const void* values, const int64_t (&at)[4], const uint16_t* const (&mask)[4], int64_t blocks,
                const float* x, float* sums);
bool lookup_pairs(Type type, const void* values, const int64_t (&at)[4], const uint8_t* const (&codes)[4],
                  int64_t blocks, const float* x, float* sums);
float gather_scalars(Type type, const void* values, const uint16_t* index, int64_t count, const float* x);
#endif

// x for expand_dot and pairs_dot: of 16 columns of bf16 those of even number come first, for then a shift and a mask
// widen them.
inline void arrange_inputs(Type type, const float* x, int64_t blocks, float* to) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int i = 0; i < 16; ++i) to[16 * b + i] = x[16 * b + (type == Type::bf16 ? 2 * (i % 8) + i / 8 : i)];
}

}  // namespace tinycomp
