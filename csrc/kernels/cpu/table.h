// One table of kernels per ISA, and the choice among them: the only list every family adds a line to.
#pragma once
#include "../activation.h"
#include "../batch_norm.h"
#include "../gemm.h"
#include "../conv2d.h"
#include "../cross_entropy.h"
#include "../nll_loss.h"
#include "../optim.h"
#include "../packed_conv2d.h"
#include "../pool2d.h"
#include "../softmax.h"

namespace fastnn::cpu {

struct KernelTable {
  const char* isa;  // compiled into the table's own objects, so it proves which code runs
  Status (*activation_forward)(const ActivationParams&);
  Status (*activation_backward)(const ActivationParams&);
  Status (*batch_norm_forward)(const BatchNormParams&);
  Status (*batch_norm_backward)(const BatchNormParams&);
  int64_t (*gemm_workspace)(const GemmParams&);
  Status (*gemm)(const GemmParams&);
  const char* (*gemm_algorithm)(const GemmParams&);
  Status (*column_sum)(const ColumnSumParams&);
  int64_t (*conv2d_workspace)(const Conv2dParams&);
  Status (*conv2d)(const Conv2dParams&);
  Status (*conv2d_grad_bias)(const Conv2dParams&);
  Status (*cross_entropy_forward)(const CrossEntropyParams&);
  Status (*cross_entropy_backward)(const CrossEntropyParams&);
  Status (*nll_loss_forward)(const NllLossParams&);
  Status (*nll_loss_backward)(const NllLossParams&);
  Status (*optim_step)(const OptimParams&);
  int64_t (*packed_conv2d_bytes)(const PackedConv2dParams&);
  void (*packed_conv2d_pack)(const PackedConv2dParams&);
  int64_t (*packed_conv2d_workspace)(const PackedConv2dParams&);
  Status (*packed_conv2d)(const PackedConv2dParams&);
  Status (*partial_norms)(const NormParams&);
  Status (*avg_pool2d_backward)(const Pool2dParams&);
  Status (*avg_pool2d_forward)(const Pool2dParams&);
  Status (*max_pool2d_backward)(const Pool2dParams&);
  Status (*max_pool2d_forward)(const Pool2dParams&);
  Status (*max_pool2d_indices)(const Pool2dParams&);
  Status (*softmax_forward)(const SoftmaxParams&);
  Status (*softmax_backward)(const SoftmaxParams&);
};

const KernelTable& kernels();

// The name of the i-th ISA this build has and this CPU runs, fastest first; null past the last.
const char* usable_isa(int i);
// Makes `name` the active ISA; false (and no change) when it is unknown, was not compiled in, or this CPU lacks it.
bool set_isa(const char* name);

}  // namespace fastnn::cpu
