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
// The same in bfloat16, for any index: x is 2^16 words and one that is not used. `most` becomes the largest index, if
// that is larger.
using GatherWords = float (*)(const uint16_t* values, const uint16_t* index, int64_t count, const uint16_t* x,
                              uint16_t& most);
// The same for float32 values and inputs x[index * ldx + j], j < inputs, at once.
using GatherMany = void (*)(const float* values, const uint16_t* index, int64_t count, const float* x, int64_t ldx,
                            int64_t inputs, float* sums);
// The same for up to 32 inputs in bfloat16, of which word 16 i + k of `x` holds numbers 2 k (below) and 2 k + 1 (above)
// of column i; 32 sums. Values are exact in bfloat16.
using GatherPairs = void (*)(const float* values, const uint16_t* index, int64_t count, const uint32_t* x, float* sums);
// Set bits of 16 `blocks` columns.
using CountBits = int64_t (*)(const uint16_t* mask, int64_t blocks);
// x (16 `blocks` floats, which are exact in 16-bit types) as expand_dot and pairs_dot want it, in no more floats.
using Arrange = void (*)(Type type, const float* x, int64_t blocks, float* to);
// Four rows of which row r takes values from number at[r] on, with arranged inputs: their four sums, and in `at` the
// numbers after the last ones. `blocks` is a multiple of `together` / 16; up to 64 values beyond are read, and must
// exist.
using ExpandDot = void (*)(Type type, const void* values, int64_t (&at)[4], const uint16_t* const (&mask)[4],
                           int64_t blocks, const float* x, float* sums);
// The same for rows of 2:4, with their codes (two bytes for a block); nothing is read beyond the values. False, and
// sums of no use, if a code does not name two columns in their order.
using PairsDot = bool (*)(Type type, const void* values, const int64_t (&at)[4], const uint8_t* const (&codes)[4],
                          int64_t blocks, const float* x, float* sums);
// `expand` for bfloat16 as it is, for a multiple of `together` columns.
using Words = int64_t (*)(const uint16_t* values, int64_t at, int64_t count, const uint16_t* mask, int64_t blocks,
                          uint16_t* out);
// n bytes of codes of 2:4, two in each (i0 + 4 i1), as the eight bits that they name.
using CodeBits = void (*)(const uint8_t* codes, int64_t n, uint8_t* bits);

// Places of the set bits of 16 `blocks` columns, in order; up to 32 more are written.
using KeptColumns = void (*)(const uint16_t* mask, int64_t blocks, uint16_t* to);

struct ExpandTable {
  Expand expand;
  Gather gather;
  GatherWords gather_words;  // null: none
  GatherMany gather_many;
  GatherPairs gather_pairs;
  CountBits count;
  bool (*dots)(Type);  // types for which expand_dot is there
  ExpandDot expand_dot;
  bool (*pairs)(Type);
  PairsDot pairs_dot;
  Arrange arrange;
  int64_t together;  // columns that expand_dot takes at once
  Words words;       // null: none
  CodeBits code_bits;
  KeptColumns columns;
};
const ExpandTable& expansion();
extern const ExpandTable portable_expand;
void code_bits(const uint8_t* codes, int64_t n, uint8_t* bits);  // a byte at a time
#if defined(__x86_64__)
extern const ExpandTable avx2_expand;
extern const ExpandTable avx512_expand;
extern const ExpandTable avx512vbmi2_expand;
extern const ExpandTable avx512bf16_expand;
extern const ExpandTable amx_expand;

// Values of 16 bits, by look-up of where each goes in a register; part of both tables. Of 16 columns of bf16 those of
// even number come first, for then a shift and a mask widen them.
bool looked_up(Type type);
void arrange16(Type type, const float* x, int64_t blocks, float* to);
void lookup_dot(Type type, const void* values, int64_t (&at)[4], const uint16_t* const (&mask)[4], int64_t blocks,
                const float* x, float* sums);
bool lookup_pairs(Type type, const void* values, const int64_t (&at)[4], const uint8_t* const (&codes)[4],
                  int64_t blocks, const float* x, float* sums);
float gather_scalars(Type type, const void* values, const uint16_t* index, int64_t count, const float* x);
#endif

}  // namespace tinycomp
