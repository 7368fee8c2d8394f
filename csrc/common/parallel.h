// Work in stages over threads: one parallel region for a whole call, and none where waking a thread costs more.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tinycomp {

// What a call takes on one thread, in microseconds, below which a second one is not woken: region and barrier cost
// about 3 on an idle machine.
constexpr double kWorthwhile = 8.0;

// Rates of one core for that estimate: bytes streamed, multiply-adds.
inline double microseconds(double bytes, double multiply_adds) { return bytes / 14e3 + multiply_adds / 50e3; }

struct Stage {
  int64_t size, chunk;         // items, and how many a thread claims at a time
  const void* from = nullptr;  // weights that it reads in order, if any, and how many bytes of them an item has
  int64_t step = 0;
};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// The same stage of several layers as one: its items are their chunks, one layer after another.
template <int L>
class Joined {
 public:
  void set(int layer, Stage stage) {
    parts_[layer] = stage;
    begin_[layer + 1] = begin_[layer] + (stage.size + stage.chunk - 1) / stage.chunk;
  }
  Stage stage() const {
    if (L > 1) return {begin_[L], 1};
    return {begin_[L], 1, parts_[0].from, parts_[0].chunk * parts_[0].step};
  }
  // body(layer, first, last) over the layers' own items.
  template <class Body>
  void each(int64_t first, int64_t last, const Body& body) const {
    for (int l = 0; l < L; ++l) {
      const int64_t size = parts_[l].size, chunk = parts_[l].chunk;
      const int64_t from = std::max(first, begin_[l]) - begin_[l], to = std::min(last, begin_[l + 1]) - begin_[l];
      if (from < to) body(l, from * chunk, std::min(to * chunk, size));
    }
  }

 private:
  Stage parts_[L];
  int64_t begin_[L + 1] = {};
};

// What a thread asks memory for while it waits: the beginning of its part of the next stage's weights.
class AskedAhead {
 public:
  // A few lines more, if there are.
  template <int S>
  void more(const Stage (&stages)[S], int next, int64_t part, int64_t parts) {
    while (next < S && (stages[next].from == nullptr || stages[next].size == 0)) ++next;
    if (next == S) return pause();
    if (next != stage_) {
      const auto [size, chunk, from, step] = stages[next];
      const int64_t chunks = (size + chunk - 1) / chunk, begin = part * chunks / parts * chunk;
      stage_ = next, at_ = static_cast<const char*>(from) + begin * step;
      end_ = at_ + std::min(kMost, (std::min(size, (part + 1) * chunks / parts * chunk) - begin) * step);
    }
    if (at_ >= end_) return pause();
    for (int i = 0; i < 4; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kMost = 1 << 17;
  int stage_ = -1;
  const char *at_ = nullptr, *end_ = nullptr;
};

// body(stage, first, last) over all items of stage 0, then stage 1, ...; every item of a stage is done before the next
// begins. A thread claims chunks of a part of its own, one after another, so that what it asks memory for ahead is what
// it comes to; then those of other parts: a thread that comes late (or never, inside another parallel region) holds up
// nobody.
template <int S, class Body>
void run_stages(const Stage (&stages)[S], double estimate, const Body& body) {
  const int64_t threads = estimate < kWorthwhile ? 1 : torch::stable::get_num_threads();
  if (threads == 1) {
    for (int s = 0; s < S; ++s)
      if (stages[s].size > 0) body(s, int64_t{0}, stages[s].size);
    return;
  }
  constexpr int64_t kParts = 32;  // more threads than that share parts
  const int64_t parts = std::min(threads, kParts);
  // A part's own cache line, which other threads come to only when they have nothing left of their own.
  struct alignas(64) Part {
    std::atomic<int64_t> claimed;  // chunks
    std::atomic<int64_t> done;     // items
  } progress[S][kParts];
  for (auto& stage : progress)
    for (int64_t p = 0; p < parts; ++p)
      stage[p].claimed.store(0, std::memory_order_relaxed), stage[p].done.store(0, std::memory_order_relaxed);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t slot = from; slot < to; ++slot) {
      AskedAhead ahead;
      for (int s = 0; s < S; ++s) {
        const int64_t size = stages[s].size, chunk = stages[s].chunk, chunks = (size + chunk - 1) / chunk;
        for (int64_t p = 0; p < parts; ++p) {
          const int64_t number = (slot + p) % parts;
          const int64_t begin = number * chunks / parts, end = (number + 1) * chunks / parts;
          Part& part = progress[s][number];
          for (int64_t mine; (mine = begin + part.claimed.fetch_add(1)) < end;) {
            const int64_t first = mine * chunk, last = std::min(first + chunk, size);
            body(s, first, last);
            part.done.fetch_add(last - first, std::memory_order_release);
          }
        }
        const auto done = [&] {
          int64_t items = 0;
          for (int64_t p = 0; p < parts; ++p) items += progress[s][p].done.load(std::memory_order_acquire);
          return items;
        };
        // Another thread is at work on what is missing; if it has lost its core, let it have this one.
        for (int turn = 0; done() < size; ++turn) {
          if (turn < 4096)
            ahead.more(stages, s + 1, slot % parts, parts);
          else
            std::this_thread::yield();
        }
      }
    }
  });
}

}  // namespace tinycomp
