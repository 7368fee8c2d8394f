// product_tiles for sm_90a: tensor copies (TMA) into four stages, products of warp groups (wgmma) out of them.
//
// Two warp groups make a tile of 128 inputs by 128 rows of the weight; a thread that waits for nothing else starts the
// copies. Its arithmetic is executed by the emulation, its machine code has been inspected, and it has run on no GPU:
// it is off unless TINYCOMP_TMA=1 asks for it on a GPU of compute capability 9.0.
#include "linear.cuh"
#include "ptx_sm90.cuh"

namespace tinycomp::cuda {

struct WgmmaTile {
  static constexpr int kM = 128, kN = 128, kWarpsM = 8, kWarpsN = 1, kThreads = 256, kStages = 4,
                       kColumns = ptx::kBoxColumns;
  static constexpr int kOperandBytes = 128 * 128, kStageBytes = 2 * kOperandBytes;
  static constexpr size_t kSharedBytes = size_t(kStages) * kStageBytes;
};

template <class T>
__global__ void __launch_bounds__(WgmmaTile::kThreads)
    product_wgmma(const __grid_constant__ ptx::TensorMap x_map, const __grid_constant__ ptx::TensorMap w_map,
                  TINYCOMP_OUTPUT(o, T), int inputs, int rows, int columns) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(TINYCOMP_EMULATION)
  using Tile = WgmmaTile;
  TINYCOMP_SHARED_MEMORY(char, unaligned);
  __shared__ uint64_t full[Tile::kStages];
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 1023);
  const Output<T> out TINYCOMP_OUTPUT_NAMES(o);
  const int first_input = blockIdx.x * Tile::kM, first_row = blockIdx.y * Tile::kN;
  const int steps = (columns + Tile::kColumns - 1) / Tile::kColumns;
  const auto load = [&](int step) {
    if (threadIdx.x != 0 || step >= steps) return;
    char* at = shared + step % Tile::kStages * Tile::kStageBytes;
    uint64_t* barrier = &full[step % Tile::kStages];
    ptx::expect_bytes(barrier, Tile::kStageBytes);
    ptx::copy_box(at, x_map, step * Tile::kColumns, first_input, barrier);
    ptx::copy_box(at + Tile::kOperandBytes, w_map, step * Tile::kColumns, first_row, barrier);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) ptx::barrier_init(&full[s]);
    ptx::fence_async();
  }
  __syncthreads();
  for (int s = 0; s < Tile::kStages; ++s) load(s);
  float sums[1][16][4] = {};
  for (int step = 0; step < steps; ++step) {
    const unsigned at = ptx::shared_address(shared) + step % Tile::kStages * Tile::kStageBytes;
    ptx::wait_barrier(&full[step % Tile::kStages], step / Tile::kStages & 1);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kColumns / 16; ++k)
      ptx::wgmma(T{}, sums[0], ptx::operand(at + threadIdx.x / 128 * Tile::kOperandBytes / 2 + 32 * k),
                 ptx::operand(at + Tile::kOperandBytes + 32 * k));
    ptx::wgmma_commit();
    // Everybody's products of the step before are done: its stage is free.
    ptx::wgmma_wait<1>();
    __syncthreads();
    if (step > 0) load(step - 1 + Tile::kStages);
  }
  ptx::wgmma_wait<0>();
  __syncthreads();
  store_tile<Tile>(sums, reinterpret_cast<float*>(shared), first_input, first_row, inputs, rows, out);
#endif
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "tensor_map.cuh"

namespace tinycomp::cuda {

template <class T>
void launch_wgmma(const Device& device, const Matrix<T>& x, const Storage& w, const Output<T>& o, int inputs) {
  launch_on_boxes<WgmmaTile>(product_wgmma<T>, device, x, w, o, inputs);
}
template void launch_wgmma<bf16>(const Device&, const Matrix<bf16>&, const Storage&, const Output<bf16>&, int);
template void launch_wgmma<f16>(const Device&, const Matrix<f16>&, const Storage&, const Output<f16>&, int);

}  // namespace tinycomp::cuda
#endif
