// Every convolution algorithm of this ISA, each in a file of its own.
#pragma once
#include "../../conv2d.h"
#include "conv2d_problem.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

Status conv2d_reference(const Conv2dParams& p);

int64_t conv2d_depthwise_workspace(const Conv2dParams& p);
Status conv2d_depthwise(const Conv2dParams& p);
// The kernels of conv2d_depthwise_rows.cpp, where they take the shape.
bool depthwise_rows_take(const Conv2dParams& p);
void depthwise_rows(const Conv2dParams& p);
// Those of conv2d_depthwise_3x3.cpp; the gradient of the weight comes with that of the bias.
bool depthwise_3x3_grad_takes(const Conv2dParams& p);
int64_t depthwise_3x3_grad_workspace(const Conv2dParams& p);
void depthwise_3x3_grad(const Conv2dParams& p);

// grad_input of NCHW images in float32, d being the forward problem with y = grad_output.
int64_t col2im_workspace(const ConvProblem& d, int64_t workers);
void col2im_grad_input(const ConvProblem& d, float* grad_input, int64_t workers, char* workspace);

// Float32 with rows that lie together in memory, see conv2d_batch.cpp. The `count` parts share x and the
// batch, and write interleaved outputs (one part, or the phases of a strided gradient of the input).
constexpr int kMaxParts = 16;
int64_t batch_workspace(const ConvProblem* parts, int count, int64_t workers);
void batch_forward(const ConvProblem* parts, int count, int64_t workers, char* workspace);
int64_t batch_grad_workspace(const ConvProblem& d, int64_t workers);
void batch_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers, char* workspace);

// The same by Winograd's algorithm, for kernels of 3x3 and 5x5 with stride 1; see conv2d_batch_winograd.cpp.
int64_t batch_winograd_workspace(const ConvProblem& d, int64_t workers);
void batch_winograd_forward(const ConvProblem& d, int64_t workers, char* workspace);
int64_t batch_winograd_grad_workspace(const ConvProblem& d, int64_t workers);
void batch_winograd_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers,
                                char* workspace);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
