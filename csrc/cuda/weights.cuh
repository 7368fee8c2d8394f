// How a row of a weight is read, eight inputs at a time. Each format gives the same three things:
//   rows, columns;  Cursor start(row, column);  Eight<T> next(row, column, width, cursor)
// where `next` reads inputs column..column + 7 and a cursor carries what a packed format must count on its way.
#pragma once

#include "ptx.cuh"

namespace tinycomp::cuda {

struct NoCursor {};

// Eight numbers at p, of which `valid` exist; `vector` promises 16-byte alignment.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* p, int64_t valid, bool vector, int64_t stride = 1) {
  Eight<T> v;
  if (vector && valid >= 8) {
    constexpr int kWords = sizeof(T) / 2;
    auto* words = reinterpret_cast<uint4*>(&v);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = ptx::load_streamed(reinterpret_cast<const uint4*>(p) + i);
    return v;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = i < valid ? p[i * stride] : from_float<T>(0.f);
  return v;
}

// Rows of numbers in memory.
template <class T>
struct Dense {
  static constexpr bool kCopies = true;  // rows can be copied to shared memory as they are
  using Cursor = NoCursor;
  const T* data;
  int rows, columns;
  int64_t stride;
  bool vector;  // every row is aligned to 16 bytes

  __device__ __forceinline__ Cursor start(int, int) const { return {}; }
  __device__ __forceinline__ Eight<T> next(int row, int column, Cursor&) const {
    return load_eight(data + row * stride + column, row < rows ? columns - column : 0, vector);
  }
};

}  // namespace tinycomp::cuda
