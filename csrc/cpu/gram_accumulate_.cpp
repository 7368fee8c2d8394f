// gram_accumulate_: xᵀ x through torch in chunks of rows, so that the widened copy of x stays small.
#include "../common/linear.h"

namespace tinycomp {
namespace {

template <class G>
void add(const Tensor& gram, const Tensor& product) {
  G* to = static_cast<G*>(gram.mutable_data_ptr());
  const G* from = static_cast<const G*>(product.const_data_ptr());
  const int64_t n = gram.size(0), rows = gram.stride(0), columns = gram.stride(1);
  parallel_rows(n, n, [&](int64_t i) {
    for (int64_t c = 0; c < n; ++c) to[i * rows + c * columns] += from[i * n + c];
  });
}

void gram_accumulate_(Tensor gram, const Tensor& x) {
  const ScalarType type = gram.scalar_type();
  STD_TORCH_CHECK(x.dim() >= 1 && gram.dim() == 2, "gram_accumulate_: shapes do not fit");
  const int64_t n = x.size(x.dim() - 1);
  STD_TORCH_CHECK(gram.size(0) == n && gram.size(1) == n, "gram_accumulate_: shapes do not fit");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "gram_accumulate_: dtype of gram");
  with_float_type(x.scalar_type(), "gram_accumulate_", [](auto) {});
  constexpr int64_t kChunk = 4096;
  Tensor rows = detach(as_matrix(x));
  for (int64_t start = 0; start < rows.size(0); start += kChunk) {
    const Tensor chunk = torch::stable::narrow(rows, 0, start, std::min(kChunk, rows.size(0) - start));
    const Tensor wide = torch::stable::to(chunk, type);
    const Tensor product = adjacent(torch::stable::matmul(torch::stable::transpose(wide, 0, 1), wide));
    type == ScalarType::Float ? add<float>(gram, product) : add<double>(gram, product);
  }
}

TINYCOMP_CPU_KERNEL(gram_accumulate_, gram_accumulate_)

}  // namespace
}  // namespace tinycomp
