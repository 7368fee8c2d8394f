// Prefetches of weights, which are read once.
//
// On AMD processors they go to the second-level cache: the nearest one waits for few misses at a time, and prefetches
// into it take their places (Zen 4, bfloat16 from memory: rows of 8 KB 18 -> 21 GB/s, of 1 KB 10 -> 18). The distances
// for the nearest cache were measured on Intel's Sapphire Rapids. The second-level cache is what few inputs ask for on
// processors with AMX (rows_in_order in dot_kernels.h), and everywhere what a panel of many inputs asks for ahead: the
// nearest one is full of the panel itself.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tinycomp {

extern const bool on_amd;  // dot.cpp

inline void prefetch(const void* p) { on_amd ? __builtin_prefetch(p, 0, 2) : __builtin_prefetch(p); }

// What a thread comes to next in memory, unless it has just come from before it: kernels ask for what is 16 KB ahead,
// and would wait for the beginning a few lines at a time.
inline void prefetch_beginning(const void* from, int64_t bytes, const void* end) {
  thread_local const void* came_to = nullptr;
  constexpr int64_t kFar = 16384;
  const char* const p = static_cast<const char*>(from);
  for (int64_t i = 0; on_amd && from != came_to && i < std::min(bytes, kFar); i += 64) __builtin_prefetch(p + i, 0, 2);
  came_to = end;
}

}  // namespace tinycomp
