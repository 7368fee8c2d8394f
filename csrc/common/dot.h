// Dot products of the rows of a weight with a few input rows: the one loop that every small-batch kernel streams
// weights through. Chosen once per process among AVX-512, AVX2 and portable code.
#pragma once

#include <cstdint>

namespace tinycomp {

enum class Type { f32, bf16, f16, i8, u4 };  // rows of the last two are for rounded.h

// Rows are computed in blocks of this many; a block's arithmetic does not depend on which thread runs it.
constexpr int64_t kBlockRows = 4;

// From this many inputs on, rows are transposed into panels of up to 32, where inputs are not interleaved: that costs
// less than summing across registers.
constexpr int64_t kPanelInputs = 8;

// out[j * ldo + i] = sum_c w[i, c] * x[j * ldx + c] for i < rows, j < m, summed in float32.
// `w` points at row 0; rows are `stride` bytes apart and their entries adjacent.
void dot(Type type, const void* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx, int64_t m,
         float* out, int64_t ldo);

// The same with weights and inputs both in bfloat16, two to a word, an even number of columns: products are exact, sums
// in float32. Distances and `words` count words. Only where `has_pairs()`: the processor is faster so.
void dot_pairs(const void* w, int64_t stride, int64_t rows, int64_t words, const float* x, int64_t ldx, int64_t m,
               float* out, int64_t ldo);
bool has_pairs();

// How the inputs lie that rows meet: one after another, in float32 or as pairs; or side by side (interleaved.h), in
// words that are floats or, for rows of bfloat16, pairs; or side by side as sums of bfloat16 numbers (parts_amx.cpp).
enum class Order { rows, pairs, beside, parts };

// The last two where one of them is faster, of which the type of rows decides what their words are; else `rows`.
// Pairs have an even number of columns. `cached`: rows come from a cache, not from memory.
Order side_by_side(Type type, int64_t m, int64_t cols, bool cached = false);

// Words of each input then, with the zeros that follow.
int64_t words_beside(Order order, Type type, int64_t cols);

// `squares`, of parts alone and if not null: the sum of the squares of each row.
void dot_beside(Order order, Type type, const void* w, int64_t stride, int64_t rows, int64_t cols, const float* x,
                int64_t m, float* out, int64_t ldo, float* squares = nullptr);

// Whether there are tiles of AMX, which pairs and parts that are side by side meet in.
bool has_tiles();

// Whether so few inputs meet rows of so many bytes, of floating type, in the order of memory: measured, and done, only
// where there are tiles.
constexpr int64_t kFewInOrder = 4;
inline bool meet_in_order(int64_t m, int64_t bytes) {
  constexpr int64_t kShortRow = 3072;
  return m > 0 && m <= (bytes <= kShortRow ? kFewInOrder : 2) && has_tiles();
}

// Columns [first, last) of m inputs of type `source`, `distance` bytes apart and `cols` long, put side by side for rows
// of `type`: the same type, or float32 for rows of float16. `first` is a multiple of 16, and of 32 for parts.
void interleave(Order order, Type type, Type source, const char* from, int64_t distance, int64_t m, int64_t cols,
                int64_t first, int64_t last, float* to);

// The other way round, sums of rows: out[j * ldo + c] = sum_i x[j * ldx + i] * w[i, c] for c < cols, j < m.
void sum_rows(Type type, const void* w, int64_t stride, int64_t rows, int64_t cols, const float* x, int64_t ldx,
              int64_t m, float* out, int64_t ldo);

// Blocks of kBlock x kBlock weights, `count` of them one after another in memory, of which number b meets inputs from
// columns[b] on: out[j * ldo + i] += sum_b sum_c w_b[i, c] * x[j * ldx + columns[b] + c] for i < kBlock, j < m.
constexpr int64_t kBlock = 32;
void dot_blocks(Type type, const void* w, const int32_t* columns, int64_t count, const float* x, int64_t ldx, int64_t m,
                float* out, int64_t ldo);

// The same of bfloat16 and inputs side by side, `words` words each, where there are tiles; columns[b] counts blocks.
// Sums replace what is in `out`.
void dot_tile_blocks(const void* w, const int32_t* columns, int64_t count, const float* x, int64_t words, int64_t m,
                     float* out, int64_t ldo);

// Exact float32 copies of n adjacent f32, bf16 or f16 values.
void widen(Type type, const void* from, float* to, int64_t n);

// n float32 values rounded to f32, bf16 or f16.
void narrow(Type type, const float* from, void* to, int64_t n);

// Which instructions loops are compiled for that compilers vectorise (lanes.h).
enum class Loops { portable, avx2, avx512 };
Loops loops();

// "amx", "avx512bf16", "avx512vbmi2", "avx512vnni", "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace tinycomp
