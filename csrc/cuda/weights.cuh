// How a row of a weight is read. Each format gives the same things:
//   rows, columns, kEights;  Cursor start(row, column);  Run load(row, column, cursor);  Eight<T> next(run)
// where `load` reads a run of 8 * kEights inputs of a row, `column` being a multiple of that, `next` makes numbers of
// the next eight of them, and a cursor carries what a packed format counts on its way. Behind the last column numbers
// are finite: inputs are zero there. Kernels take plain arguments, so that a launch can be written down:
// TINYCOMP_WEIGHT names those of one weight.
#pragma once

#include "ptx.cuh"

// data, mask, offsets, scales, zeros: see the op's contract. stride: elements between rows of data. group: columns per
// scale. wide_scales: scales and zeros are float32, not T. vector: rows of data may be read 16 bytes at a time.
#define TINYCOMP_WEIGHT(w)                                                                                          \
  const void *w##_data, const uint8_t *w##_mask, const int *w##_offsets, const void *w##_scales,                    \
      const void *w##_zeros, int64_t w##_stride, int w##_rows, int w##_columns, int w##_group, int w##_wide_scales, \
      int w##_vector
#define TINYCOMP_WEIGHT_NAMES(w)                                               \
  {w##_data, w##_mask,    w##_offsets, w##_scales,      w##_zeros, w##_stride, \
   w##_rows, w##_columns, w##_group,   w##_wide_scales, w##_vector}

namespace tinycomp::cuda {

struct Storage {
  const void* data;
  const uint8_t* mask;
  const int* offsets;
  const void *scales, *zeros;
  int64_t stride;
  int rows, columns, group, wide_scales, vector;

  // Of formats whose runs are numbers as they are loaded.
  static constexpr int kEights = 1;
  template <class Run>
  __device__ __forceinline__ static const Run& next(const Run& run) {
    return run;
  }
};

struct NoCursor {};

template <class T>
__device__ __forceinline__ float scalar_at(const void* data, int64_t i, int wide) {
  return wide ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
}

// Signed value number i of int8 or packed int4 data.
template <int kBits>
__device__ __forceinline__ float level_at(const void* data, int64_t i) {
  if constexpr (kBits == 8) return static_cast<const int8_t*>(data)[i];
  return static_cast<float>(static_cast<const uint8_t*>(data)[i / 2] >> (i % 2 * 4) & 15) - 8.f;
}

// Value number i of packed values: rounded ones are levels, to be scaled.
template <class T, int kBits>
__device__ __forceinline__ float value_at(const void* data, int64_t i) {
  if constexpr (kBits == 0) return to_float(static_cast<const T*>(data)[i]);
  return level_at<kBits>(data, i);
}

// Rows of numbers in memory.
template <class T>
struct Dense : Storage {
  static constexpr bool kCopies = true;  // rows can be copied to shared memory as they are
  using Cursor = NoCursor;
  using Run = Eight<T>;
  __device__ __forceinline__ Cursor start(int, int) const { return {}; }
  __device__ __forceinline__ const T* row_data(int row) const { return static_cast<const T*>(data) + row * stride; }
  __device__ __forceinline__ Run load(int row, int column, Cursor&) const {
    Eight<T> v;
    const T* p = row_data(row) + column;
    const int valid = row < rows ? columns - column : 0;
    if (vector && valid >= 8) {
      constexpr int kWords = sizeof(T) / 2;
      auto* words = reinterpret_cast<uint4*>(&v);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = ptx::load_streamed(reinterpret_cast<const uint4*>(p) + i);
      return v;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v.at[i] = i < valid ? p[i] : from_float<T>(0.f);
    return v;
  }
};

// (q - zero) scale, rebuilt in float32 and rounded to T, as the contract says. A run is 16 bytes.
template <class T, int kBits>
struct Rounded : Storage {
  static constexpr bool kCopies = false;
  static constexpr int kEights = 16 / kBits;
  using Cursor = NoCursor;
  struct Run {
    alignas(16) uint8_t packed[16];
    int64_t group_at;  // index of the scale of what comes next
    int end, valid;    // inputs before the next group, and before the end of the row
    float scale, zero;
  };
  __device__ __forceinline__ Cursor start(int, int) const { return {}; }
  __device__ __forceinline__ void load_scale(Run& run) const {
    run.scale = scalar_at<T>(scales, run.group_at, wide_scales);
    run.zero = zeros ? scalar_at<T>(zeros, run.group_at, wide_scales) - (kBits == 4 ? 8.f : 0.f) : 0.f;
  }
  __device__ __forceinline__ Run load(int row, int column, Cursor&) const {
    Run run = {};
    run.valid = row < rows ? columns - column : 0;
    if (run.valid <= 0) return run;
    const auto* p = static_cast<const uint8_t*>(data) + row * stride + static_cast<int64_t>(column) * kBits / 8;
    if (vector && run.valid >= 8 * kEights) {
      *reinterpret_cast<uint4*>(run.packed) = ptx::load_streamed(reinterpret_cast<const uint4*>(p));
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (i * 8 / kBits < run.valid) run.packed[i] = p[i];
    }
    const int at = column / group;
    run.group_at = static_cast<int64_t>(row) * ((columns + group - 1) / group) + at;
    run.end = (at + 1) * group - column;
    load_scale(run);
    return run;
  }
  __device__ __forceinline__ Eight<T> next(Run& run) const {
    Eight<T> v;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // A look at every second input: groups are even, or the whole row.
      if (i % 2 == 0 && i == run.end && i < run.valid) ++run.group_at, run.end += group, load_scale(run);
      v.at[i] = from_float<T>((level_at<kBits>(run.packed, i) - run.zero) * run.scale);
    }
    auto* words = reinterpret_cast<uint32_t*>(run.packed);
#pragma unroll
    for (int i = 0; i < 4 - kBits / 4; ++i) words[i] = words[i + kBits / 4];
    run.end -= 8, run.valid -= 8;
    return v;
  }
};

// One scale per row, applied to levels; 1 where values are kept as they are.
template <class T, int kBits>
__device__ __forceinline__ float row_scale(const Storage& w, int row) {
  return kBits && row < w.rows ? scalar_at<T>(w.scales, row, w.wide_scales) : 1.f;
}

// A bit per input and the values of the set ones, one after another. mask rows are `stride` bytes.
template <class T, int kBits>
struct Bitmask : Storage {
  static constexpr bool kCopies = false;
  using Run = Eight<T>;
  struct Cursor {
    int64_t counted;  // values before `column` of this row
    int column;
    float scale;
  };
  __device__ __forceinline__ int byte_of(int row, int column) const {
    if (row >= rows || column >= columns) return 0;
    const int byte = mask[row * stride + column / 8], valid = columns - column;
    return valid < 8 ? byte & ((1 << valid) - 1) : byte;
  }
  __device__ __forceinline__ void advance(int row, int column, Cursor& cursor) const {
    for (; cursor.column < column; cursor.column += 8) cursor.counted += __popc(byte_of(row, cursor.column));
  }
  __device__ __forceinline__ Cursor start(int row, int column) const {
    Cursor cursor{row < rows ? offsets[row] : 0, 0, row_scale<T, kBits>(*this, row)};
    advance(row, column, cursor);
    return cursor;
  }
  __device__ __forceinline__ Run load(int row, int column, Cursor& cursor) const {
    advance(row, column, cursor);
    const int byte = byte_of(row, column);
    Eight<T> v;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t at = cursor.counted + __popc(byte & ((1 << i) - 1));
      v.at[i] = from_float<T>(byte >> i & 1 ? value_at<T, kBits>(data, at) * cursor.scale : 0.f);
    }
    return v;
  }
};

// Two of four inputs: a byte of the mask describes eight, whose four values are adjacent.
template <class T, int kBits>
struct TwoOfFour : Storage {
  static constexpr bool kCopies = false;
  using Run = Eight<T>;
  struct Cursor {
    float scale;
  };
  __device__ __forceinline__ Cursor start(int row, int) const { return {row_scale<T, kBits>(*this, row)}; }
  __device__ __forceinline__ Run load(int row, int column, Cursor& cursor) const {
    Eight<T> v;
    const int groups = (columns + 3) / 4;
    const bool inside = row < rows && column < columns;
    const int codes = inside ? mask[row * stride + column / 8] : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = column / 4 + half, code = codes >> 4 * half & 15;
      const int64_t at = (static_cast<int64_t>(row) * groups + group) * 2;
      const bool present = inside && group < groups;
      const float first = present ? value_at<T, kBits>(data, at) * cursor.scale : 0.f,
                  second = present ? value_at<T, kBits>(data, at + 1) * cursor.scale : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v.at[4 * half + i] = from_float<T>((code & 3) == i ? first : code >> 2 == i ? second : 0.f);
    }
    return v;
  }
};

// A bit per block of 32 x 32 and the kept blocks, one after another.
template <class T, int kBits>
struct Blocks : Storage {
  static constexpr bool kCopies = false;
  using Run = Eight<T>;
  struct Cursor {
    int64_t counted;  // blocks before the one that holds `column`
    int column;
    float scale;
  };
  __device__ __forceinline__ int bit_of(int row, int column) const {
    return row < rows && column < columns ? mask[row / 32 * stride + column / 256] >> column / 32 % 8 & 1 : 0;
  }
  __device__ __forceinline__ void advance(int row, int column, Cursor& cursor) const {
    for (; cursor.column + 32 <= column; cursor.column += 32) cursor.counted += bit_of(row, cursor.column);
  }
  __device__ __forceinline__ Cursor start(int row, int column) const {
    Cursor cursor{row < rows ? offsets[row / 32] : 0, 0, row_scale<T, kBits>(*this, row)};
    advance(row, column, cursor);
    return cursor;
  }
  __device__ __forceinline__ Run load(int row, int column, Cursor& cursor) const {
    advance(row, column, cursor);
    const bool kept = bit_of(row, column);
    const int64_t at = cursor.counted * 1024 + row % 32 * 32 + column % 32;
    Eight<T> v;
#pragma unroll
    for (int i = 0; i < 8; ++i) v.at[i] = from_float<T>(kept ? value_at<T, kBits>(data, at + i) * cursor.scale : 0.f);
    return v;
  }
};

// Index i of uint8 (1), int32 (4) or int64 (8) labels.
__device__ __forceinline__ int label_at(const void* labels, int bytes, int i) {
  if (bytes == 1) return static_cast<const uint8_t*>(labels)[i];
  if (bytes == 4) return static_cast<const int*>(labels)[i];
  return static_cast<int>(static_cast<const int64_t*>(labels)[i]);
}

// Row c holds scales[k] where labels[k] is c: the product with it sums the inputs of each cluster in a fixed order.
// data: labels, of `group` bytes.
template <class T>
struct OneHot : Storage {
  static constexpr bool kCopies = false;
  using Cursor = NoCursor;
  using Run = Eight<T>;
  __device__ __forceinline__ Cursor start(int, int) const { return {}; }
  __device__ __forceinline__ Run load(int row, int column, Cursor&) const {
    Eight<T> v;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = column + i;
      const bool set = row < rows && k < columns && label_at(data, group, k) == row;
      v.at[i] = from_float<T>(!set ? 0.f : scales ? scalar_at<T>(scales, k, 0) : 1.f);
    }
    return v;
  }
};

}  // namespace tinycomp::cuda
