// What each instruction set offers to dot.cpp: one entry per floating Type, in its order.
#pragma once

#include <cstdint>

#include "dot.h"

namespace tinycomp {

struct DotTable {
  using Dot = void (*)(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                       int64_t m, float* out, int64_t ldo);
  using Blocks = void (*)(const void* w, const int32_t* columns, int64_t count, const float* x, int64_t ldx, int64_t m,
                          float* out, int64_t ldo);
  using Widen = void (*)(const void* from, float* to, int64_t n);
  using Narrow = void (*)(const float* from, void* to, int64_t n);
  // `words` of a row, inputs interleaved: dot_interleaved of dot.h.
  using Groups = void (*)(const char* w, int64_t stride, int64_t rows, int64_t words, const float* x, int64_t m,
                          float* out, int64_t ldo);
  using Interleave = void (*)(const char* from, int64_t distance, int64_t m, int64_t words, int64_t first, int64_t last,
                              float* to);
  Dot dot[3], sum_rows[3];
  Blocks blocks[3];
  Widen widen[3];
  Narrow narrow[3];
  Groups groups;  // of floats; null: no faster
  Interleave interleave;
};

extern const DotTable portable_dot;
#if defined(__x86_64__)
extern const DotTable avx2_dot;
extern const DotTable avx512_dot;
#endif

// The same for pairs of bfloat16.
struct PairsTable {
  DotTable::Dot dot;
  DotTable::Groups groups;
  DotTable::Interleave interleave;
  // dot_tile_blocks of dot.h; null: no tiles.
  void (*blocks)(const char* w, const int32_t* columns, int64_t count, const float* x, int64_t words, int64_t m,
                 float* out, int64_t ldo);
};
// Rows of one type that meet inputs as sums of bfloat16 numbers: dot_interleaved and interleave of dot.h.
struct PartsTable {
  void (*dot)(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t m, float* out,
              int64_t ldo, float* squares);
  void (*interleave)(Type source, const char* from, int64_t distance, int64_t m, int64_t cols, int64_t first,
                     int64_t last, float* to);
  int64_t parts;
};
#if defined(__x86_64__)
extern const PairsTable avx512_pairs;
extern const PairsTable amx_pairs;
extern const PartsTable amx_parts[2];  // of float32 and of float16
#endif

}  // namespace tinycomp
