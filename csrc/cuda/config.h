// Which kernel a product runs on and with what grid: pure functions of shapes, printed and tested without a GPU.
#pragma once

#include <cstdint>

namespace tinycomp::cuda {

struct Product {
  int64_t inputs, columns, rows;  // y (inputs, rows) = x (inputs, columns) wᵀ
};
struct Config {
  bool decode;     // all stages in one launch on at most 16 inputs; otherwise tiles, one launch per stage
  int row_tiles;   // decode: 8 * row_tiles rows of a weight per item
  bool large;      // tiles of 128 x 128 instead of 64 x 64
  bool wgmma;      // large tiles by product_wgmma (sm_90a)
  int64_t blocks;  // decode: the whole grid
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Decode wants all processors busy before it wants to reuse the inputs it has loaded; three or two of its blocks fit on
// a processor (the budgets of registers and shared memory are tested). Large tiles want a block for every processor.
template <int kStages>
constexpr Config pick_config(const Product (&stages)[kStages], int processors, bool wgmma = false) {
  Config config{stages[0].inputs <= 16, 2, true, false, 0};
  int64_t items = 0;
  for (const Product& p : stages) {
    if (ceil_div(p.rows, 16) < 2 * processors) config.row_tiles = 1;
    if (ceil_div(p.inputs, 128) * ceil_div(p.rows, 128) < processors) config.large = false;
  }
  config.wgmma = wgmma && config.large && !config.decode;
  for (const Product& p : stages) items += ceil_div(p.rows, 8 * config.row_tiles);
  const int64_t fit = (config.row_tiles == 1 ? 3 : 2) * static_cast<int64_t>(processors);
  config.blocks = items < fit ? items : fit;
  return config;
}

}  // namespace tinycomp::cuda
