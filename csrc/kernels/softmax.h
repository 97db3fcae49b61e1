// Softmax and log-softmax, forward and backward: the smallest family, and the one to copy when adding another.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

struct SoftmaxParams {
  const void* input;        // forward: [outer, classes, inner]
  void* output;             // forward: the same shape
  const void* grad_output;  // backward: the same shape
  const void* result;       // backward: what forward returned
  void* grad_input;         // backward: the same shape
  int64_t outer;
  int64_t classes;
  int64_t inner;
  DType dtype;
  bool log;  // log_softmax instead of softmax
};

namespace cpu {
Status softmax_forward(const SoftmaxParams& p);
Status softmax_backward(const SoftmaxParams& p);
}  // namespace cpu

namespace cuda {
Status softmax_forward(const SoftmaxParams& p, CUstream_st* stream);
Status softmax_backward(const SoftmaxParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
