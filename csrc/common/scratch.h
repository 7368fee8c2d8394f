// Memory that calls work in.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace tinycomp {

// Memory that begins with a cache line; much of it in pages of 2 MiB, where the system gives them: what kernels come to
// at random would lie in more small pages than the processor looks up at once, and these anywhere in its caches.
class Lines {
 public:
  Lines() = default;
  explicit Lines(int64_t floats) : floats_(floats) {
    constexpr size_t kLine = 64, kHugePage = 1 << 21, kMuch = 1 << 17;
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float), unit = bytes > kMuch ? kHugePage : kLine;
    const size_t whole = std::max<size_t>(1, (bytes + unit - 1) / unit) * unit;
    data_.reset(static_cast<float*>(std::aligned_alloc(unit, whole)));
    STD_TORCH_CHECK(data_ != nullptr, "no memory for ", whole, " bytes");
#if defined(__linux__)
    if (unit == kHugePage) madvise(data_.get(), whole, MADV_HUGEPAGE);  // a wish: it may fail
#endif
  }
  float* data() const { return data_.get(); }
  int64_t floats() const { return floats_; }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t floats_ = -1;
};

// Floats for the length of a call, kept by the thread for the next one unless they are many.
class Scratch {
 public:
  Scratch(int slot, int64_t floats) {
    constexpr int64_t kKept = 1 << 20;
    thread_local Lines kept[kSlots];
    Lines& lines = floats > kKept ? own_ : kept[slot];
    if (lines.floats() < floats) lines = Lines(floats);
    data_ = lines.data();
  }
  float* data() const { return data_; }
  static constexpr int kSlots = 13;

 private:
  Lines own_;
  float* data_;
};
// Slots: two scratch areas that are alive together need different ones.
enum {
  kInputSlot,
  kMiddleSlot,
  kLinkSlot,
  kLowSlot,
  kLevelSlot,
  kMiddleLevelSlot,
  kSumLevelSlot,  // the above belong to a call, the rest to each of its threads
  kResultSlot,
  kScaleSlot,
  kRebuildSlot,
  kShiftSlot,
  kMaskSlot,
  kTileSlot
};

}  // namespace tinycomp
