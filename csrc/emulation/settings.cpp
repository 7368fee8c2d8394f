// Settings and records of the emulation, for the tests (read with ctypes).
#define TINYCOMP_EMULATION_MAIN
#include <dlfcn.h>

#include "../cuda/config.h"
#include "../cuda/host.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void tinycomp_emulate(int order, unsigned seed, bool lazy_copies, int processors) {
  emulation::options = {order, seed, lazy_copies};
  tinycomp::cuda::emulated_processors = processors;
}

// Starts a record of launches, or ends it.
EXPORT void tinycomp_record(bool on) {
  emulation::record = on;
  if (on) emulation::launches.clear();
}

// One line per recorded launch: entry name, grid, block, shared bytes, then kind:bits of each argument.
EXPORT const char* tinycomp_recorded() {
  static std::string text;
  text.clear();
  for (const emulation::Launch& launch : emulation::launches) {
    Dl_info info;
    text += dladdr(launch.kernel, &info) && info.dli_sname ? info.dli_sname : "?";
    for (const uint64_t n :
         {launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.block.y, launch.block.z})
      text += " " + std::to_string(n);
    text += " " + std::to_string(launch.shared_bytes);
    for (const auto& [kind, bits] : launch.arguments) text += std::string(" ") + kind + ":" + std::to_string(bits);
    text += "\n";
  }
  return text.c_str();
}

// decode, row_tiles, large, blocks of one product.
EXPORT void tinycomp_pick_config(int64_t inputs, int64_t columns, int64_t rows, int processors, int64_t* config) {
  const auto c = tinycomp::cuda::pick_config({{inputs, columns, rows}}, processors);
  config[0] = c.decode, config[1] = c.row_tiles, config[2] = c.large, config[3] = c.blocks;
}
