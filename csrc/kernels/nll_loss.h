// Negative log likelihood: picks each row's log-probability at its class index.
#pragma once
#include "cross_entropy.h"

struct CUstream_st;

namespace fastnn {

struct NllLossParams {
  const void* input;        // forward: log-probabilities [n, classes, height, width] with the strides below
  const void* target;       // [outer, inner] class indices
  const void* weight;       // [classes] of input's type, or null
  void* loss;               // forward: [outer, inner] without reduction, one element otherwise
  void* total_weight;       // forward writes, backward reads: one accumulator, the divisor of a mean
  bool* out_of_range;       // forward: set when a class index is neither ignore_index nor in [0, classes)
  const void* grad_output;  // backward: like loss
  void* grad_input;         // backward: [outer, classes, inner]
  int64_t outer;
  int64_t classes;
  int64_t inner;
  int64_t height, width;  // forward: the rows again, outer * inner = n * height * width
  int64_t x_stride_n, x_stride_class, x_stride_h, x_stride_w;
  int64_t ignore_index;
  TargetKind target_kind;  // int64 or uint8
  Reduction reduction;
  DType dtype;
};

namespace cpu {
Status nll_loss_forward(const NllLossParams& p);
Status nll_loss_backward(const NllLossParams& p);
}  // namespace cpu

namespace cuda {
// A class index out of range ends the kernel when p.out_of_range is null.
Status nll_loss_forward(const NllLossParams& p, CUstream_st* stream);
Status nll_loss_backward(const NllLossParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
