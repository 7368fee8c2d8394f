// lowrank_linear: z = x rᵀ, then t zᵀ, written where `order` says. Decode is one launch; otherwise one per factor.
#include "factors.cuh"

namespace tinycomp::cuda {

template <class T, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads)
    lowrank_decode(const T* x, int64_t x_stride, int x_vector, const T* r, int64_t r_stride, int r_vector, const T* t,
                   int64_t t_stride, int t_vector, const int* order, const T* bias, T* y, int64_t y_stride, T* z,
                   int64_t z_stride, unsigned* counters, int inputs, int columns, int rank, int rest) {
  decode_factors<T, kTiles>(Dense<T>{r, rank, columns, r_stride, r_vector != 0}, Dense<T>{t, rest, rank, t_stride, t_vector != 0},
                            Matrix<T>{x, x_stride, x_vector != 0}, inputs,
                            FirstOutput<T>{z, z_stride, {y, y_stride, order, bias}},
                            Output<T>{y, y_stride, order ? order + rank : order, bias}, counters);
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    lowrank_first(const T* x, int64_t x_stride, int x_vector, const T* r, int64_t r_stride, int r_vector,
                  const int* order, const T* bias, T* y, int64_t y_stride, T* z, int64_t z_stride, int inputs,
                  int columns, int rank) {
  gemm_tile<T, Tile>(Dense<T>{r, rank, columns, r_stride, r_vector != 0}, Matrix<T>{x, x_stride, x_vector != 0}, inputs,
                     FirstOutput<T>{z, z_stride, {y, y_stride, order, bias}});
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    lowrank_second(const T* z, int64_t z_stride, const T* t, int64_t t_stride, int t_vector, const int* order,
                   const T* bias, T* y, int64_t y_stride, int inputs, int rank, int rest) {
  gemm_tile<T, Tile>(Dense<T>{t, rest, rank, t_stride, t_vector != 0}, Matrix<T>{z, z_stride, true}, inputs,
                     Output<T>{y, y_stride, order, bias});
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

template <class T>
struct LowRank {
  Device device;
  Rows<T> x, r, t;
  Vector<int> order;
  Vector<T> bias;
  int64_t out_features;
  Between<T> z;
  Tensor result;
  T* y;

  LowRank(const Tensor& input, const Tensor& first, const Tensor& second, const std::optional<Tensor>& places,
          const std::optional<Tensor>& shift)
      : device(input),
        x(input, -1, "lowrank_linear: x"),
        r(first, x.columns, "lowrank_linear: r"),
        t(second, r.rows, "lowrank_linear: t"),
        order(places, ScalarType::Int, t.rows + r.rows, "lowrank_linear: order"),
        bias(shift, scalar_type<T>, t.rows + (places ? r.rows : 0), "lowrank_linear: bias"),
        out_features(t.rows + (places ? r.rows : 0)),
        z(input, x.rows, r.rows),
        result(empty(input, shape_with_last(input, out_features), scalar_type<T>)),
        y(static_cast<T*>(result.mutable_data_ptr())) {}

  template <int kTiles>
  void decode(int64_t blocks) const {
    constexpr size_t kBytes = decode_shared_bytes<kTiles>;
    TINYCOMP_LAUNCH((lowrank_decode<T, kTiles>), dim3(blocks), dim3(kDecodeThreads), kBytes, device.stream, x.data,
                    x.stride, x.vector, r.data, r.stride, r.vector, t.data, t.stride, t.vector, order.data, bias.data, y,
                    out_features, z.data, z.stride, device.counters(), x.rows, x.columns, r.rows, t.rows);
    device.check_launch();
  }

  template <class Tile>
  void tiles() const {
    const auto grid = [&](int rows) { return dim3(ceil_div(x.rows, Tile::kM), ceil_div(rows, Tile::kN)); };
    if (r.rows > 0) {
      allow_shared_memory(lowrank_first<T, Tile>, Tile::kSharedBytes);
      TINYCOMP_LAUNCH((lowrank_first<T, Tile>), grid(r.rows), dim3(Tile::kThreads), Tile::kSharedBytes, device.stream,
                      x.data, x.stride, x.vector, r.data, r.stride, r.vector, order.data, bias.data, y, out_features,
                      z.data, z.stride, x.rows, x.columns, r.rows);
      device.check_launch();
    }
    if (t.rows > 0) {
      allow_shared_memory(lowrank_second<T, Tile>, Tile::kSharedBytes);
      TINYCOMP_LAUNCH((lowrank_second<T, Tile>), grid(t.rows), dim3(Tile::kThreads), Tile::kSharedBytes, device.stream,
                      z.data, z.stride, t.data, t.stride, t.vector, order.data ? order.data + r.rows : nullptr,
                      bias.data, y, out_features, x.rows, r.rows, t.rows);
      device.check_launch();
    }
  }
};

Tensor lowrank_linear(const Tensor& x, const Tensor& r, const Tensor& t, const std::optional<Tensor>& order,
                      const std::optional<Tensor>& bias) {
  return with_float_type(x.scalar_type(), "lowrank_linear", [&](auto zero) {
    const LowRank<decltype(zero)> op(x, r, t, order, bias);
    if (op.x.rows == 0 || op.out_features == 0) return op.result;
    const Config config = pick_config({{op.x.rows, op.x.columns, op.r.rows}, {op.x.rows, op.r.rows, op.t.rows}},
                                      op.device.processors);
    if (config.decode)
      config.row_tiles == 1 ? op.template decode<1>(config.blocks) : op.template decode<2>(config.blocks);
    else
      config.large ? op.template tiles<LargeTile>() : op.template tiles<SmallTile>();
    return op.result;
  });
}

TINYCOMP_CUDA_KERNEL(lowrank_linear, lowrank_linear)

}  // namespace tinycomp::cuda
#endif
