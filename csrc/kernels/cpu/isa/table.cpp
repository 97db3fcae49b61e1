// This ISA's row of the dispatch table.
#include "../table.h"

#include "isa.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

extern const KernelTable table;
const KernelTable table = {
    .isa = FASTNN_ISA_NAME,
    .activation_forward = activation_forward,
    .activation_backward = activation_backward,
    .batch_norm_forward = batch_norm_forward,
    .batch_norm_backward = batch_norm_backward,
    .gemm_workspace = gemm_workspace,
    .gemm = gemm,
    .gemm_algorithm = gemm_algorithm,
    .column_sum = column_sum,
    .conv2d_workspace = conv2d_workspace,
    .conv2d = conv2d,
    .conv2d_grad_bias = conv2d_grad_bias,
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward,
    .nll_loss_forward = nll_loss_forward,
    .nll_loss_backward = nll_loss_backward,
    .optim_step = optim_step,
    .packed_conv2d_bytes = packed_conv2d_bytes,
    .packed_conv2d_pack = packed_conv2d_pack,
    .packed_conv2d_workspace = packed_conv2d_workspace,
    .packed_conv2d = packed_conv2d,
    .partial_norms = partial_norms,
    .avg_pool2d_backward = avg_pool2d_backward,
    .avg_pool2d_forward = avg_pool2d_forward,
    .max_pool2d_backward = max_pool2d_backward,
    .max_pool2d_forward = max_pool2d_forward,
    .max_pool2d_indices = max_pool2d_indices,
    .softmax_forward = softmax_forward,
    .softmax_backward = softmax_backward,
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
