// Which algorithm can compute which convolution at all: dtypes, strides and what fits the workspace.
#include "conv2d_choice.h"

namespace fastnn::cpu::choice {
namespace {

// Offsets inside an image or a kernel are kept in 32 bits by the fast algorithms.
bool fits_32_bits(const Conv2dParams& p) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t image = max64(p.input_stride_n, p.C * (p.H + 2 * p.pad_h) * (p.W + 2 * p.pad_w));
  return image < kLimit && max64(p.output_stride_n, p.K * p.P * p.Q) < kLimit;
}

bool fits_workspace(Conv2dParams p, Conv2dAlgorithm algorithm) {
  p.algorithm = algorithm;
  return conv2d_workspace(p) <= kConv2dMaxWorkspace;
}

// Every row of an image follows the one before without a gap, in both tensors.
bool rows_together(const Conv2dParams& p) {
  const bool input_apart = p.input_stride_w == 1 && p.input_stride_h == p.W;
  const bool input_together =
      p.groups == 1 && p.input_stride_c == 1 && p.input_stride_w == p.C && p.input_stride_h == p.W * p.C;
  const bool output_apart = p.output_stride_q == 1 && p.output_stride_p == p.Q;
  const bool output_together =
      p.groups == 1 && p.output_stride_k == 1 && p.output_stride_q == p.K && p.output_stride_p == p.Q * p.K;
  return (input_apart || input_together) && (output_apart || output_together);
}

// Winograd's kernels of 2x2 to 5x5, each pixel phase of a stride being a channel of its own. In the gradient of the
// input the phases are problems of their own, all of one size where the stride divides the kernel.
bool winograd_takes(const Conv2dParams& p) {
  if (p.dtype != DType::f32 || p.pad_h > p.dilation_h * (p.R - 1) || p.pad_w > p.dilation_w * (p.S - 1)) return false;
  if (dilated(p) && p.stride_h * p.stride_w > 1) return false;
  const int64_t stride = p.stride_h, taps = ceil_div(p.R, stride);
  const bool grad_input = p.pass == Conv2dPass::grad_input;
  if (stride != p.stride_w || (stride != 1 && stride != 2 && stride != 4) || p.R > 16 || p.S > 16) return false;
  if (taps < 2 || taps > 5 || taps != ceil_div(p.S, stride)) return false;
  if ((stride == 1 || grad_input) && (p.R % stride || p.S != p.R)) return false;
  // F(5x5, 2x2) weighs its points up to 16 fold: in a short sum that would show.
  return taps > 2 || (grad_input ? p.K : p.C * stride * stride) >= 12 * p.groups;
}

}  // namespace

bool takes(const Conv2dParams& p, Conv2dAlgorithm algorithm) {
  const bool channels_or_columns_dense =
      (p.input_stride_c == 1 || p.input_stride_w == 1) && (p.output_stride_k == 1 || p.output_stride_q == 1);
  switch (algorithm) {
    case Conv2dAlgorithm::reference: return true;
    case Conv2dAlgorithm::shift: return fits_32_bits(p) && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::winograd:
      return winograd_takes(p) && channels_or_columns_dense && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::depthwise:
      return p.groups == p.C && p.K == p.C && p.R * p.S <= 64 && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::gemm: return p.dtype == DType::f32 && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::batch:
      return p.dtype == DType::f32 && p.N >= 12 && p.stride_h * p.stride_w <= 16 && rows_together(p) &&
             fits_workspace(p, algorithm);
    case Conv2dAlgorithm::batch_winograd:
      return p.dtype == DType::f32 && p.N >= 12 && (p.R == 5 || (p.R == 3 && p.pass != Conv2dPass::grad_weight)) &&
             p.R == p.S && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
             p.pad_h < p.R && p.pad_w < p.S && rows_together(p) && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::aten: return true;
  }
  return false;
}

}  // namespace fastnn::cpu::choice
