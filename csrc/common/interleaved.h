// Inputs side by side, for processors with AVX-512: a register holds the same few columns of several inputs, and
// a row of a weight meets it as it lies, a few of its columns at a time in every part of a register. Four or eight rows
// stream from memory abreast, their next ones asked for, and nothing is transposed or summed across registers until a
// row ends.
//
// Columns are counted in words of 32 bits, a float or a pair of bfloat16. m inputs lie in pieces of 32, 16, 8, 4 or 2,
// a piece in groups of 16 / piece words (one at least) of each of its inputs, up to a whole number of cache lines.
#pragma once

#include <cstdint>

namespace tinycomp {

// The inputs of the first of the pieces that `left` inputs take; part of them may be zeros.
inline int64_t piece_of(int64_t left) {
  int64_t size = 2;
  while (size < left && size < 32) size *= 2;
  return size > 4 && 4 * left <= 3 * size ? size / 2 : size;
}
constexpr int64_t group_of(int64_t piece) { return piece < 16 ? 16 / piece : 1; }

// Room for m inputs with those zeros, also where a piece has 16 inputs at most (amx.h), and for words with theirs.
inline int64_t padded_inputs(int64_t m) {
  int64_t rest = m % 16 ? 2 : 0;
  while (rest < m % 16) rest *= 2;
  return m / 16 * 16 + rest;
}
inline int64_t padded_words(int64_t words) { return (words + 15) / 16 * 16; }

// Words of an input whose numbers are sums of `parts` of bfloat16, two columns to a word (parts_amx.cpp).
inline int64_t part_words(int64_t parts, int64_t cols) { return parts * padded_words((cols + 1) / 2); }

}  // namespace tinycomp
