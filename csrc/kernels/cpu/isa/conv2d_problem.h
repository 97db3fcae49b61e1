// One group of a convolution as the algorithms see it: y = conv(x, weight) + bias, every tensor by its strides, so that
// both layouts, groups, and the gradient of the input (a convolution with the weight flipped) are the same problem.
#pragma once
#include "../../common.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

struct ConvProblem {
  const void* x;  // [n, c, h, w]
  int64_t xn, xc, xh, xw;
  int64_t n, c, h, w;
  const void* weight;  // [k, c, r, s]
  int64_t wk, wc, wr, ws;
  int64_t r, s;
  const void* bias;  // [k] or null
  void* y;           // [n, k, p, q]
  int64_t yn, yk, yh, yw;
  int64_t k, p, q;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

// Each algorithm: the bytes of workspace it wants for `workers` threads, and the run with that many. Results do not
// depend on `workers`. S is the storage type; Winograd is float32 only.
template <class S>
int64_t shift_workspace(const ConvProblem& d, int64_t workers);
template <class S>
void shift_forward(const ConvProblem& d, int64_t workers, char* workspace);

// weight and bias are outputs here: the gradients from y = grad_output. grad_bias may be null.
template <class S>
int64_t shift_grad_workspace(const ConvProblem& d, int64_t workers);
template <class S>
void shift_grad_weight(const ConvProblem& d, S* grad_weight, S* grad_bias, int64_t workers, char* workspace);

// float32 only; the gradient of the bias is not its business.
int64_t gemm_conv_workspace(const ConvProblem& d, int64_t workers);
void gemm_conv_forward(const ConvProblem& d, int64_t workers, char* workspace);
int64_t gemm_conv_grad_workspace(const ConvProblem& d, int64_t workers);
void gemm_conv_grad_weight(const ConvProblem& d, float* grad_weight, int64_t workers, char* workspace);

// gemm_conv_forward() of few input channels in NCHW.
bool few_channels_takes(const ConvProblem& d);
void few_channels_forward(const ConvProblem& d);

// All groups of a pointwise layer at once where they are small, of dense NHWC images; d is the first group, the weights
// of the next lie weight_step further.
bool small_groups_takes(const ConvProblem& d, int64_t groups);
int64_t small_groups_workspace(const ConvProblem& d, int64_t groups);
void small_groups_forward(const ConvProblem& d, int64_t groups, int64_t weight_step, char* workspace);

// small_groups_forward() of groups with few results, or few channels, and many of the other.
bool thin_groups_takes(const ConvProblem& d, int64_t groups);
int64_t thin_groups_workspace(const ConvProblem& d, int64_t groups);
void thin_groups_forward(const ConvProblem& d, int64_t groups, int64_t weight_step, char* workspace);

// gemm_conv_forward() of few output pixels.
bool few_pixels_takes(const ConvProblem& d);
int64_t few_pixels_workspace(const ConvProblem& d);
void few_pixels_forward(const ConvProblem& d, char* workspace);

int64_t winograd_workspace(const ConvProblem& d, int64_t workers);
void winograd_forward(const ConvProblem& d, int64_t workers, char* workspace);
int64_t winograd_grad_workspace(const ConvProblem& d, int64_t workers);
void winograd_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers, char* workspace);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
