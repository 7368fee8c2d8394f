// Tiles of Intel's AMX: 16 rows of 64 bytes. A thread says what shape its tiles have before it uses them.
#pragma once

#include <cstdint>

#include "interleaved.h"
#include "scratch.h"

// The compilers that know its instructions.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define TINYCOMP_HAS_AMX 1
#include <immintrin.h>
#endif

namespace tinycomp {

constexpr int64_t kTile = 16;

// Inputs that a tile of n has room for: rows of it that are not a power of two would lie across cache lines.
inline int64_t tile_width(int64_t n) {
  int64_t width = 1;
  while (width < n) width *= 2;
  return width;
}

// What was written there is in memory: GCC's intrinsics do not say that they read it.
inline void tiles_read(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  // A tile of r rows of n words; none if either is zero.
  void set(int tile, int64_t r, int64_t n) {
    rows[tile] = static_cast<uint8_t>(n > 0 ? r : 0), row_bytes[tile] = static_cast<uint16_t>(r > 0 ? 4 * n : 0);
  }
#if TINYCOMP_HAS_AMX
  __attribute__((target("amx-tile"))) void use() const {
    tiles_read(this);
    _tile_loadconfig(this);
  }
#endif
};

// Whether the processor has tiles of bfloat16 and of bytes, and the system lets this process use them.
bool may_use_tiles();

}  // namespace tinycomp
