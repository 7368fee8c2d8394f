// Few inputs (at most 16) times a weight, limited by the weight's bytes; and a chain of such products in one launch.
//
// A block of 8 warps makes 8 * kTiles outputs for all inputs: every warp takes a slice of the columns, lanes read 16
// bytes of a row at a time straight into the registers of mma.sync. Its operand order is free, because a sum over
// columns may be taken in any order: lane t of a group of four holds the same run of columns of both operands, as many
// as are in 16 bytes of the row (8, of int8 16, of int4 32), and multiplies eight of them at a time.
#pragma once

#include "weights.cuh"

namespace tinycomp::cuda {

constexpr int kDecodeRows = 16;  // inputs per launch: one operand of mma.sync
constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = 32 * kDecodeWarps;

// A matrix of activations, one input per row.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  bool vector;
};

template <int kTiles>
constexpr size_t decode_shared_bytes = sizeof(float) * kDecodeWarps * kDecodeRows * 8 * kTiles;

__device__ __forceinline__ void words_of(const void* eight, uint32_t (&w)[4]) {
  const uint4 v = *static_cast<const uint4*>(eight);
  w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
}

// Activations may have been written by another block of the same launch: plain loads, never the read-only path.
template <class T>
__device__ __forceinline__ Eight<T> load_activations(const Matrix<T>& x, int m, int inputs, int column, int columns) {
  Eight<T> v;
  const T* p = x.data + m * x.stride + column;
  if (m < inputs && x.vector && column + 8 <= columns) return *reinterpret_cast<const Eight<T>*>(p);
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = m < inputs && column + i < columns ? p[i] : from_float<T>(0.f);
  return v;
}

// Sums of one warp's slice of columns into partial[16][8 * kTiles].
template <class T, int kTiles, class Weight>
__device__ __forceinline__ void decode_slice(const Weight& w, const Matrix<T>& x, int inputs, int first_row,
                                             int first_column, int last_column, float* partial) {
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  constexpr int kEights = Weight::kEights, kRun = 8 * kEights;
  typename Weight::Cursor cursors[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) cursors[j] = w.start(first_row + 8 * j + group, first_column);
  if constexpr (sizeof(T) == 2) {
    float sums[kTiles][4] = {};
#pragma unroll(4 / kEights)
    for (int column = first_column + kRun * t; column - kRun * t < last_column; column += 4 * kRun) {
      typename Weight::Run runs[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) runs[j] = w.load(first_row + 8 * j + group, column, cursors[j]);
#pragma unroll
      for (int i = 0; i < kEights; ++i) {
        const Eight<T> low = load_activations(x, group, inputs, column + 8 * i, w.columns),
                       high = load_activations(x, group + 8, inputs, column + 8 * i, w.columns);
        uint32_t a0[4], a1[4];
        words_of(&low, a0);
        words_of(&high, a1);
        const uint32_t first[4] = {a0[0], a1[0], a0[1], a1[1]}, second[4] = {a0[2], a1[2], a0[3], a1[3]};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const Eight<T> row = w.next(runs[j]);
          uint32_t b[4];
          words_of(&row, b);
          ptx::mma(T{}, sums[j], first, {b[0], b[1]});
          ptx::mma(T{}, sums[j], second, {b[2], b[3]});
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) partial[(group + 8 * (e / 2)) * 8 * kTiles + 8 * j + 2 * t + e % 2] = sums[j][e];
  } else {
    float sums[kTiles][kDecodeRows] = {};
    for (int column = first_column + kRun * t; column - kRun * t < last_column; column += 4 * kRun) {
      typename Weight::Run runs[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) runs[j] = w.load(first_row + 8 * j + group, column, cursors[j]);
#pragma unroll 1
      for (int i = 0; i < kEights; ++i) {
        Eight<T> rows[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) rows[j] = w.next(runs[j]);
        // Sixteen addresses computed before the loop would not fit into registers.
        const Matrix<T> rows_of_x{x.data, ptx::opaque(x.stride), x.vector};
#pragma unroll
        for (int m = 0; m < kDecodeRows; ++m) {
          if (m >= inputs) break;
          const Eight<T> v = load_activations(rows_of_x, m, inputs, column + 8 * i, w.columns);
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[j][m] += to_float(rows[j].at[e]) * to_float(v.at[e]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int m = 0; m < kDecodeRows; ++m) {
        float sum = sums[j][m];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (t == 0) partial[m * 8 * kTiles + 8 * j + group] = sum;
      }
  }
}

// Calls store(input, row, value) for 8 * kTiles rows from first_row on, with the sums over columns that
// slice(first_column, last_column, partial) leaves for each warp's part of them, a multiple of kStep but for the last;
// all threads of the block take part.
template <int kTiles, int kStep, class Slice, class Store>
__device__ __forceinline__ void sum_slices(int columns, int rows, int inputs, int first_row, const Slice& slice,
                                           const Store& store) {
  TINYCOMP_SHARED_MEMORY(float, partial);
  constexpr int kOutputs = kDecodeRows * 8 * kTiles;
  const int warp = threadIdx.x / 32;
  const int size = (columns + kStep * kDecodeWarps - 1) / (kStep * kDecodeWarps) * kStep;
  const int first = min(warp * size, columns), last = min(first + size, columns);
  slice(first, last, partial + warp * kOutputs);
  __syncthreads();
  for (int i = threadIdx.x; i < kOutputs; i += kDecodeThreads) {
    const int m = i / (8 * kTiles), row = first_row + i % (8 * kTiles);
    if (m >= inputs || row >= rows) continue;
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < kDecodeWarps; ++s) sum += partial[s * kOutputs + i];
    store(m, row, sum);
  }
  __syncthreads();
}

// Calls store(input, row, value) for 8 * kTiles rows of w from first_row on; all threads of the block take part.
template <class T, int kTiles, class Weight, class Store>
__device__ __forceinline__ void decode_rows(const Weight& w, const Matrix<T>& x, int inputs, int first_row,
                                            const Store& store) {
  constexpr int kStep = 32 * Weight::kEights;  // columns that a warp reads at once
  const auto slice = [&](int first, int last, float* partial) {
    decode_slice<T, kTiles>(w, x, inputs, first_row, first, last, partial);
  };
  sum_slices<kTiles, kStep>(w.columns, w.rows, inputs, first_row, slice, store);
}

// Runs items of several stages in one launch, a stage only after the whole of the one before it.
//
// Blocks draw tickets in order, so an item that waits can only wait for items that running blocks already hold: no
// deadlock, however few blocks fit on the device. counters: kStages + 2 zeros, which the last block leaves at zero.
template <int kStages, class Item>
__device__ __forceinline__ void run_stages(unsigned* counters, const int (&items)[kStages], const Item& run) {
  __shared__ unsigned ticket;
  unsigned *drawn = counters, *finished = counters + 1, *left = counters + 1 + kStages;
  for (;;) {
    if (threadIdx.x == 0) ticket = atomicAdd(drawn, 1u);
    __syncthreads();
    int index = ticket, stage = 0, before = 0;
#pragma unroll
    for (int s = 0; s < kStages; ++s)
      if (stage == s && index >= items[s]) index -= before = items[s], ++stage;
    if (stage == kStages) break;
    if (stage > 0) {
      if (threadIdx.x == 0)
        while (ptx::load_acquire(finished + stage - 1) < static_cast<unsigned>(before)) {
        }
      __syncthreads();
    }
    run(stage, index);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(finished + stage, 1u);
  }
  if (threadIdx.x == 0 && atomicAdd(left, 1u) == gridDim.x * gridDim.y - 1)
    for (int i = 0; i < kStages + 2; ++i) counters[i] = 0;
}

}  // namespace tinycomp::cuda
