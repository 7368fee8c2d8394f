// select_pivots in double. Rows of `a` are only read while pivots are chosen: a step costs one product of the matrix
// with a vector, and squared norms ("qr") or one column ("lu") are brought up to date from it.
#include <cmath>
#include <string>

#include "../common/linear.h"

namespace tinycomp {
namespace {

// The index with the largest score that is not taken; the lowest one of equals.
int64_t best(const std::vector<double>& score, const std::vector<char>& taken) {
  int64_t at = -1;
  for (int64_t i = 0; i < static_cast<int64_t>(score.size()); ++i)
    if (!taken[i] && (at < 0 || score[i] > score[at])) at = i;
  return at;
}

double inner(const double* a, const double* b, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// row -= (row . q) q for all directions found, twice: what remains is orthogonal to them to rounding.
void orthogonalise(double* row, const std::vector<double>& directions, int64_t count, int64_t n) {
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t l = 0; l < count; ++l) {
      const double* q = directions.data() + l * n;
      const double along = inner(row, q, n);
      for (int64_t c = 0; c < n; ++c) row[c] -= along * q[c];
    }
}

void pivots_qr(double* a, int64_t m, int64_t n, int64_t k, int64_t* pivots) {
  std::vector<double> norm(m), trusted(m), directions(k * n);
  std::vector<char> taken(m, 0);
  for (int64_t i = 0; i < m; ++i) norm[i] = trusted[i] = inner(a + i * n, a + i * n, n);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t pivot = pivots[j] = best(norm, taken);
    taken[pivot] = 1;
    double* q = directions.data() + j * n;
    std::copy_n(a + pivot * n, n, q);
    orthogonalise(q, directions, j, n);
    const double length = std::sqrt(inner(q, q, n));
    if (length == 0) continue;  // every remaining row is zero: the direction stays zero, the lowest indices follow
    for (int64_t c = 0; c < n; ++c) q[c] /= length;
    parallel_rows(m, n, [&](int64_t i) {
      if (taken[i]) return;
      const double along = inner(a + i * n, q, n);
      norm[i] = std::max(norm[i] - along * along, 0.0);
      // Subtraction has cancelled what double can tell: replace the row by its remainder and measure that.
      if (norm[i] < 1e-12 * trusted[i]) {
        orthogonalise(a + i * n, directions, j + 1, n);
        norm[i] = trusted[i] = inner(a + i * n, a + i * n, n);
      }
    });
  }
}

void pivots_lu(const double* a, int64_t m, int64_t n, int64_t k, int64_t* pivots) {
  // Row i of `lower` holds the multipliers of row i of a; `upper` the pivot rows after elimination, one column at a
  // time.
  std::vector<double> lower(m * k, 0.0), column(m), upper(k), score(m);
  std::vector<char> taken(m, 0);
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t l = 0; l < j; ++l)
      upper[l] = a[pivots[l] * n + j] - inner(lower.data() + pivots[l] * k, upper.data(), l);
    parallel_rows(m, j + 1, [&](int64_t i) {
      column[i] = a[i * n + j] - inner(lower.data() + i * k, upper.data(), j);
      score[i] = std::fabs(column[i]);
    });
    const int64_t pivot = pivots[j] = best(score, taken);
    taken[pivot] = 1;
    const double entry = column[pivot] == 0 ? 1.0 : column[pivot];
    for (int64_t i = 0; i < m; ++i)
      if (!taken[i]) lower[i * k + j] = column[i] / entry;
  }
}

Tensor select_pivots(const Tensor& a, int64_t k, const std::string& method) {
  STD_TORCH_CHECK(a.dim() == 2 && (method == "qr" || method == "lu"), "select_pivots: shape or method does not fit");
  const int64_t m = a.size(0), n = a.size(1);
  STD_TORCH_CHECK(k >= 0 && k <= m && (method == "qr" || k <= n), "select_pivots: k is out of range");
  with_float_type(a.scalar_type(), "select_pivots", [](auto) {});
  // A copy even of a double input: "qr" overwrites rows.
  const Tensor work = torch::stable::clone(adjacent(torch::stable::to(detach(a), ScalarType::Double)));
  double* values = static_cast<double*>(work.mutable_data_ptr());
  STD_TORCH_CHECK(std::all_of(values, values + m * n, [](double v) { return std::isfinite(v); }),
                  "select_pivots: a holds NaN or infinity");
  const Tensor pivots = empty({k}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(pivots.mutable_data_ptr());
  method == "qr" ? pivots_qr(values, m, n, k, to) : pivots_lu(values, m, n, k, to);
  return pivots;
}

TINYCOMP_CPU_KERNEL(select_pivots, select_pivots)

}  // namespace
}  // namespace tinycomp
