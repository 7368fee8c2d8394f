// Many inputs times a weight on tensor cores: y = x wᵀ in tiles of kM inputs by kN rows of the weight.
//
// Three stages of 64 columns (32 in float32) each: copies run ahead of the products by two. A row of a stage is 128
// bytes, its 16-byte chunks exchanged by the row number (swizzled) so that neither copies nor ldmatrix meet in a bank.
#pragma once

#include "decode.cuh"

namespace tinycomp::cuda {

template <int M, int N, int WARPS_M, int WARPS_N>
struct Tile {
  static constexpr int kM = M, kN = N, kWarpsM = WARPS_M, kWarpsN = WARPS_N, kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kStages = 3, kRowBytes = 128;
  static constexpr size_t kSharedBytes = size_t(kStages) * (M + N) * kRowBytes;
};
using LargeTile = Tile<128, 128, 2, 4>;
using SmallTile = Tile<64, 64, 2, 2>;

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The tile's rows of one stage, 128 bytes of columns from `column` on; zeros outside the matrix.
template <class T, int kRows, int kThreads>
__device__ __forceinline__ void stage_rows(const Matrix<T>& x, int rows, int columns, int first_row, int column,
                                           char* shared) {
  constexpr int kPerChunk = 16 / sizeof(T);
#pragma unroll
  for (int i = threadIdx.x; i < kRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8, at = column + chunk * kPerChunk;
    const T* from = x.data + static_cast<int64_t>(first_row + row) * x.stride + at;
    char* to = shared + swizzled(row, chunk);
    const bool inside = first_row + row < rows;
    if (x.vector && (at + kPerChunk <= columns || at >= columns || !inside)) {
      const bool valid = inside && at < columns;
      ptx::copy_async(to, valid ? from : x.data, valid);
    } else {
      alignas(16) T v[kPerChunk];
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) v[e] = inside && at + e < columns ? from[e] : T{};
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(v);
    }
  }
}

template <class T, int kRows, int kThreads, class Weight, class Cursor>
__device__ __forceinline__ void stage_weight(const Weight& w, int first_row, int column, char* shared,
                                             Cursor* cursors) {
  if constexpr (Weight::kCopies) {
    stage_rows<T, kRows, kThreads>(Matrix<T>{w.row_data(0), w.stride, w.vector != 0}, w.rows, w.columns, first_row,
                                   column, shared);
  } else {
    // A thread keeps its rows through all stages, so that cursors only move forward.
    constexpr int kEights = Weight::kEights, kRuns = 128 / sizeof(T) / 8 / kEights;
#pragma unroll
    for (int i = 0; i * kThreads < kRows * kRuns; ++i) {
      const int item = i * kThreads + threadIdx.x, row = item / kRuns, first = item % kRuns * kEights;
      if (kRows * kRuns % kThreads != 0 && item >= kRows * kRuns) break;
      typename Weight::Run run = w.load(first_row + row, column + 8 * first, cursors[i]);
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const Eight<T> v = w.next(run);
        constexpr int kChunks = sizeof(T) / 2;
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          *reinterpret_cast<uint4*>(shared + swizzled(row, (first + e) * kChunks + c)) =
              reinterpret_cast<const uint4*>(&v)[c];
      }
    }
  }
}

// Adds the products of 32 bytes of columns, number k of a stage, whose inputs it leaves in `a`; lane (group, t) owns
// outputs (group + 8h, 2t + e) of every 16 x 8 tile.
template <class T, class Tile, int kTilesM, int kTilesN, class Sum>
__device__ __forceinline__ void multiply_step(const char* x, const char* w, int k, uint32_t (&a)[kTilesM][4],
                                              Sum (&sums)[kTilesM][kTilesN][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = warp / Tile::kWarpsN * 16 * kTilesM, n0 = warp % Tile::kWarpsN * 8 * kTilesN;
  uint32_t b[kTilesN][2];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) ptx::load_matrices(a[i], x + swizzled(m0 + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
  for (int j = 0; j < kTilesN; j += 2) {
    uint32_t both[4];
    ptx::load_matrices(both, w + swizzled(n0 + 8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
    b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
  }
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) ptx::mma(T{}, sums[i][j], a[i], b[j]);
}

// Adds the products of one stage.
template <class T, class Tile, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_stage(const char* x, const char* w, float (&sums)[kTilesM][kTilesN][4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[kTilesM][4];
      multiply_step<T, Tile>(x, w, k, a, sums);
    }
  } else {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, t = lane % 4;
    const int m0 = warp / Tile::kWarpsN * 16 * kTilesM, n0 = warp % Tile::kWarpsN * 8 * kTilesN;
#pragma unroll 1
    for (int chunk = 0; chunk < 8; ++chunk) {
      float4 b[kTilesN][2];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[j][e] = *reinterpret_cast<const float4*>(w + swizzled(n0 + 8 * j + 2 * t + e, chunk));
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 a = *reinterpret_cast<const float4*>(x + swizzled(m0 + 16 * i + group + 8 * h, chunk));
#pragma unroll
          for (int j = 0; j < kTilesN; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& sum = sums[i][j][2 * h + e];
              sum += a.x * b[j][e].x;
              sum += a.y * b[j][e].y;
              sum += a.z * b[j][e].z;
              sum += a.w * b[j][e].w;
            }
        }
    }
  }
}

// Adds what multiply(products) makes of zeros. Tensor cores truncate where they add, always towards zero: in a long sum
// they add the products of one stage, and float32 additions those of all stages.
template <int kTilesM, int kTilesN, class Multiply>
__device__ __forceinline__ void add_products(float (&sums)[kTilesM][kTilesN][4], const Multiply& multiply) {
  float products[kTilesM][kTilesN][4] = {};
  multiply(products);
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] += products[i][j][e];
}

// Calls store(input, row, value) for every output of a tile in shared memory, its inputs kStride apart.
template <class Tile, int kStride, class Store>
__device__ __forceinline__ void store_shared_tile(const float* shared, int first_input, int first_row, int inputs,
                                                  int rows, const Store& store) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kM * Tile::kN; i += Tile::kThreads) {
    const int m = i / Tile::kN, n = i % Tile::kN;
    if (first_input + m < inputs && first_row + n < rows)
      store(first_input + m, first_row + n, shared[m * kStride + n]);
  }
}

// Calls store(input, row, value) for every output of the tile. They pass through shared memory, so that threads store
// next to each other and the code of `store`, with all that ops add, exists once and not for each of 64 registers.
template <class Tile, int kTilesM, int kTilesN, class Store>
__device__ __forceinline__ void store_tile(const float (&sums)[kTilesM][kTilesN][4], float* shared, int first_input,
                                           int first_row, int inputs, int rows, const Store& store) {
  constexpr int kStride = Tile::kN + 8;  // the eight rows that a warp writes to fall into different banks
  static_assert(sizeof(float) * Tile::kM * kStride <= Tile::kSharedBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = warp / Tile::kWarpsN * 16 * kTilesM + lane / 4;
  const int n0 = warp % Tile::kWarpsN * 8 * kTilesN + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) shared[(m0 + 16 * i + 8 * (e / 2)) * kStride + n0 + 8 * j + e % 2] = sums[i][j][e];
  __syncthreads();
  store_shared_tile<Tile, kStride>(shared, first_input, first_row, inputs, rows, store);
}

// Calls stage(step), which commits its copies, two steps ahead of multiply(step). Both are copied: by reference, what
// they hold takes more registers than ptxas gives some kernels.
template <int kStages, class Stage, class Multiply>
__device__ __forceinline__ void run_steps(int steps, Stage stage, Multiply multiply) {
  // The first rounds only fill stages: one loop, because code that stages a packed weight is long.
  for (int step = 1 - kStages; step < steps; ++step) {
    if (step >= 0) {
      ptx::wait_copies<kStages - 2>();
      // Everybody's copies for this step have landed, and everybody has left the stage that is filled next.
      __syncthreads();
    }
    stage(step + kStages - 1);
    if (step >= 0) multiply(step);
  }
}

// Calls store(input, row, value) for the tile of block (x, y): inputs along x, rows of the weight along y.
template <class T, class Tile, class Weight, class Store>
__device__ __forceinline__ void gemm_tile(const Weight& w, const Matrix<T>& x, int inputs, const Store& store) {
  TINYCOMP_SHARED_MEMORY(char, shared);
  constexpr int kTilesM = Tile::kM / Tile::kWarpsM / 16, kTilesN = Tile::kN / Tile::kWarpsN / 8;
  constexpr int kStages = Tile::kStages, kColumns = Tile::kRowBytes / sizeof(T);
  constexpr int kStageBytes = (Tile::kM + Tile::kN) * Tile::kRowBytes;
  constexpr int kRuns = kColumns / 8 / Weight::kEights;  // of a row in a stage
  constexpr int kRounds = (Tile::kN * kRuns + Tile::kThreads - 1) / Tile::kThreads;
  const int first_input = blockIdx.x * Tile::kM, first_row = blockIdx.y * Tile::kN;
  const int steps = (w.columns + kColumns - 1) / kColumns;
  typename Weight::Cursor cursors[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i)
    cursors[i] = w.start(first_row + (i * Tile::kThreads + static_cast<int>(threadIdx.x)) / kRuns, 0);
  auto stage = [&](int step) {
    char* at = shared + step % kStages * kStageBytes;
    if (step < steps) {
      stage_rows<T, Tile::kM, Tile::kThreads>(x, inputs, w.columns, first_input, step * kColumns, at);
      stage_weight<T, Tile::kN, Tile::kThreads>(w, first_row, step * kColumns, at + Tile::kM * Tile::kRowBytes,
                                                cursors);
    }
    ptx::commit_copies();
  };
  float sums[kTilesM][kTilesN][4] = {};
  run_steps<kStages>(steps, stage, [&](int step) {
    const char* at = shared + step % kStages * kStageBytes;
    multiply_stage<T, Tile>(at, at + Tile::kM * Tile::kRowBytes, sums);
  });
  ptx::wait_copies<0>();
  __syncthreads();
  store_tile<Tile>(sums, reinterpret_cast<float*>(shared), first_input, first_row, inputs, w.rows, store);
}

}  // namespace tinycomp::cuda
