// What the library keeps besides its ops: counters for `run_stages`, scratch memory of streams, and the signatures that
// Python checks.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

#include "host.cuh"

namespace tinycomp::cuda {

constexpr int kCounters = 8;

#if defined(TINYCOMP_EMULATION)

static unsigned zeros[kCounters];
unsigned* Device::counters() const {
  for (unsigned count : zeros) STD_TORCH_CHECK(count == 0, "a launch left its counters changed");
  return zeros;
}
// For a description of launches, in which they are a buffer.
extern "C" __attribute__((visibility("default"))) unsigned* tinycomp_emulated_counters() { return zeros; }

#else

// Zero from the moment the library is on the device: no launch, no allocation and no wait to prepare them.
constexpr int kSlots = 1 << 16;
__device__ unsigned counter_slots[kSlots * kCounters];

// Launches of one stream follow one another and share a slot. A captured launch may be replayed on any stream, so each
// gets its own.
unsigned* Device::counters() const {
  static std::mutex mutex;
  static std::unordered_map<int, unsigned*> memory;
  static std::unordered_map<Stream, int> slot_of;
  static int used = 0;
  const bool captured = capturing();
  const std::lock_guard<std::mutex> lock(mutex);
  if (!memory.count(index)) {
    void* address = nullptr;
    STD_CUDA_CHECK(cudaGetSymbolAddress(&address, counter_slots));
    memory[index] = static_cast<unsigned*>(address);
  }
  const auto found = slot_of.find(stream);
  const int slot = !captured && found != slot_of.end() ? found->second : used++;
  STD_TORCH_CHECK(slot < kSlots, "tinycomp: more than 65536 captured launches; use fewer or smaller CUDA graphs");
  if (!captured) slot_of[stream] = slot;
  return memory[index] + slot * kCounters;
}

#endif

// Blocks are never freed: a launch may not have been queued yet that another thread took one for, and each is twice the
// one before. The map is not either, for at exit the device may be gone before it.
void* scratch(const Device& device, const Tensor& like, int64_t bytes) {
  constexpr int64_t kLeast = 1 << 20, kAligned = 256;
  static std::mutex mutex;
  static auto& blocks = *new std::map<std::pair<int, Stream>, std::vector<Tensor>>;
  if (device.capturing()) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<Tensor>& of_stream = blocks[{device.index, device.stream}];
  int64_t size = of_stream.empty() ? 0 : of_stream.back().numel();
  if (device.scratch_used + bytes > size) {
    size = std::max({kLeast, 2 * size, bytes});
    of_stream.push_back(empty(like, {size}, ScalarType::Byte));
    device.scratch_used = 0;
  }
  void* const data = static_cast<char*>(of_stream.back().mutable_data_ptr()) + device.scratch_used;
  device.scratch_used += ceil_div(bytes, kAligned) * kAligned;
#if defined(TINYCOMP_EMULATION)
  std::memset(data, 0xff, bytes);  // NaN, so that what no stage wrote shows
#endif
  return data;
}

}  // namespace tinycomp::cuda

// "name signature" lines; read with ctypes.
extern "C" __attribute__((visibility("default"))) const char* tinycomp_signatures() {
  static std::string text;
  text.clear();
  for (const auto& [name, signature] : tinycomp::signatures()) text += name + " " + signature + "\n";
  return text.c_str();
}
