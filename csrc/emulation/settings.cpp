// Settings and records of the emulation, for the tests (read with ctypes).
#define TINYCOMP_EMULATION_MAIN
#include <dlfcn.h>

#include "../cuda/config.h"
#include "../cuda/host.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void tinycomp_emulate(int order, unsigned seed, bool lazy_copies, int processors, int own) {
  emulation::options = {order, seed, lazy_copies};
  tinycomp::cuda::emulated_processors = processors;
  tinycomp::cuda::emulated_instructions = static_cast<tinycomp::cuda::Instructions>(own);
}

// From here on launches are noted and not run (on), or run (off). As while a graph is captured, every buffer is a
// tensor of its own.
EXPORT void tinycomp_record(bool on) {
  emulation::recording = tinycomp::cuda::emulated_capture = on;
  if (on) emulation::launches.clear();
}

// Runs a kernel that was recorded in this process: grid and block (x, y, z), the bits of each argument. Returns what
// went wrong, or null.
EXPORT const char* tinycomp_replay(const void* kernel, const unsigned* grid_and_block, size_t shared_bytes,
                                   const uint64_t* bits) {
  static std::string error;
  const unsigned* g = grid_and_block;
  try {
    emulation::replays.at(kernel)(dim3(g[0], g[1], g[2]), dim3(g[3], g[4], g[5]), shared_bytes, bits);
  } catch (const std::exception& fault) {
    error = fault.what();
    return error.c_str();
  }
  return nullptr;
}

// One line per recorded launch: entry name, grid, block, shared bytes, then kind:bits of each argument (p pointer,
// l 64 bits, i 32 bits, f float).
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

// decode, row_tiles, large, blocks, instructions of one product.
EXPORT void tinycomp_pick_config(int64_t inputs, int64_t columns, int64_t rows, int processors, int own,
                                 int64_t* config) {
  const auto c = tinycomp::cuda::pick_config({{inputs, columns, rows}}, processors,
                                             static_cast<tinycomp::cuda::Instructions>(own));
  config[0] = c.decode, config[1] = c.row_tiles, config[2] = c.large, config[3] = c.blocks, config[4] = c.instructions;
}
