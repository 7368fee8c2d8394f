// product_tiles for sm_100a: tensor copies (TMA) into three stages, products into tensor memory (tcgen05) out of them.
//
// A block makes a tile of 128 inputs by 128 rows of the weight. One thread starts the copies, one the products; all
// four warps then fetch the sums. Two blocks fit on a processor: one multiplies while the other stores. Its arithmetic
// is executed by the emulation, its machine code has been inspected, and it has run on no GPU: it is off unless
// TINYCOMP_TMA=1 asks for it on a GPU of compute capability 10.0.
#include "linear.cuh"
#include "ptx_sm100.cuh"

namespace tinycomp::cuda {

struct TensorTile {
  static constexpr int kM = 128, kN = 128, kThreads = 128, kStages = 3, kColumns = ptx::kBoxColumns;
  static constexpr int kOperandBytes = 128 * 128, kStageBytes = 2 * kOperandBytes;
  static constexpr size_t kSharedBytes = size_t(kStages) * kStageBytes;
};

template <class T>
__global__ void __launch_bounds__(TensorTile::kThreads)
    product_tcgen05(const __grid_constant__ ptx::TensorMap x_map, const __grid_constant__ ptx::TensorMap w_map,
                    TINYCOMP_OUTPUT(o, T), int inputs, int rows, int columns) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(TINYCOMP_EMULATION)
  using Tile = TensorTile;
  TINYCOMP_SHARED_MEMORY(char, unaligned);
  __shared__ uint64_t full[Tile::kStages], empty[Tile::kStages], done;
  __shared__ unsigned where;
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 1023);
  const Output<T> out TINYCOMP_OUTPUT_NAMES(o);
  const int first_input = blockIdx.x * Tile::kM, first_row = blockIdx.y * Tile::kN, warp = threadIdx.x / 32;
  const int steps = (columns + Tile::kColumns - 1) / Tile::kColumns;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) ptx::barrier_init(&full[s]), ptx::barrier_init(&empty[s]);
    ptx::barrier_init(&done);
    ptx::fence_async();
  }
  if (warp == 1) ptx::tensor_allocate<Tile::kN>(&where);
  ptx::tensor_fence_before();
  __syncthreads();
  ptx::tensor_fence_after();
  const unsigned sums = where;
  if (threadIdx.x == 0) {
    for (int step = 0; step < steps; ++step) {
      const int s = step % Tile::kStages, round = step / Tile::kStages;
      char* at = shared + s * Tile::kStageBytes;
      if (round > 0) ptx::wait_barrier(&empty[s], (round - 1) & 1);
      ptx::expect_bytes(&full[s], Tile::kStageBytes);
      ptx::copy_box(at, x_map, step * Tile::kColumns, first_input, &full[s]);
      ptx::copy_box(at + Tile::kOperandBytes, w_map, step * Tile::kColumns, first_row, &full[s]);
    }
  } else if (threadIdx.x == 32) {
    for (int step = 0; step < steps; ++step) {
      const int s = step % Tile::kStages;
      const unsigned at = ptx::shared_address(shared) + s * Tile::kStageBytes;
      ptx::wait_barrier(&full[s], step / Tile::kStages & 1);
      ptx::tensor_fence_after();
#pragma unroll
      for (int k = 0; k < Tile::kColumns / 16; ++k)
        ptx::tensor_multiply<T, Tile::kN>(sums, ptx::tensor_operand(at + 32 * k),
                                          ptx::tensor_operand(at + Tile::kOperandBytes + 32 * k), step + k > 0);
      ptx::tensor_commit(&empty[s]);
    }
    ptx::tensor_commit(&done);
  }
  __syncwarp();
  ptx::wait_barrier(&done, 0);
  ptx::tensor_fence_after();
  // A thread holds an input of the tile: stores of 16 bytes, eight threads of a warp in all banks.
  constexpr int kStride = Tile::kN + 4;
  static_assert(sizeof(float) * Tile::kM * kStride <= Tile::kSharedBytes);
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll 1
  for (int n = 0; n < Tile::kN; n += 32) {
    float values[32];
    ptx::tensor_load(values, sums + (32 * warp << 16) + n);
    ptx::tensor_wait();
#pragma unroll
    for (int i = 0; i < 32; i += 4)
      *reinterpret_cast<float4*>(tile + threadIdx.x * kStride + n + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  }
  ptx::tensor_fence_before();
  __syncthreads();
  ptx::tensor_fence_after();
  if (warp == 1) ptx::tensor_free<Tile::kN>(sums);
  store_shared_tile<Tile, kStride>(tile, first_input, first_row, inputs, rows, out);
#endif
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "tensor_map.cuh"

namespace tinycomp::cuda {

template <class T>
void launch_tcgen05(const Device& device, const Matrix<T>& x, const Storage& w, const Output<T>& o, int inputs) {
  launch_on_boxes<TensorTile>(product_tcgen05<T>, device, x, w, o, inputs);
}
template void launch_tcgen05<bf16>(const Device&, const Matrix<bf16>&, const Storage&, const Output<bf16>&, int);
template void launch_tcgen05<f16>(const Device&, const Matrix<f16>&, const Storage&, const Output<f16>&, int);

}  // namespace tinycomp::cuda
#endif
