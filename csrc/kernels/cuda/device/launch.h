// Launches: launch(kernel, grid, block, shared_bytes, stream, args...) -> Status,
// and the two ways to name shared memory. nvcc builds the real thing; any other
// compiler gets tests/cuda_on_cpu, which runs the same kernels on the CPU.
#pragma once
#include "../../common.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// FASTNN_SHARED(name, float[32][33]): a block's shared variable. FASTNN_DYNAMIC_SHARED(name, float): float* to the
// bytes that the launch asked for.
#define FASTNN_SHARED(name, ...) __shared__ typename ::fastnn::Tag<__VA_ARGS__>::type name
#define FASTNN_DYNAMIC_SHARED(name, ...)                                 \
  extern __shared__ __align__(16) unsigned char fastnn_dynamic_shared[]; \
  __VA_ARGS__* const name = reinterpret_cast<__VA_ARGS__*>(fastnn_dynamic_shared)

namespace fastnn::cuda {

template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const A&... args) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  }
  if (error == cudaSuccess) return Status::ok;
  (void)cudaGetLastError();  // reported through Status: nobody should meet it again
  return Status::launch_failed;
}

// The most items that a launcher gives one launch before it cuts the problem.
constexpr int64_t longest_run() { return 0x7fffffff; }

}  // namespace fastnn::cuda
#else
#include "cuda_on_cpu.h"
#endif

namespace fastnn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A value as a type, for the lambdas that dispatch.
template <auto V>
struct Constant {
  static constexpr auto value = V;
};

// Blocks along x. More than a grid has are none, which no launch accepts: nothing is left out in silence.
constexpr int64_t kMaxBlocks = 0x7fffffff;
inline dim3 grid_of(int64_t blocks) { return dim3(blocks <= kMaxBlocks ? unsigned(blocks) : 0u); }
// The same for a kernel that strides over the blocks a grid has not.
inline dim3 grid_up_to(int64_t blocks) { return grid_of(min64(blocks, kMaxBlocks)); }

// As many blocks as keep every multiprocessor busy; the kernel strides over its items.
inline dim3 strided_grid_of(int64_t items, int threads) {
  constexpr int64_t kEnoughBlocks = 132 * 16;
  return dim3(unsigned(max64(1, min64(ceil_div(items, threads), kEnoughBlocks))));
}

}  // namespace fastnn::cuda
