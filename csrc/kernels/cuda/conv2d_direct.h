// What the convolutions share, and what conv2d.cu has beside its matrix products: depthwise convolution by tiles, sums
// written out for other groups of few channels, and the bias gradient.
#pragma once
#include "device/clamp.h"

namespace fastnn::cuda {

// Where an element lies in the input, the weight and the output, and in their gradients.
__device__ __forceinline__ int64_t input_at(const Conv2dParams& p, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * p.input_stride_n + c * p.input_stride_c + h * p.input_stride_h + w * p.input_stride_w;
}
__device__ __forceinline__ int64_t weight_at(const Conv2dParams& p, int64_t k, int64_t c, int64_t r, int64_t s) {
  return k * p.weight_stride_k + c * p.weight_stride_c + r * p.weight_stride_r + s * p.weight_stride_s;
}
__device__ __forceinline__ int64_t output_at(const Conv2dParams& p, int64_t n, int64_t k, int64_t o, int64_t q) {
  return n * p.output_stride_n + k * p.output_stride_k + o * p.output_stride_p + q * p.output_stride_q;
}

// conv2d_direct.cu
template <class S>
Status direct(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream);
template <class S>
Status direct_grad_bias(const Conv2dParams& p, CUstream_st* stream);

// conv2d_depthwise.cu: whether it takes a call of any pass, its workspace, and the call.
bool depthwise_takes(const Conv2dParams& p);
int64_t depthwise_workspace(const Conv2dParams& p);
Status depthwise(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream);

// conv2d.cu: grad_weight as the sum, in their order, of p.workspace[split][output
// channel][(input channel, tap)], or with the channel varying fastest.
template <class S>
Status add_splits(const Conv2dParams& p, int64_t splits, bool channels_fastest, CUstream_st* stream);

}  // namespace fastnn::cuda
