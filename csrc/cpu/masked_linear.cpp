// masked_linear. Bit masks and 2:4: rows are expanded, in cache or in registers, and multiplied like dense ones, or
// inputs chosen for rows of 2:4: the bytes that stream are the packed ones. Index + value, and masks that keep few:
// only kept weights are multiplied. Blocks: only kept blocks.
#include "../common/beside.h"
#include "../common/masked.h"
#include "../common/prefetch.h"

namespace tinycomp {
namespace {

// Rows [first, last) times all inputs, in batches as dot_rows of linear.h.
template <class Rows, class Store>
void batches(int64_t m, int64_t first, int64_t last, const Rows& rows, const Store& store) {
  const Scratch out(kResultSlot, std::min(m, kInputsAtOnce) * kBatch);
  for (int64_t i = first; i < last; i += kBatch) {
    const int64_t n = std::min(kBatch, last - i);
    for (int64_t start = 0; start < m; start += kInputsAtOnce) {
      const int64_t inputs = std::min(kInputsAtOnce, m - start);
      rows(i, n, start, inputs, out.data());
      for (int64_t j = 0; j < inputs; ++j) store(start + j, i, out.data() + j * kBatch, n);
    }
  }
}

// One input, padded to as many columns as packed rows are multiplied by together, and arranged as the products of
// packed rows want it.
struct OneInput {
  const float *plain, *arranged;
};

// Columns of a row, up to the end of what is multiplied together.
inline int64_t padded(int64_t cols) {
  const int64_t together = expansion().together;
  return (cols + together - 1) / together * together;
}

// One input: four rows at a time go straight into sums, where enough values follow theirs.
inline void expanded_once(const Masked& w, const OneInput& x, int64_t i, int64_t n, float* out) {
  const int64_t width = padded(w.cols), blocks = width / 16, bytes = (w.cols + 7) / 8;
  const bool in_place = !w.two_of_four && w.cols == width;
  const bool pairs = w.two_of_four && w.cols == width && expansion().pairs(w.type);
  const Scratch words(kMaskSlot, 2 * (blocks + 1)), row(kRebuildSlot, width);
  auto* const all = reinterpret_cast<uint16_t*>(words.data());
  for (int64_t r = 0; r < n;) {
    int64_t at[4], ends[4];
    const uint16_t* masks[4];
    const uint8_t* codes[4];
    bool together = r + 4 <= n && (pairs || expansion().dots(w.type));
    for (int64_t c = 0; together && !has_tiles() && c < 4 * bytes; c += 64)
      prefetch(w.mask_data + (i + r + 4) * bytes + c);
    for (int64_t k = 0; k < 4 && together; ++k) {
      const int64_t line = i + r + k;
      codes[k] = w.mask_data + line * bytes;
      std::tie(at[k], ends[k]) = w.value_range(line);
      if (pairs) continue;
      masks[k] = in_place ? reinterpret_cast<const uint16_t*>(codes[k]) : all + k * blocks;
      if (!in_place) all[(k + 1) * blocks - 1] = 0, w.words(line, all + k * blocks);
      // Whatever the mask says, no more is read; what it does say, `at` tells.
      together = at[k] + width + 64 <= w.count;
    }
    if (pairs && together) {
      together = expansion().pairs_dot(w.type, w.value_data, at, codes, blocks, x.arranged, out + r);
    } else if (together) {
      expansion().expand_dot(w.type, w.value_data, at, masks, blocks, x.arranged, out + r);
      together = std::equal(at, at + 4, ends);
    }
    if (together) {
      r += 4;
      continue;
    }
    for (const int64_t end = std::min(r + 4, n); r < end; ++r) {
      w.expand_row(i + r, all, row.data());
      dot(Type::f32, row.data(), 0, 1, w.cols, x.plain, 0, 1, out + r, 1);
    }
  }
}

template <class Store>
void expanded(const Masked& w, const Inputs& x, const OneInput& one, int64_t first, int64_t last, const Store& store) {
  // As many rows as a panel has: the second-level cache keeps them.
  constexpr int64_t kRows = 32;
  const int64_t width = row_distance(padded(w.cols), kRows);
  const Scratch dense(kRebuildSlot, kRows * width), mask(kMaskSlot, width / 16);
  auto* bits = reinterpret_cast<uint16_t*>(mask.data());
  batches(
      x.rows, first, last,
      [&](int64_t i, int64_t n, int64_t start, int64_t inputs, float* out) {
        if (x.rows == 1 && w.cols > 0) return expanded_once(w, one, i, n, out);
        for (int64_t done = 0; done < n; done += kRows) {
          const int64_t rows = std::min(kRows, n - done);
          for (int64_t r = 0; r < rows; ++r) {
            float* to = dense.data() + r * width;
            if (w.format == "index")
              w.scatter_words(i + done + r, reinterpret_cast<uint16_t*>(to));
            else if (x.pairs())
              w.expand_words(i + done + r, bits, reinterpret_cast<uint16_t*>(to));
            else
              w.expand_row(i + done + r, bits, to);
          }
          dot(x.pairs() ? Type::bf16 : Type::f32, dense.data(), width * 4, rows, w.cols, x.operand().from(start),
              inputs, out + done, kBatch);
        }
      },
      store);
}

// Inputs as columns, so that a kept weight meets all of them at once: groups of 32 in bfloat16, where many inputs are
// that, else in float32.
struct Columns {
  const float* wide;
  const uint32_t* pairs;  // null: `wide`
  int64_t m;

  static constexpr int64_t kGroup = 32, kWords = kGroup / 2;
  static int64_t floats(bool narrow, int64_t m, int64_t cols) {
    return narrow ? (m + kGroup - 1) / kGroup * cols * kWords : m * cols;
  }
};

// Kept weights alone are multiplied, those of a list with one input, words of bfloat16 of which any column may be
// read. Rows are checked by what they read.
template <class Store>
void listed(const Masked& w, const uint16_t* x, int64_t first, int64_t last, const Store& store) {
  const uint16_t *index = w.index(), *values = w.words();
  batches(
      1, first, last,
      [&](int64_t i, int64_t n, int64_t, int64_t, float* out) {
        uint16_t most = 0;
        for (int64_t r = 0; r < n; ++r) {
          const auto [from, to] = w.range(i + r, w.count);
          out[r] = expansion().gather_words(values + from, index + from, to - from, x, most);
          if (to - from > w.cols || (to > from && most >= w.cols)) w.bad = true;
        }
      },
      store);
}

// The same, any number of inputs. One: `x`; more: `columns`.
template <class Store>
void indexed(const Masked& w, const float* x, const Columns& columns, int64_t first, int64_t last, const Store& store) {
  static_assert(kInputsAtOnce % Columns::kGroup == 0);
  const bool listed = w.format == "index";
  const uint16_t* const index = w.index();
  const int64_t words = (w.cols + 15) / 16;
  const Scratch wide(kRebuildSlot, w.cols + 16);
  std::vector<uint16_t> bits(listed ? 0 : kBatch * words + 1), found(listed ? 0 : 16 * words + 32);
  batches(
      columns.m, first, last,
      [&](int64_t i, int64_t n, int64_t start, int64_t inputs, float* out) {
        const Kept kept = listed ? Kept(w, index, i, n) : Kept(w, bits.data(), words, i, n);
        for (int64_t r = 0; r < n; ++r) {
          const auto [from, to] = kept.row[r];
          const uint16_t* at = index + from;
          if (!listed) {
            expansion().columns(bits.data() + r * words, words, found.data());
            at = found.data();
          }
          if (columns.m == 1 && w.floating()) {
            const char* values = w.value_data + from * w.value_size();
            out[r] = expansion().gather(w.type, values, at, to - from, x);
            continue;
          }
          const float* values = widened(w, from, to, wide);
          if (columns.m == 1) {
            out[r] = expansion().gather(Type::f32, values, at, to - from, x);
            continue;
          }
          // Parts of their own, for the error of a sum grows with what is added in one chain.
          constexpr int64_t kPart = 512;
          float sums[kInputsAtOnce] = {}, part[kInputsAtOnce];
          for (int64_t i = 0, some; i < to - from; i += some) {
            some = std::min(kPart, to - from - i);
            if (columns.pairs == nullptr)
              expansion().gather_many(values + i, at + i, some, columns.wide + start, columns.m, inputs, part);
            for (int64_t j = 0; j < inputs && columns.pairs != nullptr; j += Columns::kGroup) {
              const uint32_t* group = columns.pairs + (start + j) / Columns::kGroup * w.cols * Columns::kWords;
              expansion().gather_pairs(values + i, at + i, some, group, part + j);
            }
            for (int64_t j = 0; j < inputs; ++j) sums[j] += part[j];
          }
          for (int64_t j = 0; j < inputs; ++j) out[j * kBatch + r] = sums[j];
        }
      },
      store);
}

// Inputs that go through all rows of blocks together: as many as stay in cache.
inline int64_t inputs_together(int64_t cols) {
  constexpr int64_t kKeptInputs = 1 << 19, kWhole = 32;  // as many as begin a piece of interleaved ones
  return std::clamp(kKeptInputs / std::max<int64_t>(cols, 1) / kWhole * kWhole, kWhole, kInputsAtOnce);
}

// Whole blocks [first, last) of columns of all inputs, one block after another: in a matrix its rows would lie in as
// many pages as there are inputs.
inline void pack_blocks(const Inputs& x, int64_t first, int64_t last, float* to) {
  const int64_t whole = x.cols / kBlock * kBlock, together = inputs_together(x.cols);
  for (int64_t start = 0; start < x.rows; start += together) {
    const int64_t inputs = std::min(together, x.rows - start);
    for (int64_t c = first; c < last; ++c)
      for (int64_t j = 0; j < inputs; ++j)
        x.take(start + j, c * kBlock, kBlock, to + start * whole + (c * inputs + j) * kBlock);
  }
}

// Kept blocks meet the inputs of their columns, `packed`; a last block that is cut off, its columns in x. Rows come in
// whole blocks.
template <class Store>
void blockwise(const Masked& w, const Inputs& x, const float* packed, int64_t first, int64_t last, const Store& store) {
  static_assert(kBatch % kBlock == 0);
  constexpr int64_t kValues = kBlock * kBlock, kTogether = 6;
  const int64_t bytes = (w.cols + 8 * kBlock - 1) / (8 * kBlock), columns = (w.cols + kBlock - 1) / kBlock;
  const int64_t size = w.value_size();
  const bool tiles = x.operand().beside();
  const int64_t together = inputs_together(w.cols), uncut = w.cols / kBlock;
  const Scratch part(kShiftSlot, kInputsAtOnce * kBlock), values(kRebuildSlot, kTogether * kValues);
  std::vector<int32_t> places(columns);
  for (int64_t start = 0; start < x.rows; start += together) {
    const float* from = packed + start * uncut * kBlock;
    batches(
        std::min(together, x.rows - start), first, last,
        [&](int64_t i, int64_t n, int64_t, int64_t inputs, float* out) {
          for (int64_t j = 0; j < inputs; ++j) std::fill_n(out + j * kBatch, kBatch, 0.0f);
          for (int64_t b = i / kBlock; b * kBlock < i + n; ++b) {
            auto [at, end] = w.range(b, w.count / kValues);
            const auto is_kept = [&](int64_t c) { return w.mask_data[b * bytes + c / 8] >> (c % 8) & 1; };
            int64_t kept = 0;
            for (int64_t c = 0; c < uncut; ++c)
              if (is_kept(c)) places[kept++] = static_cast<int32_t>(tiles ? c : c * inputs * kBlock);
            bool cut = uncut < columns && is_kept(uncut);
            if (kept + cut > end - at) w.bad = true, kept = 0, cut = false;
            float* to = out + b * kBlock - i;
            if (tiles) {
              const float* some = x.operand().from(start).data;
              dot_tile_blocks(w.value_data + at * kValues * size, places.data(), kept, some, w.cols / 2, inputs, to,
                              kBatch);
            } else if (w.floating()) {
              dot_blocks(w.type, w.value_data + at * kValues * size, places.data(), kept, from, kBlock, inputs, to,
                         kBatch);
            } else {
              for (int64_t k = 0, count; k < kept; k += count) {
                count = std::min(kTogether, kept - k);
                const float* some = widened(w, (at + k) * kValues, (at + k + count) * kValues, values);
                dot_blocks(Type::f32, some, places.data() + k, count, from, kBlock, inputs, to, kBatch);
              }
            }
            if (!cut) continue;
            dot(Type::f32, widened(w, (at + kept) * kValues, (at + kept + 1) * kValues, values), kBlock * 4, kBlock,
                w.cols % kBlock, x.data() + start * x.stride + uncut * kBlock, x.stride, inputs, part.data(), kBlock);
            for (int64_t j = 0; j < inputs; ++j)
              for (int64_t r = 0; r < kBlock; ++r) to[j * kBatch + r] += part.data()[j * kBlock + r];
          }
        },
        [&](int64_t j, int64_t i, float* line, int64_t n) { store(start + j, i, line, n); });
  }
}

// Columns [first, last) of m inputs that are exact in bfloat16, as Columns holds them. A few columns of all inputs of a
// group at a time: lines of inputs are read whole, lines of words written whole.
inline void pack_pairs(const Inputs& x, int64_t first, int64_t last, uint32_t* to) {
  constexpr int64_t kSome = 16, kWords = Columns::kWords;
  const std::vector<float> nothing(kSome, 0.0f);
  for (int64_t start = 0; start < x.rows; start += Columns::kGroup, to += x.cols * kWords)
    for (int64_t c = first; c < last; c += kSome)
      for (int64_t k = 0; k < kWords; ++k) {
        const int64_t low = start + 2 * k, high = low + 1;
        const float* below = low < x.rows ? x.data() + low * x.stride + c : nothing.data();
        const float* above = high < x.rows ? x.data() + high * x.stride + c : nothing.data();
        for (int64_t i = 0; i < std::min(kSome, last - c); ++i) {
          uint32_t words[2];
          __builtin_memcpy(&words[0], below + i, 4), __builtin_memcpy(&words[1], above + i, 4);
          to[(c + i) * kWords + k] = words[0] >> 16 | (words[1] & 0xffff0000);
        }
      }
}

// The share of kept weights up to which multiplying them alone is faster than a dense product: a whole group of inputs
// meets a kept weight, however many they are, where a product of pairs takes as long as it has inputs.
inline double few_kept(int64_t m) {
  if (has_tiles()) return 0.02;
  const int64_t inputs = (m + Columns::kGroup - 1) / Columns::kGroup * Columns::kGroup;
  return expansion().words == nullptr ? 0.35 : 0.27 * static_cast<double>(m) / static_cast<double>(inputs);
}

template <class T>
void stream(const Masked& w, const Tensor& inputs, const Output<T>& y) {
  const int64_t m = row_count(inputs), wide = padded(w.cols);
  // A row that keeps few weights meets the inputs of its columns alone, where a line of memory holds many of these.
  const bool bits = w.format == "bitmask" || w.format == "2:4";
  const bool narrow = std::is_same_v<T, BFloat16> && m > Columns::kWords;
  const bool sparse = narrow && bits && w.cols <= 65536 && w.count <= w.rows * w.cols * few_kept(m);
  // Tiles take whole rows of zeros sooner than others take the few that are kept.
  const bool scattered = m > 1 && has_tiles() && w.format == "index" && w.type == Type::bf16 && in_pairs<T>(w.cols);
  const bool rows = m > 1 && ((bits && !sparse) || scattered);                               // that are expanded
  const bool blocks = w.format == "block32", packed_alone = blocks && w.cols % kBlock == 0;  // no block reads x itself
  const bool tiled = has_tiles() && w.type == Type::bf16 && packed_alone && w.cols > 0 &&
                     side_by_side<T>(m, w.cols, true) != Order::rows;
  const bool pairs = tiled || (rows && w.type == Type::bf16 && expansion().words != nullptr);
  // Rows of what is not bfloat16 are expanded in float32, and inputs lie beside rows of their own type alone.
  const bool beside = tiled || (rows && !std::is_same_v<T, Half> && (m >= kPanelInputs || has_tiles()));
  const Inputs x(inputs, T{}, kApart | kCached | (beside ? kBeside : 0u) | (pairs ? kPairs : 0u));
  const bool turned = m > 1 && (sparse || (w.format == "index" && !scattered)), padded = m == 1 && bits;
  const bool words_once = m == 1 && w.format == "index" && w.type == Type::bf16 && expansion().gather_words != nullptr;
  const int64_t floats = turned ? Columns::floats(narrow, m, w.cols) : padded ? 2 * wide : m * w.cols;
  const Scratch columns(kMiddleSlot, words_once ? 65536 / 2 + 1 : turned || padded || (blocks && !tiled) ? floats : 0);
  const OneInput one{columns.data(), columns.data() + wide};
  auto* words = reinterpret_cast<uint32_t*>(columns.data());
  const Columns lines{columns.data(), turned && narrow ? words : nullptr, m};
  const Stage packing = turned                 ? Stage{w.cols, 256}
                        : padded || words_once ? Stage{1, 1}
                        : blocks && !tiled     ? Stage{w.cols / kBlock, 8}
                                               : Stage{0, 1};
  const Stage stages[] = {packed_alone && !tiled ? Stage{0, 1} : x.stage(), packing, {w.rows, kBatch}};
  const double estimate = microseconds(static_cast<double>(w.count) * 2, static_cast<double>(w.count) * m);
  run_stages(stages, estimate, [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) return x.prepare(first, last);
    if (stage == 1 && padded) {
      std::fill_n(std::copy_n(x.data(), w.cols, columns.data()), wide - w.cols, 0.0f);
      if (expansion().arrange == nullptr) return;
      return expansion().arrange(w.type, one.plain, wide / 16, columns.data() + wide);
    }
    if (stage == 1 && words_once) return tinycomp::narrow(Type::bf16, x.data(), columns.data(), w.cols);
    if (stage == 1 && blocks) return pack_blocks(x, first, last, columns.data());
    if (stage == 1) {
      if (narrow) return pack_pairs(x, first, last, words);
      for (int64_t c = first; c < last; ++c)
        for (int64_t j = 0; j < m; ++j) columns.data()[c * m + j] = x.data()[j * x.stride + c];
      return;
    }
    auto store = [&](int64_t j, int64_t i, float* values, int64_t n) {
      for (int64_t c = 0; c < n && !w.scale.empty(); ++c) values[c] *= w.scale[i + c];
      y.store(j, i, values, n);
    };
    if (words_once)
      listed(w, reinterpret_cast<const uint16_t*>(columns.data()), first, last, store);
    else if (sparse || (w.format == "index" && !scattered))
      indexed(w, x.data(), lines, first, last, store);
    else if (blocks)
      blockwise(w, x, columns.data(), first, last, store);
    else
      expanded(w, x, one, first, last, store);
  });
}

// Double: values fit in float32 only where they are rounded, so rows are rebuilt by scattering.
Tensor dense(const Masked& w, const std::vector<double>& scale) {
  const Tensor result = empty({w.rows, w.cols}, ScalarType::Double);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(to, w.rows * w.cols, 0.0);
  auto value = [&](int64_t i) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(w.value_data);
    if (w.type == Type::i8) return static_cast<double>(static_cast<int8_t>(bytes[i]));
    if (w.type == Type::u4) return static_cast<double>((i % 2 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15) - 8);
    return reinterpret_cast<const double*>(w.value_data)[i];
  };
  std::vector<uint16_t> words(w.cols / 16 + 1);
  for (int64_t i = 0; i < w.rows; ++i) {
    if (w.format == "index") {
      const uint16_t* const index = w.index();
      const auto [from, end] = w.range(i, w.count);
      for (int64_t c = from; c < end; ++c)
        index[c] < w.cols ? void(to[i * w.cols + index[c]] = value(c)) : void(w.bad = true);
    } else if (w.format == "block32") {
      const int64_t b = i / kBlock, bytes = (w.cols + 8 * kBlock - 1) / (8 * kBlock);
      auto [at, end] = w.range(b, w.count / (kBlock * kBlock));
      for (int64_t c = 0; c < w.cols && at < end; c += kBlock) {
        if (!(w.mask_data[b * bytes + c / kBlock / 8] >> (c / kBlock % 8) & 1)) continue;
        for (int64_t k = c; k < std::min(w.cols, c + kBlock); ++k)
          to[i * w.cols + k] = value((at * kBlock + i % kBlock) * kBlock + k - c);
        ++at;
      }
    } else if (w.cols > 0) {
      w.words(i, words.data());
      int64_t at = w.format == "2:4" ? i * 2 * ((w.cols + 3) / 4) : w.range(i, w.count).first;
      for (int64_t c = 0; c < (w.cols + 15) / 16 * 16; ++c) {
        if (!(words[c / 16] >> (c % 16) & 1)) continue;
        if (at >= w.count) {
          w.bad = true;
          break;
        }
        if (c < w.cols) to[i * w.cols + c] = value(at);
        ++at;
      }
    }
    for (int64_t c = 0; c < w.cols && !scale.empty(); ++c) to[i * w.cols + c] *= scale[i];
  }
  return result;
}

void check(const Masked& w, const std::optional<Tensor>& offsets, int64_t value_bits, ScalarType type) {
  const bool pairs = w.two_of_four, blocks = w.format == "block32", index = w.format == "index";
  const int64_t rows = blocks ? (w.rows + kBlock - 1) / kBlock : w.rows;
  const int64_t width = blocks ? (w.cols + 8 * kBlock - 1) / (8 * kBlock) : (w.cols + 7) / 8;
  const ScalarType stored = value_bits == 0 ? type : value_bits == 8 ? ScalarType::Char : ScalarType::Byte;
  const bool mask_fits = index ? w.mask.dim() == 1 && w.mask.scalar_type() == ScalarType::Short && w.cols <= 65536
                               : w.mask.dim() == 2 && w.mask.size(0) == rows && w.mask.size(1) == width &&
                                     w.mask.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(w.values.scalar_type() == stored && mask_fits && (pairs || blocks || index || w.format == "bitmask"),
                  "masked_linear: format, values or mask do not fit");
  STD_TORCH_CHECK(!pairs || w.count >= w.rows * 2 * ((w.cols + 3) / 4), "masked_linear: too few values");
  STD_TORCH_CHECK(!index || w.mask.size(0) <= w.count, "masked_linear: too few values");
  STD_TORCH_CHECK(offsets.has_value() != pairs, "masked_linear: offsets");
  if (offsets)
    STD_TORCH_CHECK(offsets->dim() == 1 && offsets->size(0) == rows + 1 && offsets->scalar_type() == ScalarType::Int,
                    "masked_linear: offsets");
}

Tensor masked_linear(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t out_features,
                     const std::string& format, int64_t value_bits) {
  STD_TORCH_CHECK(x.dim() >= 1 && out_features >= 0 && (value_bits == 0 || value_bits == 4 || value_bits == 8) &&
                      scales.has_value() == (value_bits != 0),
                  "masked_linear: shapes, value_bits or scales do not fit");
  return with_float_type(x.scalar_type(), "masked_linear", [&](auto zero) {
    using T = decltype(zero);
    const Type type = value_bits == 8 ? Type::i8 : value_bits == 4 ? Type::u4 : dot_type<T>;
    Masked w(format, type, values, mask, offsets, out_features, x.size(x.dim() - 1));
    check(w, offsets, value_bits, scalar_type<T>);
    if (format == "index") w.count = w.mask.size(0);
    std::vector<double> scale;
    if (scales) {
      STD_TORCH_CHECK(scales->dim() == 2 && scales->size(0) == out_features && scales->size(1) == 1,
                      "masked_linear: scales do not fit");
      const int64_t shape[] = {out_features};
      const Tensor row = torch::stable::reshape(*scales, {shape, 1});
      with_float_type(row.scalar_type(), "masked_linear: scales", [&](auto kind) {
        const auto found = entries<decltype(kind)>(row, out_features, "masked_linear: scales");
        scale.assign(found.begin(), found.end());
      });
      w.scale.assign(scale.begin(), scale.end());
    }
    const auto shift = entries<T>(bias, out_features, "masked_linear: bias");
    const std::vector<int64_t> shape = shape_with_last(x, out_features);
    Tensor y;
    if constexpr (std::is_same_v<T, double>) {
      y = adjacent(gemm(as_matrix(x), dense(w, scale)));
      add_bias(static_cast<double*>(y.mutable_data_ptr()), y.size(0), out_features, shift);
      y = torch::stable::view(y, {shape.data(), shape.size()});
    } else {
      y = empty(shape, scalar_type<T>);
      stream<T>(w, x, {static_cast<T*>(y.mutable_data_ptr()), out_features, shift});
    }
    STD_TORCH_CHECK(!w.bad, "masked_linear: offsets, mask and values disagree");
    return y;
  });
}

TINYCOMP_CPU_KERNEL(masked_linear, masked_linear)
TINYCOMP_CPU_KERNEL_BESIDE(masked_linears, masked_linear, 6)

}  // namespace
}  // namespace tinycomp
