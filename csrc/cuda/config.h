// Which kernel a product runs on and with what grid: pure functions of shapes, printed and tested without a GPU.
#pragma once

#include <cstdint>

namespace tinycomp::cuda {

struct Product {
  int64_t inputs, columns, rows;  // y (inputs, rows) = x (inputs, columns) wᵀ
};
// Instructions of the kernel for large tiles: mma.sync, which every GPU since sm_80 has, or those of one GPU.
enum Instructions : int { kMma, kWgmma, kTcgen05 };
struct Config {
  bool decode;                // all stages in one launch on at most 16 inputs; otherwise tiles, one launch per stage
  int row_tiles;              // decode: 8 * row_tiles rows of a weight per item
  bool large;                 // tiles of 128 x 128 instead of 64 x 64
  Instructions instructions;  // of large tiles: product_tiles, product_wgmma (sm_90a) or product_tcgen05 (sm_100a)
  int64_t blocks;             // decode: the whole grid
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Decode wants all processors busy before it wants to reuse the inputs it has loaded; three or two of its blocks fit on
// a processor (the budgets of registers and shared memory are tested). Large tiles want a block for every processor.
template <int kStages>
constexpr Config pick_config(const Product (&stages)[kStages], int processors, Instructions own = kMma) {
  Config config{stages[0].inputs <= 16, 2, true, kMma, 0};
  int64_t items = 0;
  for (const Product& p : stages) {
    if (ceil_div(p.rows, 16) < 2 * processors) config.row_tiles = 1;
    if (ceil_div(p.inputs, 128) * ceil_div(p.rows, 128) < processors) config.large = false;
  }
  if (config.large && !config.decode) config.instructions = own;
  for (const Product& p : stages) items += ceil_div(p.rows, 8 * config.row_tiles);
  const int64_t fit = (config.row_tiles == 1 ? 3 : 2) * static_cast<int64_t>(processors);
  config.blocks = items < fit ? items : fit;
  return config;
}

}  // namespace tinycomp::cuda
