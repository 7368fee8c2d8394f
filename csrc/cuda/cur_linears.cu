// cur_linears: layers of three factors that share their input; few inputs take one launch for all of them.
#include "linear.cuh"

// One layer: its factors, where r x and u (r x) are kept, bias and outputs; see CURLayer.
#define TINYCOMP_CUR(l, T)                                                                                \
  TINYCOMP_WEIGHT(l##_r), TINYCOMP_WEIGHT(l##_u), TINYCOMP_WEIGHT(l##_c), T *l##_z, int64_t l##_z_stride, \
      T *l##_linked, int64_t l##_linked_stride, const T *l##_bias, T *l##_y
#define TINYCOMP_CUR_NAMES(l)    \
  {TINYCOMP_WEIGHT_NAMES(l##_r), \
   TINYCOMP_WEIGHT_NAMES(l##_u), \
   TINYCOMP_WEIGHT_NAMES(l##_c), \
   l##_z,                        \
   l##_z_stride,                 \
   l##_linked,                   \
   l##_linked_stride,            \
   l##_bias,                     \
   l##_y}
#define TINYCOMP_PASS_CUR(l)                                                                                  \
  TINYCOMP_PASS_WEIGHT(l.r), TINYCOMP_PASS_WEIGHT(l.u), TINYCOMP_PASS_WEIGHT(l.c), l.z, l.z_stride, l.linked, \
      l.linked_stride, l.bias, l.y

namespace tinycomp::cuda {

// y = c (u (r x)) + bias. A layer that is not there has no rows.
template <class T>
struct CURLayer {
  Storage r, u, c;
  T* z;
  int64_t z_stride;
  T* linked;
  int64_t linked_stride;
  const T* bias;
  T* y;
};

// All r of a group, then all u, then all c, as in group_decode. Registers in float32: see chain3_decode.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(T) == 4 ? 1 : 2)
    cur_group_decode(TINYCOMP_INPUT(T), TINYCOMP_CUR(a, T), TINYCOMP_CUR(b, T), TINYCOMP_CUR(c, T), int64_t y_stride,
                     unsigned* counters, int inputs) {
  const CURLayer<T> a TINYCOMP_CUR_NAMES(a), b TINYCOMP_CUR_NAMES(b), c TINYCOMP_CUR_NAMES(c);
  const Matrix<T> x TINYCOMP_INPUT_NAMES;
  const int a_r = items<T, 1>(a.r.rows), b_r = items<T, 1>(b.r.rows), c_r = items<T, 1>(c.r.rows),
            a_u = items<T, 1>(a.u.rows), b_u = items<T, 1>(b.u.rows), c_u = items<T, 1>(c.u.rows),
            a_c = items<T, 1>(a.c.rows), b_c = items<T, 1>(b.c.rows), c_c = items<T, 1>(c.c.rows);
  run_stages<3>(counters, {a_r + b_r + c_r, a_u + b_u + c_u, a_c + b_c + c_c}, [&](int stage, int item) {
    const int in_a = stage == 0 ? a_r : stage == 1 ? a_u : a_c, in_b = stage == 0 ? b_r : stage == 1 ? b_u : b_c;
    const int which = (item >= in_a) + (item >= in_a + in_b);
    item -= which == 0 ? 0 : which == 1 ? in_a : in_a + in_b;
    const CURLayer<T> layer = which == 0 ? a : which == 1 ? b : c;
    // One product for all stages: three in a row would take more registers.
    const Dense<T> w{stage == 0 ? layer.r : stage == 1 ? layer.u : layer.c};
    const Matrix<T> from = stage == 0   ? x
                           : stage == 1 ? Matrix<T>{layer.z, layer.z_stride, true}
                                        : Matrix<T>{layer.linked, layer.linked_stride, true};
    const Output<T> to{stage == 2 ? layer.y : nullptr,
                       y_stride,
                       stage == 0   ? layer.z
                       : stage == 1 ? layer.linked
                                    : nullptr,
                       stage == 0 ? layer.z_stride : layer.linked_stride,
                       nullptr,
                       layer.bias,
                       nullptr,
                       0,
                       nullptr,
                       0,
                       nullptr};
    decode_rows<T, 1>(w, from, inputs, item * 8, to);
  });
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "linear_host.cuh"

namespace tinycomp::cuda {

using Optional = std::optional<Tensor>;

Tensor cur_linears(const Tensor& x, const Tensor& r1, const Tensor& u1, const Tensor& c1, const Optional& bias1,
                   const Tensor& r2, const Tensor& u2, const Tensor& c2, const Optional& bias2, const Optional& r3,
                   const Optional& u3, const Optional& c3, const Optional& bias3) {
  STD_TORCH_CHECK(r3.has_value() == (u3 && c3), "cur_linears: the third layer is incomplete");
  return with_float_type(x.scalar_type(), "cur_linears", [&](auto zero) {
    using T = decltype(zero);
    const Device device(x);
    const Rows<T> inputs(x, -1, "cur_linears: x");
    CURLayer<T> layers[3] = {};
    std::vector<Tensor> held;  // what the layers point to
    int64_t features = 0, items = 0;
    const auto add = [&](int at, const Tensor& r, const Tensor& u, const Tensor& c, const Optional& bias) {
      const Rows<T> rows(r, inputs.columns, "cur_linears: r"), link(u, rows.rows, "cur_linears: u"),
          columns(c, link.rows, "cur_linears: c");
      const Vector<T> shift(bias, scalar_type<T>, columns.rows, "cur_linears: bias");
      const Between<T> z(device, x, inputs.rows, rows.rows), linked(device, x, inputs.rows, link.rows);
      layers[at] = {dense(rows), dense(link),   dense(columns), z.data, z.stride,
                    linked.data, linked.stride, shift.data,     nullptr};
      held.insert(held.end(), {rows.tensor, link.tensor, columns.tensor});
      if (shift.tensor) held.push_back(*shift.tensor);
      if (z.tensor) held.push_back(*z.tensor);
      if (linked.tensor) held.push_back(*linked.tensor);
      features += columns.rows;
      items += ceil_div(rows.rows, 8) + ceil_div(link.rows, 8) + ceil_div(columns.rows, 8);
    };
    add(0, r1, u1, c1, bias1);
    add(1, r2, u2, c2, bias2);
    if (r3) add(2, *r3, *u3, *c3, bias3);
    const Tensor y = empty(x, shape_with_last(x, features), scalar_type<T>);
    T* to = static_cast<T*>(y.mutable_data_ptr());
    for (CURLayer<T>& l : layers) l.y = to, to += l.c.rows;
    if (inputs.rows == 0 || features == 0) return y;
    if (inputs.rows > kDecodeRows) {
      for (const CURLayer<T>& l : layers) {
        const Output<T> z{nullptr, 0, l.z, l.z_stride}, linked{nullptr, 0, l.linked, l.linked_stride};
        product<T, Dense<T>>(device, inputs.matrix(), inputs.rows, l.r, z);
        product<T, Dense<T>>(device, z.next(), inputs.rows, l.u, linked);
        product<T, Dense<T>>(device, linked.next(), inputs.rows, l.c,
                             Output<T>{l.y, features, nullptr, 0, nullptr, l.bias});
      }
      return y;
    }
    const int64_t fit = (sizeof(T) == 4 ? 1 : 2) * static_cast<int64_t>(device.processors);
    const auto& [a, b, c] = layers;
    TINYCOMP_LAUNCH((cur_group_decode<T>), dim3(items < fit ? items : fit), dim3(kDecodeThreads),
                    decode_shared_bytes<1>, device.stream, TINYCOMP_PASS_INPUT(inputs.matrix()), TINYCOMP_PASS_CUR(a),
                    TINYCOMP_PASS_CUR(b), TINYCOMP_PASS_CUR(c), features, device.counters(), inputs.rows);
    device.check_launch();
    return y;
  });
}

TINYCOMP_CUDA_KERNEL(cur_linears, cur_linears)

}  // namespace tinycomp::cuda
#endif
