// CUDA convolutions and matrix products with what follows them joined: nothing of the output's size is read again.
#pragma once
#include "conv2d.h"
#include "gemm.h"

namespace fastnn {

// y = clamp(sum + bias + residual); NaN stays NaN.
struct Epilogue {
  const void* bias;      // products: [n], dense, or null (a convolution has its own in Conv2dParams)
  const void* residual;  // convolutions: [N, K, P, Q] with the output's strides, or null (a product has D)
  bool clamps;
  float low, high;
};

namespace cuda {
// conv2d(p, stream) and gemm(p, stream) are these with nothing behind the sum. Of a convolution, the forward pass
// alone.
Status conv2d(const Conv2dParams& p, const Epilogue& epilogue, CUstream_st* stream);
Status gemm(const GemmParams& p, const Epilogue& epilogue, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
