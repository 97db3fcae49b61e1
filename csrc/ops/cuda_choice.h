// Where a vendor library competes with a kernel of fastnn on CUDA: who runs, by one table (cuda_choice.cpp) or, inside
// fastnn.autotune(), by a measurement.
#pragma once
#include <c10/util/FunctionRef.h>

#include "common.h"

namespace fastnn::ops {

enum class CudaFamily { conv2d, depthwise_conv2d, matmul };

// A call that either could run, by all that its speed depends on. Undefined tensors are absent arguments.
struct CudaCall {
  CudaFamily family;
  const char* op;                                // a gradient with its name
  std::initializer_list<const Tensor*> tensors;  // the first has the call's dtype and device
  at::IntArrayRef options = {};
};

struct CudaChoice {
  bool own;
  const char* reason;  // where it is the vendor's, for fastnn.fallbacks()
};

// Who runs a call: who is being timed; fastnn where FASTNN_CUDA_KERNELS=own in the environment asks for it (tests and
// measurements); who was faster, inside fastnn.autotune(); the table. `run` calls the op again on the same arguments,
// to be timed both ways.
CudaChoice choose_cuda(const CudaCall& call, c10::function_ref<void()> run);

// True when torch lets float32 products on CUDA round their operands to tf32: fp32_precision or allow_tf32, of
// convolutions or of matrix products.
bool allows_tf32(CudaFamily family);

}  // namespace fastnn::ops
