// What each instruction set offers to dot.cpp: one entry per floating Type, in its order.
#pragma once

#include <cstdint>

namespace tinycomp {

struct DotTable {
  using Dot = void (*)(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                       int64_t m, float* out, int64_t ldo);
  using Blocks = void (*)(const void* w, const int32_t* columns, int64_t count, const float* x, int64_t ldx, int64_t m,
                          float* out, int64_t ldo);
  using Widen = void (*)(const void* from, float* to, int64_t n);
  using Narrow = void (*)(const float* from, void* to, int64_t n);
  Dot dot[3], sum_rows[3];
  Blocks blocks[3];
  Widen widen[3];
  Narrow narrow[3];
};

extern const DotTable portable_dot;
#if defined(__x86_64__)
extern const DotTable avx2_dot;
extern const DotTable avx512_dot;
void avx512_pairs(const char* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx, int64_t m,
                  float* out, int64_t ldo);  // dot_pairs of dot.h
#endif

}  // namespace tinycomp
