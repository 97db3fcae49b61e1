// What each family defines inside its ISA's own namespace. Everything in this folder lives in that namespace, so that
// a symbol compiled for AVX-512 can never stand in for the baseline's at link time (cmake/check_isa_symbols.cmake).
#pragma once
#include "../../activation.h"
#include "../../batch_norm.h"
#include "../../gemm.h"
#include "../../conv2d.h"
#include "../../cross_entropy.h"
#include "../../nll_loss.h"
#include "../../optim.h"
#include "../../packed_conv2d.h"
#include "../../pool2d.h"
#include "../../softmax.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

Status activation_forward(const ActivationParams& p);
Status activation_backward(const ActivationParams& p);
Status batch_norm_forward(const BatchNormParams& p);
Status batch_norm_backward(const BatchNormParams& p);
int64_t gemm_workspace(const GemmParams& p);
Status gemm(const GemmParams& p);
const char* gemm_algorithm(const GemmParams& p);
Status column_sum(const ColumnSumParams& p);
int64_t conv2d_workspace(const Conv2dParams& p);
Status conv2d(const Conv2dParams& p);
Status conv2d_grad_bias(const Conv2dParams& p);

Status cross_entropy_forward(const CrossEntropyParams& p);
Status cross_entropy_backward(const CrossEntropyParams& p);
Status nll_loss_forward(const NllLossParams& p);
Status nll_loss_backward(const NllLossParams& p);
Status optim_step(const OptimParams& p);
int64_t packed_conv2d_bytes(const PackedConv2dParams& p);
void packed_conv2d_pack(const PackedConv2dParams& p);
int64_t packed_conv2d_workspace(const PackedConv2dParams& p);
Status packed_conv2d(const PackedConv2dParams& p);
Status partial_norms(const NormParams& p);
Status avg_pool2d_backward(const Pool2dParams& p);
Status avg_pool2d_forward(const Pool2dParams& p);
Status max_pool2d_backward(const Pool2dParams& p);
Status max_pool2d_forward(const Pool2dParams& p);
Status max_pool2d_indices(const Pool2dParams& p);
Status softmax_forward(const SoftmaxParams& p);
Status softmax_backward(const SoftmaxParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
