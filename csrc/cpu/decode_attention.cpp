// decode_attention: softmax(scale q kᵀ) v for the few queries of a decoding step. A head's keys are met in parts, each
// with a largest score of its own, so that threads share one long head; a second stage puts the parts together.
#include <limits>

#include "../common/exponential.h"
#include "../common/linear.h"
#include "../common/prefetch.h"

namespace tinycomp {
namespace {

constexpr int64_t kKeys = 64;  // of a part
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Keys or values: rows of adjacent entries, copied if they are not.
template <class T>
struct Cache {
  Tensor tensor;
  const T* data;
  int64_t heads, keys, cols, batch_step, head_step, step;

  Cache(const Tensor& t, const char* name) : tensor(t) {
    STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == scalar_type<T>, name, ": shape or dtype does not fit");
    if (t.stride(3) != 1 && t.size(3) > 1) tensor = torch::stable::contiguous(t);
    data = static_cast<const T*>(tensor.const_data_ptr());
    heads = t.size(1), keys = t.size(2), cols = t.size(3);
    batch_step = tensor.stride(0), head_step = tensor.stride(1), step = tensor.stride(2);
  }
  const T* at(int64_t batch, int64_t head, int64_t key) const {
    return data + batch * batch_step + head * head_step + key * step;
  }
};

struct Part {
  float largest, sum;
};

// scores[i] <- exp(scale scores[i] - largest) for n <= kKeys scores that `seen` allows (null: all), 0 for others up to
// kKeys; gives the largest and the sum.
Part weigh(float* __restrict scores, int64_t n, float scale, const bool* __restrict seen) {
  Part part;
  vectorised([&] {
    for (int64_t i = 0; i < n; ++i) scores[i] *= scale;
    if (seen != nullptr)
      for (int64_t i = 0; i < n; ++i) scores[i] = seen[i] ? scores[i] : kNothing;
    std::fill(scores + n, scores + kKeys, kNothing);
    // In lanes, as in lane_sum.
    float lanes[kSumLanes];
    for (int l = 0; l < kSumLanes; ++l) lanes[l] = scores[l];
    for (int64_t i = kSumLanes; i < kKeys; i += kSumLanes)
      for (int l = 0; l < kSumLanes; ++l) lanes[l] = scores[i + l] > lanes[l] ? scores[i + l] : lanes[l];
    part.largest = kNothing;
    for (const float most : lanes) part.largest = most > part.largest ? most : part.largest;
    const float zero = part.largest == kNothing ? 0.0f : part.largest;
    for (int64_t i = 0; i < kKeys; ++i) scores[i] = exponential(scores[i] - zero);
    part.sum = lane_sum<float>(n, [&](int64_t i) { return scores[i]; });
  });
  return part;
}

template <class T>
void attend(const Tensor& q, const Cache<T>& k, const Cache<T>& v, const bool* seen, float scale, T* y) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const int64_t lines = heads / k.heads * queries;  // that meet the keys of one head
  const int64_t parts = (k.keys + kKeys - 1) / kKeys, width = v.cols + 2;
  const Inputs x(q, T{}, has_tiles() ? kWide : kPairs);  // the processors that have those are slower in pairs
  // Of each line and part: the largest score, the sum of weights, and their sum of values.
  const Scratch memory(kMiddleSlot, batch * heads * queries * parts * width);
  const auto found = [&](int64_t line, int64_t part) { return memory.data() + (line * parts + part) * width; };

  const Stage stages[] = {x.stage(), {batch * k.heads * parts, 1}, {batch * heads * queries, 16}};
  const double numbers = static_cast<double>(batch) * k.heads * k.keys * (k.cols + v.cols);
  run_stages(stages, microseconds(numbers * sizeof(T), numbers * lines), [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) return x.prepare(first, last);
    for (int64_t i = first; i < last && stage == 1; ++i) {
      const int64_t part = i % parts, head = i / parts % k.heads, b = i / parts / k.heads, start = part * kKeys;
      const int64_t n = std::min(kKeys, k.keys - start), line = (b * k.heads + head) * lines;
      const Scratch scores(kResultSlot, lines * kKeys);
      const Operand asks = x.operand().from(line);
      constexpr int64_t size = sizeof(T);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < v.cols; c += 64 / size) prefetch(v.at(b, head, start + r) + c);
      for (int64_t j = 0; j < lines; j += kInputsAtOnce) {
        const int64_t m = std::min(kInputsAtOnce, lines - j);
        const T* keys = k.at(b, head, start);
        const float* from = asks.from(j).data;
        float* const to = scores.data() + j * kKeys;
        if (asks.order == Order::pairs)
          dot_pairs(keys, k.step * size, n, k.cols / 2, from, asks.stride, m, to, kKeys);
        else
          dot(dot_type<T>, keys, k.step * size, n, k.cols, from, asks.stride, m, to, kKeys);
      }
      for (int64_t j = 0; j < lines; ++j) {
        const bool* sees = seen == nullptr ? nullptr : seen + (b * queries + j % queries) * k.keys + start;
        const Part got = weigh(scores.data() + j * kKeys, n, scale, sees);
        found(line + j, part)[0] = got.largest, found(line + j, part)[1] = got.sum;
      }
      sum_rows(dot_type<T>, v.at(b, head, start), v.step * size, n, v.cols, scores.data(), kKeys, lines,
               found(line, part) + 2, parts * width);
    }
    for (int64_t line = first; line < last && stage == 2; ++line) {
      const Scratch sum(kResultSlot, v.cols);
      std::fill_n(sum.data(), v.cols, 0.0f);
      float largest = kNothing, total = 0;
      for (int64_t p = 0; p < parts; ++p) largest = std::max(largest, found(line, p)[0]);
      const auto factor = [&](int64_t p) {
        return largest == kNothing ? 0.0f : exponential(found(line, p)[0] - largest);
      };
      for (int64_t p = 0; p < parts; ++p) total += factor(p) * found(line, p)[1];
      for (int64_t p = 0; p < parts && total != 0; ++p) {
        const float share = factor(p) / total;
        for (int64_t c = 0; c < v.cols; ++c) sum.data()[c] += share * found(line, p)[2 + c];
      }
      const int64_t query = line % queries, head = line / queries % heads, b = line / queries / heads;
      narrow(dot_type<T>, sum.data(), y + ((b * queries + query) * heads + head) * v.cols, v.cols);
    }
  });
}

// The same in float64, line by line.
void attend(const Tensor& q, const Cache<double>& k, const Cache<double>& v, const bool* seen, double scale,
            double* y) {
  const int64_t heads = q.size(1), queries = q.size(2), share = heads / k.heads;
  const Tensor from = adjacent(q);
  const double* x = static_cast<const double*>(from.const_data_ptr());
  std::vector<double> weights(k.keys);
  for (int64_t line = 0; line < q.size(0) * heads * queries; ++line) {
    const int64_t query = line % queries, head = line / queries % heads, b = line / queries / heads;
    double largest = kNothing, total = 0, *const to = y + ((b * queries + query) * heads + head) * v.cols;
    const auto sees = [&](int64_t i) { return seen == nullptr || seen[(b * queries + query) * k.keys + i]; };
    for (int64_t i = 0; i < k.keys; ++i) {
      const double* key = k.at(b, head / share, i);
      weights[i] = scale * lane_sum<double>(k.cols, [&](int64_t c) { return x[line * k.cols + c] * key[c]; });
      if (sees(i)) largest = std::max(largest, weights[i]);
    }
    const double zero = largest == kNothing ? 0.0 : largest;
    for (int64_t i = 0; i < k.keys; ++i) total += weights[i] = sees(i) ? std::exp(weights[i] - zero) : 0;
    std::fill_n(to, v.cols, 0.0);
    for (int64_t i = 0; i < k.keys && total != 0; ++i)
      for (int64_t c = 0; c < v.cols; ++c) to[c] += weights[i] / total * v.at(b, head / share, i)[c];
  }
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                        double scale) {
  STD_TORCH_CHECK(q.dim() == 4, "decode_attention: q has not four dimensions");
  return with_float_type(q.scalar_type(), "decode_attention", [&](auto zero) {
    using T = decltype(zero);
    const Cache<T> keys(k, "decode_attention: k"), values(v, "decode_attention: v");
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
    STD_TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && keys.heads == values.heads && keys.heads > 0 &&
                        heads % keys.heads == 0 && keys.keys == values.keys && keys.cols == q.size(3),
                    "decode_attention: shapes do not fit");
    Tensor seen = q;
    if (mask) {
      STD_TORCH_CHECK(mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool && mask->size(0) == batch &&
                          mask->size(1) == 1 && mask->size(2) == queries && mask->size(3) == keys.keys,
                      "decode_attention: mask does not fit");
      seen = adjacent(*mask);
    }
    const Tensor y = empty({batch, queries, heads, values.cols}, scalar_type<T>);
    attend(q, keys, values, mask ? static_cast<const bool*>(seen.const_data_ptr()) : nullptr,
           static_cast<Accumulate<T>>(scale), static_cast<T*>(y.mutable_data_ptr()));
    return y;
  });
}

TINYCOMP_CPU_KERNEL(decode_attention, decode_attention)

}  // namespace
}  // namespace tinycomp
