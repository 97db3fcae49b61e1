// Where a vendor library competes with a kernel of fastnn on CUDA.
#pragma once

namespace fastnn::ops {

// True when fastnn's own kernel is to run although no measurement says that it is the faster one:
// FASTNN_CUDA_KERNELS=own in the environment, for tests and measurements.
bool own_cuda_kernels();

}  // namespace fastnn::ops
