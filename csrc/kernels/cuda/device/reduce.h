// Reductions over a warp and over a block, in an order fixed by the shape: the same bits on every run.
#pragma once
#include "dtype.h"

namespace fastnn::cuda {

struct Add {
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return max_of(a, b);
  }
};

// A value from the lane whose number differs in the bits of `lanes`; a struct brings its own overload.
template <class A>
__device__ __forceinline__ A from_lane(A x, int lanes) {
  return __shfl_xor_sync(kFullWarp, x, lanes);
}

// Every lane of the warp gets the result.
template <class A, class Op>
__device__ __forceinline__ A warp_reduce(A x, const Op& op) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = op(x, from_lane(x, lanes));
  return x;
}

// Every thread of a one-dimensional block of at most 1024 threads gets the result. All threads must call it.
template <class A, class Op>
__device__ __forceinline__ A block_reduce(A x, A identity, const Op& op) {
  FASTNN_SHARED(partial, A[kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_reduce(x, op);
  __syncthreads();  // an earlier reduction may still be read
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_reduce(lane < warps ? partial[lane] : identity, op);
}

}  // namespace fastnn::cuda
