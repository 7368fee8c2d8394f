// Runs CUDA C++ kernels on the CPU, one fiber per CUDA thread; for tests only (x86-64 Linux, g++).
// A launch checks what a GPU leaves undefined: threads at different barriers, warp collectives with missing lanes,
// copies that nobody waited for (lazy mode), shared memory read before it was written (poisoned with NaN), and, with
// -fsanitize=address, accesses out of bounds. Missing barriers show under the greedy schedules.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulation {

enum State : uint8_t { kReady, kAtBarrier, kInWarp, kWaiting, kDone };
// Greedy orders run a warp as far as it goes before the next one starts; the others advance all warps together.
enum Order : int { kForward, kReverse, kRandom, kGreedy, kGreedyReverse, kGreedyRandom, kOrders };
struct Options {
  int order = kForward;
  unsigned seed = 1;
  bool lazy_copies = true;
};
using Collective = void (*)(void** lanes, unsigned mask);
struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;
};
// A barrier in shared memory that a thread arms with bytes to come; it flips its phase when the last of them land.
struct MemoryBarrier {
  bool armed = false;
  int64_t bytes = 0;
  unsigned phase = 0;
  std::vector<std::function<void()>> copies;
  void land() {
    for (const auto& copy : copies) copy();
    copies.clear();
    if (armed && bytes == 0) armed = false, ++phase;
  }
};
struct Thread {
  void* stack_pointer;
  char* stack;
  uint3 index;
  int lane, site;
  State state;
  bool stuck = false;  // it waits again for what it was woken to look at
  unsigned mask;
  void* argument;
  Collective collective;
  std::vector<Copy> pending;
  std::vector<std::vector<Copy>> groups;
  std::vector<std::function<void()>> products;
  std::vector<std::vector<std::function<void()>>> product_groups;
};
// The tensor memory of a block and the products into it, which one thread starts and no thread waits for: they run in
// order, by the time a barrier tells that they have.
struct TensorMemory {
  static constexpr int kLanes = 128, kColumns = 512;
  std::vector<float> cells = std::vector<float>(kLanes * kColumns, NAN);
  int first = 0, columns = 0;  // what is allocated
  std::vector<std::function<void()>> products;
  size_t done = 0;
  void multiply_until(size_t end) {
    while (done < end) products[done++]();
  }
};
struct Launch {  // what the tests and the kernel dump read back
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  std::vector<std::pair<char, uint64_t>> arguments;
};
struct Context {
  uint3 block_index{};
  dim3 block, grid;
  Thread* current = nullptr;
  void* host_stack_pointer = nullptr;
  unsigned char* dynamic_shared = nullptr;
  std::map<const void*, MemoryBarrier> barriers;
  std::unique_ptr<TensorMemory> tensor_memory;
  std::function<void()>* body = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
};

inline Options options;
inline std::vector<Launch> launches;
inline bool recording = false;
// Kernel -> how to run it on recorded arguments; every kernel that was launched or recorded is here.
using Replay = std::function<void(dim3, dim3, size_t, const uint64_t*)>;
inline std::map<const void*, Replay> replays;
inline thread_local Context context;
constexpr size_t kStackBytes = 64 << 10;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("CUDA emulation: " + what); }

extern "C" void emulation_switch(void** save, void* to);
#if defined(TINYCOMP_EMULATION_MAIN)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#endif

inline std::string& thread_error() {
  static thread_local std::string error;
  return error;
}

inline void leave_fiber() {
  Thread* t = context.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(t->state == kDone ? nullptr : &fake, context.host_stack, context.host_stack_size);
#endif
  emulation_switch(&t->stack_pointer, context.host_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void enter_fiber(Thread& t) {
  context.current = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, kStackBytes);
#endif
  emulation_switch(&context.host_stack_pointer, t.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &context.host_stack, &context.host_stack_size);
#endif
  try {
    (*context.body)();
    if (!context.current->pending.empty() || !context.current->groups.empty())
      thread_error() = "a thread exited with asynchronous copies in flight";
    if (!context.current->products.empty() || !context.current->product_groups.empty())
      thread_error() = "a thread exited with products in flight";
  } catch (const std::exception& error) {
    thread_error() = error.what();
  }
  context.current->state = kDone;
  leave_fiber();
  __builtin_unreachable();
}

inline void barrier(int site) {
  context.current->site = site;
  context.current->state = kAtBarrier;
  leave_fiber();
}

// Until no other thread of the block can go on without it; `again`: nothing has happened since it last waited.
inline void wait_for_others(bool again) {
  context.current->state = kWaiting;
  context.current->stuck = again;
  leave_fiber();
}

inline void collective(unsigned mask, void* argument, Collective function, int site) {
  Thread* t = context.current;
  if (!(mask >> t->lane & 1)) fail("lane " + std::to_string(t->lane) + " is not in its own mask");
  t->mask = mask, t->argument = argument, t->collective = function, t->site = site, t->state = kInWarp;
  leave_fiber();
}

inline void land(std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    if (c.bytes) memcpy(c.to, c.from, c.bytes);
    if (c.zeros) memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
  }
  copies.clear();
}

// One block: its threads, and the scheduler that moves them from barrier to barrier.
class Block {
 public:
  Block(int threads, uint3 shape, char* stacks)
      : threads_(threads), warps_((threads + 31) / 32), random_(options.seed) {
    for (int i = 0; i < threads; ++i) {
      Thread& t = threads_[i];
      t.lane = i % 32, t.state = kReady, t.stack = stacks + kStackBytes * i;
      t.index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
      void** s = reinterpret_cast<void**>(t.stack + kStackBytes - 16);
      *--s = nullptr;
      *--s = reinterpret_cast<void*>(&fiber_entry);
      s -= 6;
      memset(s, 0, 48);
      t.stack_pointer = s;
      order_.push_back(options.order == kReverse ? threads - 1 - i : i);
    }
    for (int w = 0; w < warps_; ++w)
      warp_order_.push_back(options.order == kReverse || options.order == kGreedyReverse ? warps_ - 1 - w : w);
  }

  void run() {
    while (left() > 0) {
      bool progress = options.order >= kGreedy ? greedy_round() : even_round();
      if (!thread_error().empty()) fail(std::exchange(thread_error(), ""));
      progress |= release_barrier();
      progress = progress ? (woken_ = 0, true) : wake();
      if (!progress) fail(deadlock());
    }
  }

 private:
  int left() const {
    return std::count_if(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state != kDone; });
  }

  bool wake() {
    bool any = false;
    for (Thread& t : threads_)
      if (t.state == kWaiting) t.state = kReady, any = true;
    return any && ++woken_ < 3;
  }

  bool advance(int i) {
    if (threads_[i].state != kReady) return false;
    enter_fiber(threads_[i]);
    return threads_[i].state != kWaiting || !threads_[i].stuck;
  }

  bool even_round() {
    if (options.order == kRandom) std::shuffle(order_.begin(), order_.end(), random_);
    bool progress = false;
    for (int i : order_) progress |= advance(i);
    for (int w : warp_order_) progress |= collectives(w);
    return progress;
  }

  bool greedy_round() {
    if (options.order == kGreedyRandom && random_() % 8 == 0)
      std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
    for (int w : warp_order_) {
      bool progress = false;
      for (int i = w * 32; i < end(w); ++i) progress |= advance(i);
      progress |= collectives(w);
      if (progress) return true;
    }
    return false;
  }

  int end(int w) const { return std::min<int>(threads_.size(), w * 32 + 32); }

  bool collectives(int w) {
    bool progress = false;
    for (int i = w * 32; i < end(w); ++i) {
      Thread& t = threads_[i];
      if (t.state != kInWarp) continue;
      unsigned wanted = t.mask;
      if (end(w) - w * 32 < 32) wanted &= (1u << (end(w) - w * 32)) - 1;
      void* lanes[32] = {};
      bool all = true;
      for (int l = 0; l < 32 && all; ++l) {
        if (!(wanted >> l & 1)) continue;
        Thread& other = threads_[w * 32 + l];
        if (other.state == kDone) fail("a warp collective waits for a lane that has exited");
        all = other.state == kInWarp && other.mask == t.mask && other.site == t.site;
        lanes[l] = other.argument;
      }
      if (!all) continue;
      if (t.collective) t.collective(lanes, wanted);
      for (int l = 0; l < 32; ++l)
        if (wanted >> l & 1) threads_[w * 32 + l].state = kReady;
      progress = true;
    }
    return progress;
  }

  bool release_barrier() {
    int site = -1, waiting = 0;
    for (const Thread& t : threads_) {
      if (t.state != kAtBarrier) continue;
      if (waiting++ && t.site != site) return false;
      site = t.site;
    }
    if (waiting == 0 || waiting < left()) return false;
    for (Thread& t : threads_)
      if (t.state == kAtBarrier) t.state = kReady;
    return true;
  }

  std::string deadlock() const {
    int barriers = 0, warps = 0, done = 0, memory = 0;
    std::vector<int> sites;
    for (const Thread& t : threads_) {
      barriers += t.state == kAtBarrier, warps += t.state == kInWarp, done += t.state == kDone;
      memory += t.state == kReady;  // woken, and stuck again
      if (t.state == kAtBarrier) sites.push_back(t.site);
    }
    std::sort(sites.begin(), sites.end());
    const auto different = std::unique(sites.begin(), sites.end()) - sites.begin();
    return "deadlock: " + std::to_string(barriers) + " threads at " + std::to_string(different) +
           " different barriers, " + std::to_string(warps) + " in warp collectives, " + std::to_string(memory) +
           " at barriers in memory, " + std::to_string(done) + " exited";
  }

  std::vector<Thread> threads_;
  int warps_, woken_ = 0;
  std::mt19937 random_;
  std::vector<int> order_, warp_order_;
};

template <class A>
std::pair<char, uint64_t> described(A value) {
  uint64_t bits = 0;
  if (sizeof value > sizeof bits) fail("a tensor map cannot be written down");
  memcpy(&bits, &value, std::min(sizeof value, sizeof bits));
  return {std::is_pointer_v<A> ? 'p' : std::is_floating_point_v<A> ? 'f' : sizeof(A) == 8 ? 'l' : 'i', bits};
}

// Runs the grid block by block, in order; throws std::runtime_error on a fault.
template <class... P>
void run(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, P... arguments) {
  const int threads = block.x * block.y * block.z;
  if (threads > 1024 || shared_bytes > 227 << 10 || grid.y > 65535 || grid.z > 65535)
    fail("the launch exceeds the limits of a device");
  const size_t bytes = kStackBytes * threads;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks of a block");
  const auto unmap = [bytes](void* p) { munmap(p, bytes); };
  const std::unique_ptr<void, decltype(unmap)> release(stacks, unmap);
  std::function<void()> body = [&] { kernel(arguments...); };
  // The exact size, so that the address sanitizer sees an overrun.
  const std::unique_ptr<void, decltype(&free)> shared(aligned_alloc(128, (shared_bytes + 128) / 128 * 128), &free);
  context.block = block, context.grid = grid, context.body = &body;
  context.dynamic_shared = static_cast<unsigned char*>(shared.get());
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        context.block_index = {x, y, z};
        context.barriers.clear();
        context.tensor_memory.reset();
        memset(shared.get(), 0xFF, shared_bytes);
        Block(threads, {block.x, block.y, block.z}, static_cast<char*>(stacks)).run();
        if (context.tensor_memory && context.tensor_memory->columns) fail("tensor memory was not given back");
      }
}

template <class P>
P from_bits(uint64_t bits) {
  P value{};
  memcpy(&value, &bits, std::min(sizeof value, sizeof bits));
  return value;
}
template <class... P, size_t... I>
Replay replay_of(void (*kernel)(P...), std::index_sequence<I...>) {
  return [kernel](dim3 grid, dim3 block, size_t shared_bytes, const uint64_t* bits) {
    run(kernel, grid, block, shared_bytes, from_bits<P>(bits[I])...);
  };
}

// Runs the kernel, or only notes what would run.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... arguments) {
  const void* key = reinterpret_cast<void*>(kernel);
  replays.try_emplace(key, replay_of(kernel, std::index_sequence_for<P...>{}));
  if (recording)
    launches.push_back({key, grid, block, shared_bytes, {described(P(arguments))...}});
  else
    run(kernel, grid, block, shared_bytes, P(arguments)...);
}

struct Shuffled {
  uint64_t value;
  int source;
};
inline void shuffle_lanes(void** lanes, unsigned mask) {
  uint64_t in[32] = {};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) in[i] = static_cast<Shuffled*>(lanes[i])->value;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    auto* s = static_cast<Shuffled*>(lanes[i]);
    if (!(mask >> s->source & 1)) thread_error() = "a shuffle reads a lane outside its mask";
    s->value = in[s->source];
  }
}
template <class T>
T shuffle(unsigned mask, T value, int source, int site) {
  Shuffled s{0, source};
  memcpy(&s.value, &value, sizeof value);
  collective(mask, &s, shuffle_lanes, site);
  memcpy(&value, &s.value, sizeof value);
  return value;
}
struct Vote {
  bool set;
  unsigned ballot;
};
inline void ballot_of_warp(void** lanes, unsigned mask) {
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) ballot |= unsigned(static_cast<Vote*>(lanes[i])->set) << i;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) static_cast<Vote*>(lanes[i])->ballot = ballot;
}
inline unsigned ballot(unsigned mask, bool set, int site) {
  Vote vote{set, 0};
  collective(mask, &vote, ballot_of_warp, site);
  return vote.ballot;
}
inline int lane() { return context.current->lane; }

}  // namespace emulation

#define threadIdx (emulation::context.current->index)
#define blockIdx (emulation::context.block_index)
#define blockDim (emulation::context.block)
#define gridDim (emulation::context.grid)
#define __syncthreads() emulation::barrier(__LINE__)
#define __syncwarp() emulation::collective(~0u, nullptr, nullptr, __LINE__)
#define __shfl_xor_sync(mask, v, offset) emulation::shuffle(mask, v, emulation::lane() ^ (offset), __LINE__)
#define __shfl_sync(mask, v, source) emulation::shuffle(mask, v, (source) & 31, __LINE__)
#define __ballot_sync(mask, set) emulation::ballot(mask, set, __LINE__)
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned v = 0;
  for (int i = 0; i < 4; ++i) v |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return v;
}
#define __popc(v) __builtin_popcount(v)
#define __popcll(v) __builtin_popcountll(v)

using std::max;
using std::min;
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
inline void __threadfence() {}
