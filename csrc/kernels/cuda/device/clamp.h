// The clamp at the end of a fused product or convolution.
#pragma once
#include "../../epilogue.h"
#include "dtype.h"

namespace fastnn::cuda {

template <class A>
__device__ __forceinline__ A clamp(A x, const Epilogue& e) {
  return x < A(e.low) ? A(e.low) : x > A(e.high) ? A(e.high) : x;
}

}  // namespace fastnn::cuda
