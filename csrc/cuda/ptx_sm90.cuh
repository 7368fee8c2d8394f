// Instructions of sm_90a: tensor copies (TMA) and their barriers, products of a warp group. Once
// for the device and once for the emulation, whose model of shared-memory descriptors is that of the PTX manual.
#pragma once

#include "ptx.cuh"
#if !defined(TINYCOMP_EMULATION)
#include <cuda.h>
#endif

namespace tinycomp::cuda::ptx {

// What one tensor copy brings: rows of 128 bytes.
constexpr int kBoxRows = 128, kBoxColumns = 64;

// Where wgmma reads an operand: rows of 128 bytes of columns, chunks of 16 exchanged within groups of eight rows, which
// follow each other. Operands are 1024-aligned, steps along the columns stay within a row.
__device__ __forceinline__ uint64_t operand(unsigned address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupBytes = 1024 >> 4;
  return kSwizzle128 | kGroupBytes << 32 | 1ull << 16 | (address >> 4 & 0x3FFF);
}

#if !defined(TINYCOMP_EMULATION)

using TensorMap = CUtensorMap;

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Barriers that were initialised can be used by tensor copies after it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Copies the map's box from (row, column); zeros outside the matrix.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finished;\n"
      "bra again;\nfinished:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
#define TINYCOMP_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
// d (64, 128) += a (64, 16) bᵀ (128, 16) by four warps; d as of mma.sync, 16 rows per warp.
#define TINYCOMP_WGMMA(T, name)                                                                                   \
  __device__ __forceinline__ void wgmma(T, float (&d)[16][4], uint64_t a, uint64_t b) {                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                                     \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "     \
                 "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "     \
                 "%56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;"                              \
                 : TINYCOMP_SUMS(0), TINYCOMP_SUMS(1), TINYCOMP_SUMS(2), TINYCOMP_SUMS(3), TINYCOMP_SUMS(4),      \
                   TINYCOMP_SUMS(5), TINYCOMP_SUMS(6), TINYCOMP_SUMS(7), TINYCOMP_SUMS(8), TINYCOMP_SUMS(9),      \
                   TINYCOMP_SUMS(10), TINYCOMP_SUMS(11), TINYCOMP_SUMS(12), TINYCOMP_SUMS(13), TINYCOMP_SUMS(14), \
                   TINYCOMP_SUMS(15)                                                                              \
                 : "l"(a), "l"(b));                                                                               \
  }
TINYCOMP_WGMMA(bf16, "bf16")
TINYCOMP_WGMMA(f16, "f16")
#undef TINYCOMP_WGMMA
#undef TINYCOMP_SUMS

#else

struct TensorMap {
  const void* data;
  int64_t columns, rows, stride_bytes;
  int box_columns, box_rows, element_bytes;
};

inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(p) - emulation::context.dynamic_shared);
}
inline unsigned exchanged(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline void barrier_init(uint64_t* barrier) { emulation::context.barriers[barrier] = {}; }
inline void fence_async() {}
inline void expect_bytes(uint64_t* barrier, unsigned bytes) {
  auto& b = emulation::context.barriers.at(barrier);
  if (b.armed) emulation::fail("a barrier is armed twice in one phase");
  b.armed = true, b.bytes += bytes;
}
inline void copy_box(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) {
  const unsigned first = shared_address(to);
  if (first % 1024 || map.box_columns * map.element_bytes != 128)
    emulation::fail("the target of a tensor copy is not aligned to 1024 bytes, or its rows have not 128");
  auto& b = emulation::context.barriers.at(barrier);
  b.copies.push_back([=, &b] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < map.box_columns; ++c) {
        auto* at = emulation::context.dynamic_shared + exchanged(first + r * 128 + c * map.element_bytes);
        const bool inside = row + r < map.rows && column + c < map.columns;
        if (inside)
          memcpy(at,
                 static_cast<const char*>(map.data) + (row + r) * map.stride_bytes +
                     static_cast<int64_t>(column + c) * map.element_bytes,
                 map.element_bytes);
        else
          memset(at, 0, map.element_bytes);
      }
    b.bytes -= int64_t{128} * map.box_rows;
  });
  if (!emulation::options.lazy_copies) b.land();
}
inline void wait_barrier(uint64_t* barrier, unsigned parity) {
  auto& b = emulation::context.barriers.at(barrier);
  for (bool again = false; (b.phase & 1) == parity; again = true) {
    b.land();
    if ((b.phase & 1) == parity) emulation::wait_for_others(again);
  }
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto* t = emulation::context.current;
  t->product_groups.push_back(std::move(t->products));
  t->products.clear();
}
template <int N>
void wgmma_wait() {
  auto& groups = emulation::context.current->product_groups;
  while (static_cast<int>(groups.size()) > N) {
    for (const auto& multiply : groups.front()) multiply();
    groups.erase(groups.begin());
  }
}
template <class T>
float operand_at(uint64_t descriptor, int row, int column) {
  if (descriptor >> 62 != 1) emulation::fail("an operand of wgmma is not in the 128-byte swizzle");
  const unsigned group = (descriptor >> 32 & 0x3FFF) << 4, first = (descriptor & 0x3FFF) << 4;
  T value;
  memcpy(&value,
         emulation::context.dynamic_shared + exchanged(first + row / 8 * group + row % 8 * 128 + column * sizeof(T)),
         sizeof(T));
  return to_float(value);
}
// Runs when it is waited for, as late as it may on a GPU.
template <class T>
void wgmma(T, float (&d)[16][4], uint64_t a, uint64_t b) {
  const int lane = emulation::lane(), warp = emulation::context.current->index.x / 32 % 4;
  emulation::context.current->products.push_back([=, &d] {
    for (int j = 0; j < 16; ++j)
      for (int e = 0; e < 4; ++e) {
        const int m = 16 * warp + lane / 4 + 8 * (e / 2), n = 8 * j + lane % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += operand_at<T>(a, m, k) * operand_at<T>(b, n, k);
        d[j][e] += sum;
      }
  });
}

#endif

}  // namespace tinycomp::cuda::ptx
