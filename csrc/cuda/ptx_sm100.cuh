// Instructions of sm_100a: tensor memory and the products into it (tcgen05). Once for the device and once for the
// emulation, which models them as the PTX manual describes them; copies and barriers are those of sm_90a.
#pragma once

#include "ptx_sm90.cuh"

namespace tinycomp::cuda::ptx {

// Where tcgen05.mma reads an operand: as `operand`, in the version of the descriptor that sm_100a knows.
__device__ __forceinline__ uint64_t tensor_operand(unsigned address) { return operand(address) | 1ull << 46; }

// Products of 128 by N: both operands of type T with adjacent columns, sums in float32.
template <class T, int N>
constexpr unsigned kTensorProduct =
    1u << 4 | (std::is_same_v<T, bf16> ? 1u << 7 | 1u << 10 : 0) | unsigned{N} / 8 << 17 | 128u / 16 << 24;

#if !defined(TINYCOMP_EMULATION)

// A warp takes columns (a power of two, at least 32) of tensor memory; where they are is written to shared memory.
template <int kColumns>
__device__ __forceinline__ void tensor_allocate(unsigned* where) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(shared_address(where)),
               "n"(kColumns)
               : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}
template <int kColumns>
__device__ __forceinline__ void tensor_free(unsigned address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(kColumns));
}
// Around what makes threads wait for each other: tcgen05 of before it and of after it keep that order.
__device__ __forceinline__ void tensor_fence_before() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}
__device__ __forceinline__ void tensor_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }
// d (128, N) = a (128, 16) b^T (N, 16) [+ d]; started by one thread.
template <class T, int N>
__device__ __forceinline__ void tensor_multiply(unsigned d, uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %4, 0;\ntcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, add;\n}" ::"r"(
          d),
      "l"(a), "l"(b), "r"(kTensorProduct<T, N>), "r"(static_cast<int>(add))
      : "memory");
}
// The barrier flips its phase when all products that this thread has started are done.
__device__ __forceinline__ void tensor_commit(uint64_t* barrier) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(barrier))
      : "memory");
}
// 32 columns of this thread's lane; there after tensor_wait.
__device__ __forceinline__ void tensor_load(float (&v)[32], unsigned address) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]), "=f"(v[8]),
        "=f"(v[9]), "=f"(v[10]), "=f"(v[11]), "=f"(v[12]), "=f"(v[13]), "=f"(v[14]), "=f"(v[15]), "=f"(v[16]),
        "=f"(v[17]), "=f"(v[18]), "=f"(v[19]), "=f"(v[20]), "=f"(v[21]), "=f"(v[22]), "=f"(v[23]), "=f"(v[24]),
        "=f"(v[25]), "=f"(v[26]), "=f"(v[27]), "=f"(v[28]), "=f"(v[29]), "=f"(v[30]), "=f"(v[31])
      : "r"(address));
}
__device__ __forceinline__ void tensor_wait() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }

#else

inline emulation::TensorMemory& tensor_memory() {
  if (!emulation::context.tensor_memory) emulation::context.tensor_memory = std::make_unique<emulation::TensorMemory>();
  return *emulation::context.tensor_memory;
}
template <int kColumns>
void tensor_allocate(unsigned* where) {
  static_assert(kColumns >= 32 && kColumns <= 512 && (kColumns & (kColumns - 1)) == 0);
  emulation::collective(~0u, nullptr, nullptr, -1);
  if (emulation::lane()) return;
  auto& memory = tensor_memory();
  if (memory.columns) emulation::fail("tensor memory is allocated twice");
  memory.first = kColumns <= 256 ? 256 : 0, memory.columns = kColumns;
  *where = memory.first;
}
template <int kColumns>
void tensor_free(unsigned address) {
  emulation::collective(~0u, nullptr, nullptr, -2);
  if (emulation::lane()) return;
  auto& memory = tensor_memory();
  if (memory.columns != kColumns || address != static_cast<unsigned>(memory.first))
    emulation::fail("tensor memory is given back that is not allocated");
  if (memory.done < memory.products.size()) emulation::fail("tensor memory is given back while products are in flight");
  memory.columns = 0;
  std::fill(memory.cells.begin(), memory.cells.end(), NAN);
}
inline void tensor_fence_before() {}
inline void tensor_fence_after() {}
// Lane and column of an address, within what is allocated.
inline float& tensor_cell(unsigned address, int lane, int column) {
  auto& memory = tensor_memory();
  const int at = static_cast<int>(address & 0xFFFF) + column, row = static_cast<int>(address >> 16) + lane;
  if (at < memory.first || at >= memory.first + memory.columns || row >= memory.kLanes)
    emulation::fail("tensor memory is used that is not allocated");
  return memory.cells[row * memory.kColumns + at];
}
template <class T, int N>
void tensor_multiply(unsigned d, uint64_t a, uint64_t b, bool add) {
  if ((a >> 46 & 7) != 1 || (b >> 46 & 7) != 1) emulation::fail("an operand of tcgen05.mma has not its version");
  auto& memory = tensor_memory();
  memory.products.push_back([=] {
    for (int m = 0; m < 128; ++m)
      for (int n = 0; n < N; ++n) {
        float& cell = tensor_cell(d, m, n);
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += operand_at<T>(a, m, k) * operand_at<T>(b, n, k);
        cell = add ? cell + sum : sum;
      }
  });
  if (!emulation::options.lazy_copies) memory.multiply_until(memory.products.size());
}
inline void tensor_commit(uint64_t* barrier) {
  auto& b = emulation::context.barriers.at(barrier);
  b.copies.push_back([&b, end = tensor_memory().products.size()] {
    tensor_memory().multiply_until(end);
    if (b.armed) emulation::fail("a barrier is armed twice in one phase");
    b.armed = true;
  });
  if (!emulation::options.lazy_copies) b.land();
}
inline void tensor_load(float (&v)[32], unsigned address) {
  if (static_cast<int>(address >> 16) != static_cast<int>(emulation::context.current->index.x) / 32 % 4 * 32)
    emulation::fail("a warp loads lanes of tensor memory that are not its own");
  std::fill(v, v + 32, NAN);
  emulation::context.current->products.push_back([=, &v] {
    for (int c = 0; c < 32; ++c) v[c] = tensor_cell(address, emulation::lane(), c);
  });
}
inline void tensor_wait() {
  for (const auto& load : emulation::context.current->products) load();
  emulation::context.current->products.clear();
}

#endif

}  // namespace tinycomp::cuda::ptx
