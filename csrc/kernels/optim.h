// Optimizer steps over a list of tensors, all in one parallel region, with one read and one write of everything a rule
// keeps; and the two passes of gradient clipping, the norm of all gradients and their scaling.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

enum class OptimRule : uint8_t { adam, yogi, sgd, adagrad, rmsprop, adadelta, scale };

// One parameter and what belongs to it, every array `size` elements of `dtype` in the same memory order.
struct OptimTensor {
  void* param;
  const void* grad;
  // Null where an option leaves it out.
  //   adam: exp_avg, exp_avg_sq, max_exp_avg_sq (amsgrad); yogi: exp_avg, exp_avg_sq; sgd: momentum_buffer;
  //   adagrad: sum; rmsprop: square_avg, momentum_buffer, grad_avg (centered); adadelta: square_avg, acc_delta
  void* state[3];
  int64_t begin;  // elements of all tensors before this one
  int64_t size;
  double step_size;    // lr, with what depends on the parameter's age; scale: the factor
  double denom_scale;  // adam, yogi: 1 / sqrt(1 - beta2^t)
  DType dtype;
};

struct OptimParams {
  const OptimTensor* tensors;
  int64_t count;
  int64_t total;  // elements of all tensors
  OptimRule rule;
  double beta1;  // decay of the first moment; sgd, rmsprop: momentum
  double beta2;  // decay of the second moment (rmsprop: alpha, adadelta: rho); sgd: 1 - dampening
  double eps;
  double weight_decay;  // added to the gradient as weight_decay * param when not 0
  double param_scale;   // decoupled weight decay: the parameter is scaled first when this is not 1
  bool maximize;        // step along the gradient instead of against it
  bool nesterov;        // sgd
  bool first;           // sgd: the momentum buffer starts as the gradient
  bool serial;          // tensors share memory: keep torch's order of updates
  // scale on CUDA: when given, one element of the tensors' dtype; the factor is min(1, step_size / (norm + 1e-6)).
  const void* norm;
};

enum class NormKind : uint8_t { one, two, inf };

struct NormTensor {
  const void* data;
  int64_t size;
  int64_t first_chunk;  // chunks of all tensors before this one
  DType dtype;
};

constexpr int64_t kNormChunk = 1 << 14;

// The sum of |x|, of x^2, or the largest |x| of every chunk of kNormChunk elements of every tensor.
struct NormParams {
  const NormTensor* tensors;
  int64_t count;
  double* partial;  // [chunks]
  int64_t chunks;
  NormKind kind;
  void* total;  // CUDA: the norm of all tensors, one element of total_dtype
  DType total_dtype;
};

namespace cpu {
Status optim_step(const OptimParams& p);
Status partial_norms(const NormParams& p);
}  // namespace cpu

namespace cuda {
Status optim_step(const OptimParams& p, CUstream_st* stream);
// partial_norms, and what they come to.
Status total_norm(const NormParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
