// What a frozen layer calls on CUDA: a convolution with what follows it joined.
#pragma once
#include "common.h"

namespace fastnn::ops {

// How a convolution is called, besides its tensors.
struct Conv2dArguments {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// clamp(conv2d(input, weight, bias) + residual, low, high) on CUDA, in the input's memory format, without gradients: in
// one kernel where fastnn's is the choice (cuda_choice.h), else by torch's operators. nullopt where the kernels do not
// take the call.
OptTensor conv2d_epilogue(const Tensor& input, const Tensor& weight, const OptTensor& bias, const OptTensor& residual,
                          float low, float high, const Conv2dArguments& a);

}  // namespace fastnn::ops
