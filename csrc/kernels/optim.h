// Optimizer steps over a list of tensors, all in one parallel region: one read and one write of everything a rule
// keeps.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

enum class OptimRule : uint8_t { adam, sgd };

// One parameter and what belongs to it, every array `size` elements of `dtype` in the same memory order.
struct OptimTensor {
  void* param;
  const void* grad;
  void* state[3];  // adam: exp_avg, exp_avg_sq, max_exp_avg_sq (amsgrad); sgd: momentum_buffer (null without momentum)
  int64_t begin;   // elements of all tensors before this one
  int64_t size;
  double step_size;    // adam: lr / (1 - beta1^t); sgd: lr
  double denom_scale;  // adam: 1 / sqrt(1 - beta2^t)
  DType dtype;
};

struct OptimParams {
  const OptimTensor* tensors;
  int64_t count;
  int64_t total;  // elements of all tensors
  OptimRule rule;
  double beta1;         // adam; sgd: momentum
  double beta2;         // adam; sgd: 1 - dampening
  double eps;           // adam
  double weight_decay;  // added to the gradient as weight_decay * param when not 0
  double param_scale;   // decoupled weight decay: the parameter is scaled first when this is not 1
  bool maximize;        // step along the gradient instead of against it
  bool nesterov;        // sgd
  bool first;           // sgd: the momentum buffer starts as the gradient
  bool serial;          // tensors share memory: keep torch's order of updates
};

namespace cpu {
Status optim_step(const OptimParams& p);
}  // namespace cpu

namespace cuda {
Status optim_step(const OptimParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
