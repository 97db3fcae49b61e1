// Where a vendor library competes with a kernel of fastnn on CUDA: who runs, in one table (cuda_choice.cpp).
#pragma once
#include "common.h"

namespace fastnn::ops {

enum class CudaFamily { conv2d, depthwise_conv2d, matmul };

// True when fastnn's kernel is to run: by the table, or because FASTNN_CUDA_KERNELS=own in the environment asks for it
// wherever there is one (tests and measurements).
bool own_cuda_kernel(CudaFamily family, DType dtype);

// Why a call that own_cuda_kernel() refused is torch's, for fastnn.fallbacks().
const char* vendor_reason(CudaFamily family);

// True when torch lets float32 products on CUDA round their operands to tf32: fp32_precision or allow_tf32, of
// convolutions or of matrix products.
bool allows_tf32(CudaFamily family);

}  // namespace fastnn::ops
