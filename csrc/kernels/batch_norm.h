// Batch normalisation with an optional residual and ReLU behind it, forward (training and evaluation) and backward.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

// The input lies as [batch, channels, inner], or, with inner == 1, as rows of channels (channels_last: batch = N H W).
// y = act((x - mean) * invstd * weight + bias + residual), act being ReLU or nothing.
struct BatchNormParams {
  const void* input;
  const void* residual;     // forward; null for none
  void* output;             // forward
  const void* grad_output;  // backward
  const void* result;       // backward: forward's output where it ended in ReLU, else null
  void* grad_input;         // backward; null where not needed, as the three below
  void* grad_residual;
  void* grad_weight;  // [channels] of param_dtype
  void* grad_bias;
  const void* weight;  // [channels] of param_dtype; null for 1
  const void* bias;    // [channels] of param_dtype; null for 0
  void* running_mean;  // [channels] of param_dtype. Training: updated, may be null. Evaluation: read
  void* running_var;
  void* mean;  // [channels] of the accumulation type: forward writes, backward reads
  void* invstd;
  // [2][channels] of the accumulation type: scale and offset of y = (x - mean) * scale + offset. Where there, forward
  // writes them, and backward may compute the ReLU's mask from x, which it reads anyway, instead of reading result.
  void* affine;
  void* workspace;  // batch_norm_workspace() bytes, 16-byte aligned
  int64_t batch;
  int64_t channels;
  int64_t inner;
  double momentum;
  double eps;
  DType dtype;
  DType param_dtype;  // dtype, or f32 beside a 16-bit dtype
  bool training;
  bool relu;
};

// Rows whose sums are kept apart in the rows layout: a cut by shape alone, so that results do not depend on threads.
FASTNN_INLINE int64_t batch_norm_chunk_rows(int64_t rows, int64_t channels) {
  const int64_t wanted = max64(64, min64(256, 8192 / channels));
  return max64(wanted, ceil_div(rows * channels, 1 << 19));  // bounds the workspace
}

// Three arrays of coefficients, and in the rows layout up to three sums for every chunk and channel.
FASTNN_INLINE int64_t batch_norm_workspace(const BatchNormParams& p) {
  const int64_t chunks = p.inner == 1 ? ceil_div(p.batch, batch_norm_chunk_rows(p.batch, p.channels)) : 0;
  return (3 + 3 * chunks) * p.channels * (p.dtype == DType::f64 ? 8 : 4);
}

namespace cpu {
Status batch_norm_forward(const BatchNormParams& p);
Status batch_norm_backward(const BatchNormParams& p);
}  // namespace cpu

namespace cuda {
int64_t batch_norm_workspace(const BatchNormParams& p);
Status batch_norm_forward(const BatchNormParams& p, CUstream_st* stream);
Status batch_norm_backward(const BatchNormParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
