// Online softmax: the maximum of a row and the sum of exp(x - maximum) in one pass.
#pragma once
#include "reduce.h"

namespace fastnn::cuda {

// The running maximum and the sum of exp(x - maximum) below it.
template <class A>
struct Online {
  A max, sum;

  // A term equal to the maximum counts 1, without exp: -inf - -inf would be NaN.
  __device__ __forceinline__ void add(A x) {
    const A m = max_of(max, x);
    sum = (max == m ? sum : sum * exp_of(max - m)) + (x == m ? A(1) : exp_of(x - m));
    max = m;
  }
  // What stands for the denominator. As when every term is exp(x - max): an infinite maximum makes it NaN.
  __device__ __forceinline__ A denominator() const { return max == kInf<A> ? max - max : sum; }
};
template <class A>
constexpr Online<A> kNothing{-kInf<A>, A(0)};

struct Merge {
  template <class A>
  __device__ __forceinline__ Online<A> operator()(Online<A> a, Online<A> b) const {
    const A m = max_of(a.max, b.max);
    return {m, (a.max == m ? a.sum : a.sum * exp_of(a.max - m)) + (b.max == m ? b.sum : b.sum * exp_of(b.max - m))};
  }
};
template <class A>
__device__ __forceinline__ Online<A> from_lane(Online<A> x, int lanes) {
  return {__shfl_xor_sync(kFullWarp, x.max, lanes), __shfl_xor_sync(kFullWarp, x.sum, lanes)};
}

}  // namespace fastnn::cuda
