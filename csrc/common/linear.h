// What the linear-layer kernels share: inputs, products on the way, and rows of a weight against them in parallel.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "interleaved.h"
#include "parallel.h"
#include "prefetch.h"
#include "scratch.h"

namespace tinycomp {

// Floats between rows of `cols` that kernels read together: not a multiple of 2 KiB, where rows would share the same
// few places of the nearest cache.
inline int64_t row_distance(int64_t cols, int64_t rows) { return rows >= 4 && cols % 512 == 0 ? cols + 16 : cols; }

// Lines of numbers that meet the rows of a weight, `stride` floats apart.
struct Operand {
  const float* data;
  int64_t stride;
  Order order;

  bool beside() const { return order == Order::beside || order == Order::parts; }
  // Lines that are side by side only from the beginning of a piece of 32 on.
  Operand from(int64_t line) const { return {data + line * stride, stride, order}; }
};

// Whether `cols` columns of type T are multiplied as pairs.
template <class T>
bool in_pairs(int64_t cols) {
  return std::is_same_v<T, BFloat16> && has_pairs() && cols % 2 == 0;
}

// How m lines of `cols` numbers lie that rows of type T meet side by side; `rows` if they do not.
template <class T>
Order side_by_side(int64_t m, int64_t cols, bool cached) {
  if (std::is_same_v<T, BFloat16> && !in_pairs<T>(cols)) return Order::rows;
  return side_by_side(dot_type<T>, m, cols, cached);
}
template <class T>
Order side_by_side(int64_t m, int64_t cols) {
  return side_by_side<T>(m, cols, false);
}

// What the rows of an input may be, where that is faster, besides float32 and adjacent; kCached says that the rows they
// meet come from a cache.
enum Form : unsigned { kWide = 0, kPairs = 1, kApart = 2, kBeside = 4, kAny = 7, kCached = 8 };

// The rows of an input, as products read them. `prepare`, the first stage of a call, makes what is not there: narrow
// ones are widened, those that lie `stride` > cols apart or side by side are copied.
class Inputs {
 public:
  template <class T>
  Inputs(const Tensor& x, T zero, unsigned form) : Inputs(x, zero, form, row_count(x)) {}
  // Some of `all`, whose number decides how they lie: results do not depend on which others a thread has.
  template <class T>
  Inputs(const Tensor& x, T, unsigned form, int64_t all)
      : tensor_(adjacent(x)),
        from_(static_cast<const char*>(tensor_.const_data_ptr())),
        cols(x.size(x.dim() - 1)),
        rows(row_count(x)),
        pairs_(form & kPairs && in_pairs<T>(cols)),
        beside_(form & kBeside && (pairs_ || !std::is_same_v<T, BFloat16>) ? side_by_side<T>(all, cols, form & kCached)
                                                                           : Order::rows),
        stride(is_beside()     ? words_beside(beside_, dot_type<T>, cols)
               : form & kApart ? row_distance(floats(), rows)
                               : floats()),
        type_(dot_type<T>),
        width_(sizeof(T)),
        as_they_are_((type_ == Type::f32 || pairs_) && stride == floats() && !is_beside() &&
                     reinterpret_cast<uintptr_t>(from_) % 4 == 0),
        made_(kInputSlot, as_they_are_  ? 0
                          : is_beside() ? padded_inputs(rows) * stride
                                        : rows * stride) {}

  const float* data() const { return as_they_are_ ? reinterpret_cast<const float*>(from_) : made_.data(); }
  bool pairs() const { return pairs_; }
  Operand operand() const { return {data(), stride, is_beside() ? beside_ : pairs_ ? Order::pairs : Order::rows}; }
  Stage stage() const {
    if (is_beside()) return {cols, std::clamp<int64_t>(32768 / std::max(rows, one) / 32 * 32, 32, 512)};
    return {as_they_are_ ? 0 : rows, std::max<int64_t>(1, 16384 / std::max(cols, one))};
  }
  void prepare(int64_t first, int64_t last) const {
    if (is_beside())
      return interleave(beside_, type_, type_, from_, cols * width_, rows, cols, first, last, made_.data());
    for (int64_t j = first; j < last; ++j) {
      float* to = made_.data() + j * stride;
      if (pairs_)
        std::copy_n(from_ + j * cols * width_, cols * width_, reinterpret_cast<char*>(to));
      else
        take(j, 0, cols, to);
    }
  }
  // Columns [c, c + n) of row j in float32; needs no `prepare`.
  void take(int64_t j, int64_t c, int64_t n, float* to) const { widen(type_, from_ + (j * cols + c) * width_, to, n); }

 private:
  static constexpr int64_t one = 1;
  Tensor tensor_;
  const char* from_;
  int64_t floats() const { return pairs_ ? cols / 2 : cols; }
  bool is_beside() const { return beside_ != Order::rows; }

 public:
  const int64_t cols, rows;

 private:
  bool pairs_;
  Order beside_;

 public:
  const int64_t stride;

 private:
  Type type_;
  int64_t width_;
  bool as_they_are_;
  Scratch made_;
};

// Inputs taken through the rows of a weight together, and rows whose results are stored together.
constexpr int64_t kInputsAtOnce = 256, kBatch = 64, kPartRows = 256;

// Weight rows as a stage: a chunk streams 8 to 32 KiB, so that the last one is not much waited for. With several inputs
// it begins where a cache line of results does, and with many fills whole panels.
inline Stage row_stage(const Weight& w, int64_t m) {
  const int64_t unit = m == 1 ? 8 : m < kPanelInputs ? 16 : 32;
  const int64_t share = w.rows * w.stride / (8 * torch::stable::get_num_threads());
  int64_t rows = std::clamp<int64_t>(share, 8192, 32768) / std::max<int64_t>(w.stride, 1) / unit * unit;
  // Parts of inputs may come from memory for every chunk.
  const int64_t fair = w.rows / torch::stable::get_num_threads() / unit * unit;
  if (side_by_side(w.type, m, w.cols) == Order::parts) rows = std::max(rows, std::min(fair, kPartRows));
  return {w.rows, std::max<int64_t>(rows, unit), w.data, w.stride};
}

// Rows of two weights as one stage, the second's from item `begin` on.
inline Stage row_stage(const Weight& w, int64_t begin, const Weight& second, int64_t m) {
  Stage stage = row_stage(second.rows > w.rows ? second : w, m);
  stage.size = begin + second.rows;
  if (second.rows > w.rows) stage.from = nullptr;
  return stage;
}

inline double weight_estimate(const Weight& w, int64_t m) {
  return microseconds(static_cast<double>(w.rows) * w.stride, static_cast<double>(w.rows) * w.cols * m);
}

// Products on the way from one weight to the next: m rows in float32, and what rows of type T meet instead of them.
// Columns are of one span, or of several that begin at multiples of kUnit.
class Middle {
 public:
  static constexpr int64_t kUnit = 32;
  static int64_t whole_units(int64_t cols) { return (cols + kUnit - 1) / kUnit * kUnit; }

  Middle(int slot, int64_t m, int64_t cols, bool apart = true)
      : Middle(slot, m, cols, apart, Type::f32, false, nullptr) {}
  template <class T>
  Middle(int slot, int64_t m, int64_t cols, T)
      : Middle(slot, m, cols, true, dot_type<T>, in_pairs<T>(0), side_by_side<T>) {}
  float* row(int64_t j) const { return memory_.data() + j * stride; }
  // Columns [first, last) of the span [at, at + cols) are there; `first` is a multiple of 16, with one input of 8.
  void done(int64_t at, int64_t cols, int64_t first, int64_t last) const {
    for (int64_t j = 0; j < rows_ && pairs_; ++j)
      narrow(Type::bf16, row(j) + at + first, reinterpret_cast<char*>(words(j)) + (at + first) * 2, last - first);
    const Order order = beside(cols);
    if (order == Order::rows) return;
    const int64_t distance = (pairs_ ? words_ : stride) * static_cast<int64_t>(sizeof(float));
    interleave(order, type_, pairs_ ? Type::bf16 : Type::f32,
               reinterpret_cast<const char*>(pairs_ ? words(0) + at / 2 : row(0) + at), distance, rows_, cols, first,
               last, span(order, at));
  }
  void done(int64_t cols, int64_t first, int64_t last) const { done(0, cols, first, last); }
  // Columns [at, at + cols), once they are done.
  Operand operand(int64_t at, int64_t cols) const {
    const Order order = beside(cols);
    if (order != Order::rows) return {span(order, at), words_beside(order, type_, cols), order};
    if (pairs_ && cols % 2 == 0) return {words(0) + at / 2, words_, Order::pairs};
    return {row(0) + at, stride, Order::rows};
  }

 private:
  using Choose = Order (*)(int64_t m, int64_t cols);
  Middle(int slot, int64_t m, int64_t cols, bool apart, Type type, bool pairs, Choose choose)
      : stride(apart ? row_distance(cols, m) : cols),
        rows_(m),
        type_(type),
        pairs_(pairs),
        choose_(choose != nullptr && choose(m, whole_units(cols)) != Order::rows ? choose : nullptr),
        words_(pairs ? row_distance((cols + 1) / 2, m) : 0),
        memory_(slot, m * (stride + words_) + room_beside(cols)) {}
  // Side by side or, if they are not, `rows`.
  Order beside(int64_t cols) const { return choose_ == nullptr ? Order::rows : choose_(rows_, cols); }
  int64_t room_beside(int64_t cols) const {
    const Order order = beside(whole_units(cols));
    return order == Order::rows ? 0 : 16 + padded_inputs(rows_) * words_beside(order, type_, whole_units(cols));
  }
  float* words(int64_t j) const { return memory_.data() + rows_ * stride + j * words_; }
  // The span that begins with column `at`, from a cache line on.
  float* span(Order order, int64_t at) const {
    return memory_.data() + (rows_ * (stride + words_) + 15) / 16 * 16 +
           padded_inputs(rows_) * words_beside(order, type_, at);
  }

 public:
  const int64_t stride;

 private:
  int64_t rows_;
  Type type_;
  bool pairs_;
  Choose choose_;
  int64_t words_;
  Scratch memory_;
};

// How many inputs meet some rows before the next do: on Intel's processors those that are side by side had better stay
// in the second-level cache.
inline int64_t inputs_at_once(const Operand& x) {
  constexpr int64_t kKeptWords = 1 << 18, kUnit = 32;
  const int64_t kept = kKeptWords / std::max<int64_t>(x.stride, 1) / kUnit * kUnit;
  // Rows are made parts of once for all of these.
  if (x.order == Order::parts) return std::clamp(kept, kInputsAtOnce, 2 * kInputsAtOnce);
  return x.order == Order::beside && !on_amd ? std::clamp(kept, kUnit, kInputsAtOnce) : kInputsAtOnce;
}

// Products of n rows of `cols` weights, `stride` bytes apart, with m lines of inputs.
inline void dot(Type type, const void* w, int64_t stride, int64_t n, int64_t cols, const Operand& x, int64_t m,
                float* out, int64_t ldo) {
  if (x.beside())
    dot_beside(x.order, type, w, stride, n, cols, x.data, m, out, ldo);
  else if (x.order == Order::pairs)
    dot_pairs(w, stride, n, cols / 2, x.data, x.stride, m, out, ldo);
  else
    dot(type, w, stride, n, cols, x.data, x.stride, m, out, ldo);
}
inline void dot(const Weight& w, const Operand& x, int64_t m, int64_t first, int64_t n, float* out, int64_t ldo) {
  dot(w.type, w.data + first * w.stride, w.stride, n, w.cols, x, m, out, ldo);
}

// out[j * ldo + i] for each of m inputs and each weight row i in [first, last).
inline void dot_rows(const Weight& w, const Operand& x, int64_t m, int64_t first, int64_t last, float* out,
                     int64_t ldo) {
  const int64_t most = inputs_at_once(x);
  for (int64_t j = 0; j < m; j += most)
    dot(w, x.from(j), std::min(most, m - j), first, last - first, out + j * ldo + first, ldo);
}

// to[i] = line[from[i]] + bias[i], all of them; no bias if that is empty.
template <class A>
void gather(const A* __restrict line, const std::vector<int32_t>& from, const std::vector<A>& bias, A* __restrict to) {
  const int64_t n = static_cast<int64_t>(from.size());
  const int32_t* __restrict at = from.data();
  const A* __restrict shift = bias.data();
  const bool shifted = !bias.empty();
  vectorised([&] {
    if (shifted)
      for (int64_t i = 0; i < n; ++i) to[i] = line[at[i]] + shift[i];
    else
      for (int64_t i = 0; i < n; ++i) to[i] = line[at[i]];
  });
}

// to[c] += scales[i + c] line[from[i + c]] for n results; no scales if those are empty.
inline void add_gathered(const float* __restrict line, const std::vector<int32_t>& from,
                         const std::vector<float>& scales, int64_t i, int64_t n, float* __restrict to) {
  const int32_t* __restrict at = from.data() + i;
  if (scales.empty())
    for (int64_t c = 0; c < n; ++c) to[c] += line[at[c]];
  else
    for (int64_t c = 0; c < n; ++c) to[c] += scales[i + c] * line[at[c]];
}

// `m` rows of `cols` results that are put in order.
inline Stage place_stage(int64_t m, int64_t cols) {
  return {m, std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1))};
}

// Results of a layer: rows of `cols` values of type T, `stride` apart, and what is added to each.
template <class T>
struct Output {
  T* data;
  int64_t cols;
  const std::vector<float>& bias;  // empty: none
  int64_t stride = cols;

  // Row j, results i to i + n, from float32 that may be overwritten.
  void store(int64_t j, int64_t i, float* values, int64_t n) const {
    T* const to = data + j * stride + i;
    // What is likely to be stored next: rows of results are pages apart, and a write that waits for memory holds up all
    // that follow it.
    for (int64_t c = n; c < 2 * n; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(to + c, 1);
    if (!bias.empty())
      for (int64_t c = 0; c < n; ++c) values[c] += bias[i + c];
    narrow(dot_type<T>, values, to, n);
  }
  // Rows [first, last) whose result i is entry from[i] of a line from `at` on. A thread does whole rows: threads that
  // wrote between one another's columns would fight over cache lines.
  void place(int64_t first, int64_t last, const std::vector<int32_t>& from, const Middle& lines, int64_t at = 0) const {
    const Scratch wide(kResultSlot, std::is_same_v<T, float> ? 0 : cols);
    for (int64_t j = first; j < last; ++j) {
      for (int64_t c = 0; j + 1 < last && c < cols; c += 16) __builtin_prefetch(lines.row(j + 1) + at + c);
      if constexpr (std::is_same_v<T, float>) {
        gather(lines.row(j) + at, from, bias, data + j * stride);
      } else {
        gather(lines.row(j) + at, from, bias, wide.data());
        narrow(dot_type<T>, wide.data(), data + j * stride, cols);
      }
    }
  }
};

// store(j, i, values, n) for each input j and batch of weight rows [i, i + n) within [first, last).
template <class Store>
void dot_rows(const Weight& w, const Operand& x, int64_t m, int64_t first, int64_t last, const Store& store) {
  const int64_t most = inputs_at_once(x);
  const bool more = x.order == Order::parts || (x.order == Order::beside && has_tiles() && m <= 32);
  const int64_t batch = more ? kPartRows : kBatch;
  const Scratch out(kResultSlot, std::min(m, most) * batch);
  prefetch_beginning(w.data + first * w.stride, (last - first) * w.stride, w.data + last * w.stride);
  for (int64_t start = 0; start < m; start += most) {
    const int64_t inputs = std::min(most, m - start);
    for (int64_t i = first; i < last; i += batch) {
      const int64_t n = std::min(batch, last - i);
      dot(w, x.from(start), inputs, i, n, out.data(), batch);
      for (int64_t j = 0; j < inputs; ++j) store(start + j, i, out.data() + j * batch, n);
    }
  }
}

// Rows [first, last) of a weight to a layer's results.
template <class T>
void dot_rows(const Weight& w, const Operand& x, int64_t m, int64_t first, int64_t last, const Output<T>& y) {
  if constexpr (std::is_same_v<T, float>) {
    if (x.order == Order::parts) {
      dot_rows(w, x, m, first, last, y.data, y.stride);
      for (int64_t j = 0; j < m && !y.bias.empty(); ++j)
        for (int64_t i = first; i < last; ++i) y.data[j * y.stride + i] += y.bias[i];
      return;
    }
  }
  dot_rows(w, x, m, first, last, [&](int64_t j, int64_t i, float* values, int64_t n) { y.store(j, i, values, n); });
}

// Whether products go through torch: all in double, and in float32 those of so many inputs that its library, which
// arranges both operands in memory first, is the faster one.
constexpr int64_t kTorchInputs = 256;
template <class T>
constexpr bool may_use_torch = std::is_same_v<T, double> || std::is_same_v<T, float>;
template <class T>
bool uses_torch(int64_t rows) {
  return std::is_same_v<T, double> || (std::is_same_v<T, float> && rows >= kTorchInputs);
}

// x wᵀ through torch, outside any gradient graph; into `out`, where there is one.
inline Tensor gemm(const Tensor& x, const Tensor& w) {
  return torch::stable::matmul(detach(x), torch::stable::transpose(detach(w), 0, 1));
}
inline void gemm(const Tensor& x, const Tensor& w, const Tensor& out) {
  const Tensor columns = torch::stable::transpose(detach(w), 0, 1);
  StableIValue stack[] = {torch::stable::detail::from(detach(x)), torch::stable::detail::from(columns),
                          torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// body(some inputs, the first of them): all of them, or where they meet rows as parts and are many, blocks over
// threads, for what one thread has made parts of is far from the others.
template <class T, class Body>
void over_inputs(const Tensor& x, const Body& body) {
  constexpr int64_t kWords = 1 << 18, kUnit = 32, kLeast = 128;  // kWords stay in the second-level cache
  const int64_t m = row_count(x), cols = x.size(x.dim() - 1), threads = torch::stable::get_num_threads();
  const Order order = side_by_side<T>(m, cols);
  if (order != Order::parts || m < kLeast * threads) return body(x, int64_t{0});
  const int64_t kept = kWords / std::max<int64_t>(words_beside(order, dot_type<T>, cols), 1);
  const int64_t most = std::clamp(kept, kInputsAtOnce, 2 * kInputsAtOnce), blocks = (m + most - 1) / most;
  const int64_t whole = (blocks + threads - 1) / threads * threads;
  const int64_t size = (m + whole * kUnit - 1) / (whole * kUnit) * kUnit;
  const Tensor matrix = as_matrix(x);
  torch::stable::parallel_for(0, (m + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    for (int64_t j = first * size; j < std::min(last * size, m); j += size) {
      Tensor all = matrix;
      body(torch::stable::narrow(all, 0, j, std::min(size, m - j)), j);
    }
  });
}

// body(j) for the rows of a result, over threads.
template <class Body>
void parallel_rows(int64_t rows, int64_t cols, Body body) {
  const int64_t grain = 1 + 32768 / std::max<int64_t>(cols, 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) body(j);
  });
}

// y += bias by rows of a contiguous matrix.
template <class T>
void add_bias(T* y, int64_t rows, int64_t cols, const std::vector<T>& bias) {
  if (bias.empty()) return;
  parallel_rows(rows, cols, [&](int64_t j) {
    for (int64_t i = 0; i < cols; ++i) y[j * cols + i] += bias[i];
  });
}

// A low-rank layer through torch: first(z) and second(z, rest) write products, of m inputs and of z, into tensors. y is
// [z rest] with result i taken from entry from[i], or `rest` alone where `from` is empty, plus the bias.
template <class T, class First, class Second>
void low_rank_through_torch(const Tensor& y, int64_t m, int64_t rank, const std::vector<int32_t>& from,
                            const std::vector<T>& bias, const First& first, const Second& second) {
  const int64_t n = y.size(y.dim() - 1), shape[] = {m, n};
  T* to = static_cast<T*>(y.mutable_data_ptr());
  if (from.empty()) {
    const Tensor z = empty({m, rank}, scalar_type<T>);
    first(z);
    second(z, torch::stable::view(y, {shape, 2}));
    return add_bias<T>(to, m, n, bias);
  }
  // Kept memory: that of a new tensor would be mapped page by page in every call.
  const Scratch memory(kMiddleSlot, m * n * static_cast<int64_t>(sizeof(T) / sizeof(float)));
  const int64_t distances[] = {n, 1};
  Tensor lines = torch::stable::from_blob(memory.data(), {shape, 2}, {distances, 2}, y.device(), scalar_type<T>);
  const Tensor z = torch::stable::narrow(lines, 1, 0, rank);
  first(z);
  second(z, torch::stable::narrow(lines, 1, rank, n - rank));
  const T* line = static_cast<const T*>(lines.const_data_ptr());
  parallel_rows(m, n, [&](int64_t j) { gather(line + j * n, from, bias, to + j * n); });
}

}  // namespace tinycomp
