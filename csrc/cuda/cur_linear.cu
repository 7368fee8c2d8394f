// cur_linear: three products in a chain, ((x rᵀ) uᵀ) cᵀ.
#include "linear.cuh"

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

Tensor cur_linear(const Tensor& x, const Tensor& r, const Tensor& u, const Tensor& c,
                  const std::optional<Tensor>& bias) {
  return with_float_type(x.scalar_type(), "cur_linear", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "cur_linear: x"), rows(r, inputs.columns, "cur_linear: r"),
        link(u, rows.rows, "cur_linear: u"), columns(c, link.rows, "cur_linear: c");
    const Vector<T> shift(bias, scalar_type<T>, columns.rows, "cur_linear: bias");
    const Tensor y = empty(x, shape_with_last(x, columns.rows), scalar_type<T>);
    const Between<T> z(device, x, inputs.rows, rows.rows), linked(device, x, inputs.rows, link.rows);
    chain<T, false>(device, inputs.matrix(), inputs.rows, dense(rows), keep(z), dense(link), keep(linked),
                    dense(columns), into(y, columns.rows, shift.data));
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(cur_linear, cur_linear)

}  // namespace tinycomp::cuda
#endif
