// Low-rank layers of one input: z = x rᵀ, then t zᵀ, put where `order` says. One parallel region for all of them;
// products stay in cache.
#pragma once

#include "linear.h"

namespace tinycomp {

// One layer's arguments, checked.
template <class T>
struct LowRank {
  Weight r, t;
  int64_t rank, out_features;
  std::vector<int32_t> from;  // where result i is found in the kept products followed by the others; empty: t alone
  std::vector<Accumulate<T>> bias;

  LowRank(const Tensor& x, const Tensor& first, const Tensor& second, const std::optional<Tensor>& order,
          const std::optional<Tensor>& shift)
      : r(first, dot_type<T>, scalar_type<T>, x.size(x.dim() - 1), "low rank: r"),
        t(second, dot_type<T>, scalar_type<T>, r.rows, "low rank: t"),
        rank(r.rows),
        out_features(t.rows + (order ? rank : 0)),
        bias(entries<T>(shift, out_features, "low rank: bias")) {
    if (order) from = inverse_permutation(*order, out_features, "low rank: order");
  }
  bool pivoted() const { return !from.empty(); }
  int64_t line() const { return pivoted() ? out_features : rank; }  // products that wait for the last stage
};

// The layers' results side by side, rows of `stride` values.
template <class T, int L>
void stream(const Inputs& x, const LowRank<T> (&layers)[L], T* y, int64_t stride) {
  const int64_t m = x.rows;
  int64_t lines_at[L + 1] = {}, y_at[L + 1] = {};
  Joined<L> kept, others, places;
  double estimate = 0;
  for (int l = 0; l < L; ++l) {
    const LowRank<T>& layer = layers[l];
    lines_at[l + 1] = Middle::whole_units(lines_at[l] + layer.line());
    y_at[l + 1] = y_at[l] + layer.out_features;
    kept.set(l, row_stage(layer.r, m));
    others.set(l, row_stage(layer.t, m));
    places.set(l, place_stage(layer.pivoted() ? m : 0, layer.out_features));
    estimate += weight_estimate(layer.r, m) + weight_estimate(layer.t, m);
  }
  const Middle lines(kMiddleSlot, m, lines_at[L], T{});
  const int64_t ld = lines.stride;
  const Stage stages[] = {x.stage(), kept.stage(), others.stage(), places.stage()};
  run_stages(stages, estimate, [&](int stage, int64_t first, int64_t last) {
    if (stage == 0) return x.prepare(first, last);
    const Joined<L>& joined = stage == 1 ? kept : stage == 2 ? others : places;
    joined.each(first, last, [&](int l, int64_t begin, int64_t end) {
      const LowRank<T>& layer = layers[l];
      float* z = lines.row(0) + lines_at[l];
      const Output<T> out{y + y_at[l], layer.out_features, layer.bias, stride};
      const Operand products = lines.operand(lines_at[l], layer.rank);
      if (stage == 1) {
        dot_rows(layer.r, x.operand(), m, begin, end, z, ld);
        lines.done(lines_at[l], layer.rank, begin, end);
      } else if (stage == 3)
        out.place(begin, end, layer.from, lines, lines_at[l]);
      else if (layer.pivoted())
        dot_rows(layer.t, products, m, begin, end, z + layer.rank, ld);
      else
        dot_rows(layer.t, products, m, begin, end, out);
    });
  });
}

// One layer through torch into a contiguous (m, out_features) tensor.
template <class T>
void through_torch(const Tensor& x, const LowRank<T>& layer, const Tensor& y) {
  low_rank_through_torch<T>(
      y, row_count(x), layer.rank, layer.from, layer.bias,
      [&](const Tensor& z) { gemm(as_matrix(x), layer.r.tensor, z); },
      [&](const Tensor& z, const Tensor& out) { gemm(z, layer.t.tensor, out); });
}

}  // namespace tinycomp
