// What the losses share: class indices, the sums of a reduced loss, and the groups of threads that share a row.
#pragma once
#include "../../cross_entropy.h"
#include "online.h"

namespace fastnn::cuda {

// ---- groups --------------------------------------------------------------------------------------------------------

struct ThreadGroup {
  __device__ __forceinline__ int rank() const { return 0; }
  __device__ __forceinline__ int size() const { return 1; }
  template <class A, class Op>
  __device__ __forceinline__ A reduce(A x, A, const Op&) const {
    return x;
  }
};
struct WarpGroup {
  __device__ __forceinline__ int rank() const { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int size() const { return kWarp; }
  template <class A, class Op>
  __device__ __forceinline__ A reduce(A x, A, const Op& op) const {
    return warp_reduce(x, op);
  }
};
struct BlockGroup {
  __device__ __forceinline__ int rank() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return blockDim.x; }
  template <class A, class Op>
  __device__ __forceinline__ A reduce(A x, A identity, const Op& op) const {
    return block_reduce(x, identity, op);
  }
};

// ---- sums ----------------------------------------------------------------------------------------------------------

// A loss, and the class weights that divide a mean.
template <class A>
struct LossSums {
  A loss, weight;
};
struct AddLoss {
  template <class A>
  __device__ __forceinline__ LossSums<A> operator()(LossSums<A> a, LossSums<A> b) const {
    return {a.loss + b.loss, a.weight + b.weight};
  }
};
template <class A>
__device__ __forceinline__ LossSums<A> from_lane(LossSums<A> x, int lanes) {
  return {__shfl_xor_sync(kFullWarp, x.loss, lanes), __shfl_xor_sync(kFullWarp, x.weight, lanes)};
}

// Writes a row's loss where it belongs: to the result, or for thread 0 the block's sums to the partials.
template <class S, class P, class A>
__device__ __forceinline__ void keep_loss(const P& p, int64_t row, LossSums<A> mine, LossSums<A> block) {
  if (p.reduction == Reduction::none) {
    static_cast<S*>(p.loss)[row] = from_acc<S>(mine.loss);
  } else if (threadIdx.x == 0) {
    static_cast<A*>(p.partials)[2 * int64_t(blockIdx.x)] = block.loss;
    static_cast<A*>(p.partials)[2 * int64_t(blockIdx.x) + 1] = block.weight;
  }
}

// The sum of `count` pairs, by one block, the same on every thread.
template <class A>
__device__ __forceinline__ LossSums<double> total_loss(const A* pairs, int64_t count) {
  LossSums<double> sums{0, 0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    sums.loss += double(pairs[2 * i]);
    sums.weight += double(pairs[2 * i + 1]);
  }
  return block_reduce(sums, LossSums<double>{0, 0}, AddLoss{});
}

// ---- class indices -------------------------------------------------------------------------------------------------

// The class of a row; -1 when it does not count. An index that is no class is reported through p.out_of_range, or ends
// the kernel as torch's own assertion does when there is no such flag.
template <class P>
__device__ __forceinline__ int64_t class_of(const P& p, int64_t row) {
  const int64_t t = p.target_kind == TargetKind::uint8 ? static_cast<const uint8_t*>(p.target)[row]
                                                       : static_cast<const int64_t*>(p.target)[row];
  if (t == p.ignore_index) return -1;
  if (t >= 0 && t < p.classes) return t;
  if (p.out_of_range) *p.out_of_range = true;
  else __trap();
  return -1;
}

}  // namespace fastnn::cuda
