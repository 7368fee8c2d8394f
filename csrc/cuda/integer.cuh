// Inputs rounded to int8 times a weight of int8 or int4 levels, on the integer tensor cores.
//
// First the inputs are rounded by row and group, and every group is filled up to a multiple of 32 columns with zeros:
// 32 columns, one mma.sync, lie in one group. "Padded" columns are those of the result. For few inputs that is a stage
// of the one launch, otherwise a launch of its own. The products of a group are summed in int32, exactly, and its sum
// is added in float32:
//   y += (Σ x q - zero Σ x) (scale of x) (scale of w)
// where Σ x is one more product, by ones. An int4 level q enters as 16 q, a nibble in the upper half of a byte.
#pragma once

#include "linear.cuh"

#define TINYCOMP_LEVELS(x)                                                                                   \
  int8_t *x##_levels, int64_t x##_stride, float *x##_scales, int x##_inputs, int x##_columns, int x##_group, \
      int x##_padded
#define TINYCOMP_LEVELS_NAMES(x) {x##_levels, x##_stride, x##_scales, x##_inputs, x##_columns, x##_group, x##_padded}

namespace tinycomp::cuda {

constexpr int kRoundThreads = 256;
constexpr uint32_t kOnes = 0x01010101;  // four levels of 1

// inputs (inputs, stride) as levels, zero from `columns` on; scales (groups, inputs).
struct RoundedInputs {
  int8_t* levels;
  int64_t stride;  // a multiple of 128
  float* scales;
  int inputs, columns;  // columns: padded
  int group, padded;    // columns of a group, and with their padding

  __device__ __forceinline__ uint2 eight(int m, int column) const {
    return m < inputs ? *reinterpret_cast<const uint2*>(levels + m * stride + column) : uint2{0, 0};
  }
  __device__ __forceinline__ float scale(int m, int g) const {
    return m < inputs ? scales[static_cast<int64_t>(g) * inputs + m] : 0.f;
  }
};

// Rounds group g of row m as `round_activations` does, bit for bit; all lanes of a warp take part.
template <class T>
__device__ __forceinline__ void round_group(const Matrix<T>& matrix, int m, int g, int columns,
                                            const RoundedInputs& to) {
  const int lane = threadIdx.x % 32, groups = (columns + to.group - 1) / to.group;
  const T* x = matrix.data + m * matrix.stride + static_cast<int64_t>(g) * to.group;
  const int count = min(to.group, columns - g * to.group);
  // Of the bits of |x|, which are in the order of the numbers, NaN above all.
  unsigned largest = 0;
  for (int i = lane; i < count; i += 32) largest = max(largest, __float_as_uint(to_float(x[i])) & 0x7fffffffu);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
  const float size = __uint_as_float(largest), factor = largest ? 127.f / size : 0.f;
  // The last group fills its row.
  const int64_t first = static_cast<int64_t>(g) * to.padded, end = g + 1 < groups ? to.padded : to.stride - first;
  bool undefined = false;
  for (int i = 4 * lane; i < end; i += 128) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e >= count) continue;
      const float level = rintf(to_float(x[i + e]) * factor);
      undefined |= level != level;
      word |= (static_cast<int>(fminf(fmaxf(level, -127.f), 127.f)) & 255u) << 8 * e;
    }
    *reinterpret_cast<uint32_t*>(to.levels + m * to.stride + first + i) = word;
  }
  undefined = __ballot_sync(~0u, undefined) != 0;
  if (lane == 0)
    to.scales[static_cast<int64_t>(g) * to.inputs + m] = undefined ? __uint_as_float(0x7fffffffu) : size / 127.f;
}

template <class T>
__global__ void __launch_bounds__(kRoundThreads) round_kernel(TINYCOMP_INPUT(T), int columns, TINYCOMP_LEVELS(to)) {
  const RoundedInputs to TINYCOMP_LEVELS_NAMES(to);
  const int groups = (columns + to.group - 1) / to.group;
  for (int g = blockIdx.y * (kRoundThreads / 32) + threadIdx.x / 32; g < groups; g += gridDim.y * (kRoundThreads / 32))
    round_group<T>(TINYCOMP_INPUT_NAMES, blockIdx.x, g, columns, to);
}

// Levels of a weight in padded columns. Behind the end of a group anything may stand: inputs are zero there.
template <class T, int kBits>
struct Levels : Storage {
  static constexpr int kUnit = kBits == 4 ? 16 : 1;  // levels are multiplied as so many times what they are
  int x_group, x_padded;
  bool regular;  // padded columns are columns
  __device__ __forceinline__ Levels(const Storage& w, const RoundedInputs& x)
      : Storage(w), x_group(x.group), x_padded(x.padded), regular(x.group == x.padded || x.columns == x.padded) {}

  // kBytes of a row as they are stored, from a padded column on.
  template <int kBytes>
  __device__ __forceinline__ void load(int row, int column, uint32_t (&words)[kBytes / 4]) const {
    constexpr int kColumns = kBytes * 8 / kBits;
    int valid = columns - column;
    if (!regular) {
      const int g = column / x_padded, offset = column - g * x_padded;
      column = g * x_group + offset;
      valid = min(x_group - offset, columns - column);
    }
    if (row >= rows) valid = 0;
    const auto* p = static_cast<const uint8_t*>(data) + row * stride + static_cast<int64_t>(column) * kBits / 8;
    if (vector && regular && valid >= kColumns) {
      if constexpr (kBytes == 16) {
        const uint4 v = ptx::load_streamed(reinterpret_cast<const uint4*>(p));
        words_of(&v, words);
      } else if constexpr (kBytes == 8) {
        const uint2 v = *reinterpret_cast<const uint2*>(p);
        words[0] = v.x, words[1] = v.y;
      } else {
        words[0] = *reinterpret_cast<const uint32_t*>(p);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (i % 4 == 0) words[i / 4] = 0;
      if (i * 8 / kBits < valid) words[i / 4] |= static_cast<uint32_t>(p[i]) << i % 4 * 8;
    }
  }
  // Eight of the loaded levels, in order, a byte each.
  template <int kWords>
  __device__ __forceinline__ static void eight(const uint32_t (&words)[kWords], int i, uint32_t (&levels)[2]) {
    if constexpr (kBits == 8) {
      levels[0] = words[2 * i], levels[1] = words[2 * i + 1];
    } else {
      const uint32_t even = (words[i] << 4 & 0xf0f0f0f0) ^ 0x80808080, odd = (words[i] & 0xf0f0f0f0) ^ 0x80808080;
      levels[0] = __byte_perm(even, odd, 0x5140), levels[1] = __byte_perm(even, odd, 0x7362);
    }
  }
  // What a group's Σ x q and Σ x add to an output.
  __device__ __forceinline__ float sum(int dot, int sum_x, float x_scale, float scale, float zero) const {
    return (static_cast<float>(dot) * (1.f / kUnit) - zero * static_cast<float>(sum_x)) * (x_scale * scale);
  }
  // Of a row and a group.
  __device__ __forceinline__ float2 scale_and_zero(int row, int g) const {
    if (row >= rows) return {0.f, 0.f};
    const int64_t at = group < columns ? static_cast<int64_t>(row) * ((columns + group - 1) / group) + g : row;
    const float zero = zeros ? scalar_at<T>(zeros, at, wide_scales) - (kBits == 4 ? 8.f : 0.f) : 0.f;
    return {scalar_at<T>(scales, at, wide_scales), zero};
  }
};

// Sums of one warp's slice of padded columns into partial[16][8]: see decode_slice. A lane reads kBytes of its row.
template <class T, int kBits, int kBytes>
__device__ __forceinline__ void integer_slice(const Levels<T, kBits>& w, const RoundedInputs& x, int first_row,
                                              int first_column, int last_column, float* partial) {
  constexpr int kRun = kBytes * 8 / kBits;
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  float sums[4] = {};
  int dots[4] = {}, sums_x[4] = {};
  int g = first_column / x.padded, left = (g + 1) * x.padded - first_column;
  for (int column = first_column; column < last_column; column += 4 * kRun) {
    const int at = column + kRun * t;
    uint32_t words[kBytes / 4];
    w.template load<kBytes>(first_row + group, at, words);
#pragma unroll
    for (int i = 0; i < kRun / 8; ++i) {
      const uint2 low = x.eight(group, at + 8 * i), high = x.eight(group + 8, at + 8 * i);
      const uint32_t a[4] = {low.x, high.x, low.y, high.y};
      uint32_t b[2];
      w.eight(words, i, b);
      ptx::mma(int8_t{}, dots, a, b);
      if (w.zeros) ptx::mma(int8_t{}, sums_x, a, {kOnes, kOnes});
    }
    left -= 4 * kRun;
    if (left > 0 && column + 4 * kRun < last_column) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 of_w = w.scale_and_zero(first_row + 2 * t + e % 2, g);
      sums[e] += w.sum(dots[e], sums_x[e], x.scale(group + 8 * (e / 2), g), of_w.x, of_w.y);
      dots[e] = sums_x[e] = 0;
    }
    ++g, left = x.padded;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) partial[(group + 8 * (e / 2)) * 8 + 2 * t + e % 2] = sums[e];
}

// A layer among those that share an input. One that is not there has no rows.
template <class T>
struct IntegerLayer {
  Storage w;
  const T* bias;
  T* y;
};

// Rounds x, then multiplies: the groups of a row of x that a block's warps take at once are an item, then eight rows of
// a layer. It may be read by other blocks than wrote it, so nothing of it is loaded through the read-only path.
template <class T, int kBits, int kBytes>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    integer_decode(TINYCOMP_INPUT(T), int columns, TINYCOMP_LEVELS(to), TINYCOMP_WEIGHT(a), const T* a_bias, T* a_y,
                   TINYCOMP_WEIGHT(b), const T* b_bias, T* b_y, TINYCOMP_WEIGHT(c), const T* c_bias, T* c_y,
                   int64_t y_stride, unsigned* counters) {
  const RoundedInputs x TINYCOMP_LEVELS_NAMES(to);
  const IntegerLayer<T> a{TINYCOMP_WEIGHT_NAMES(a), a_bias, a_y}, b{TINYCOMP_WEIGHT_NAMES(b), b_bias, b_y},
      c{TINYCOMP_WEIGHT_NAMES(c), c_bias, c_y};
  const int groups = (columns + x.group - 1) / x.group, in_row = (groups + kDecodeWarps - 1) / kDecodeWarps;
  const int in_a = items<T, 1>(a.w.rows), in_b = items<T, 1>(b.w.rows), in_c = items<T, 1>(c.w.rows);
  run_stages<2>(counters, {x.inputs * in_row, in_a + in_b + in_c}, [&](int stage, int item) {
    if (stage == 0) {
      const int g = item % in_row * kDecodeWarps + threadIdx.x / 32;
      if (g < groups) round_group<T>(TINYCOMP_INPUT_NAMES, item / in_row, g, columns, x);
      return;
    }
    const int which = (item >= in_a) + (item >= in_a + in_b);
    item -= which == 0 ? 0 : which == 1 ? in_a : in_a + in_b;
    const IntegerLayer<T> layer = which == 0 ? a : which == 1 ? b : c;
    const Levels<T, kBits> weight(layer.w, x);
    const auto slice = [&](int first, int last, float* partial) {
      integer_slice<T, kBits, kBytes>(weight, x, item * 8, first, last, partial);
    };
    sum_slices<1, 4 * kBytes * 8 / kBits>(
        x.columns, layer.w.rows, x.inputs, item * 8, slice,
        Output<T>{layer.y, y_stride, nullptr, 0, nullptr, layer.bias, nullptr, 0, nullptr, 0, nullptr});
  });
}

using LargeIntegerTile = Tile<128, 128, 4, 4>;

// Products of a tile, as in product_tiles with 128 columns to a stage; groups are multiples of kSteps * 32 of them.
template <class T, int kBits, class Tile, int kSteps>
__global__ void __launch_bounds__(Tile::kThreads)
    integer_tiles(TINYCOMP_LEVELS(x), TINYCOMP_WEIGHT(w), TINYCOMP_OUTPUT(o, T)) {
  TINYCOMP_SHARED_MEMORY(char, shared);
  constexpr int kTilesM = Tile::kM / Tile::kWarpsM / 16, kTilesN = Tile::kN / Tile::kWarpsN / 8;
  constexpr int kStages = Tile::kStages, kColumns = Tile::kRowBytes;
  constexpr int kStageBytes = (Tile::kM + Tile::kN) * Tile::kRowBytes;
  const RoundedInputs x TINYCOMP_LEVELS_NAMES(x);
  const Levels<T, kBits> weight(Storage TINYCOMP_WEIGHT_NAMES(w), x);
  const Output<T> out TINYCOMP_OUTPUT_NAMES(o);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_input = blockIdx.x * Tile::kM, first_row = blockIdx.y * Tile::kN;
  const int steps = (x.columns + kColumns - 1) / kColumns;
  const auto stage = [&](int step) {
    char *to_x = shared + step % kStages * kStageBytes, *to_w = to_x + Tile::kM * Tile::kRowBytes;
    if (step < steps) {
      const int column = step * kColumns;
      stage_rows<int8_t, Tile::kM, Tile::kThreads>({x.levels, x.stride, true}, x.inputs, x.columns, first_input, column,
                                                   to_x);
      if (kBits == 8 && weight.regular) {
        stage_rows<int8_t, Tile::kN, Tile::kThreads>(
            {static_cast<const int8_t*>(weight.data), weight.stride, weight.vector != 0}, weight.rows, weight.columns,
            first_row, column, to_w);
      } else {
#pragma unroll
        for (int i = threadIdx.x; i < Tile::kN * 8; i += Tile::kThreads) {
          const int row = i / 8, chunk = i % 8;
          uint32_t words[kBits / 2], levels[2][2];
          weight.template load<2 * kBits>(first_row + row, column + 16 * chunk, words);
          weight.eight(words, 0, levels[0]), weight.eight(words, 1, levels[1]);
          *reinterpret_cast<uint4*>(to_w + swizzled(row, chunk)) = {levels[0][0], levels[0][1], levels[1][0],
                                                                    levels[1][1]};
        }
      }
    }
    ptx::commit_copies();
  };
  float sums[kTilesM][kTilesN][4] = {};
  int dots[kTilesM][kTilesN][4] = {}, sums_x[kTilesM][4] = {};
  int g = 0, left = x.padded;
  const auto end_group = [&] {
    const int m0 = first_input + warp / Tile::kWarpsN * 16 * kTilesM + lane / 4;
    const int n0 = first_row + warp % Tile::kWarpsN * 8 * kTilesN + lane % 4 * 2;
    float x_scales[kTilesM][2];
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) x_scales[i / 2][i % 2] = x.scale(m0 + 8 * i, g);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 of_w = weight.scale_and_zero(n0 + 8 * j + e, g);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            int& dot = dots[i][j][2 * h + e];
            sums[i][j][2 * h + e] += weight.sum(dot, sums_x[i][2 * h], x_scales[i][h], of_w.x, of_w.y);
            dot = 0;
          }
      }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_x[i][e] = 0;
    ++g, left = x.padded;
  };
  run_steps<kStages>(steps, stage, [&](int step) {
    const char *at_x = shared + step % kStages * kStageBytes, *at_w = at_x + Tile::kM * Tile::kRowBytes;
#pragma unroll 1
    for (int first = 0; first < 4 && step * kColumns + 32 * first < x.columns; first += kSteps) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t a[kTilesM][4];
        multiply_step<int8_t, Tile>(at_x, at_w, first + k, a, dots);
        if (weight.zeros)
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) ptx::mma(int8_t{}, sums_x[i], a[i], {kOnes, kOnes});
      }
      left -= 32 * kSteps;
      if (left == 0) end_group();
    }
  });
  ptx::wait_copies<0>();
  __syncthreads();
  store_tile<Tile>(sums, reinterpret_cast<float*>(shared), first_input, first_row, x.inputs, weight.rows, out);
}

}  // namespace tinycomp::cuda
