// Every convolution algorithm of this ISA, each in a file of its own.
#pragma once
#include "../../conv2d.h"
#include "conv2d_problem.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

Status conv2d_reference(const Conv2dParams& p);

int64_t conv2d_depthwise_workspace(const Conv2dParams& p);
Status conv2d_depthwise(const Conv2dParams& p);

// grad_input of NCHW images in float32, d being the forward problem with y = grad_output.
int64_t col2im_workspace(const ConvProblem& d, int64_t workers);
void col2im_grad_input(const ConvProblem& d, float* grad_input, int64_t workers, char* workspace);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
