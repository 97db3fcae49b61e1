// Convolution for inference on a packed weight, in NHWC, with what follows it: bias, a residual, a clamp. float32 only.
#pragma once
#include "common.h"

namespace fastnn {

enum class PackedConv2dAlgorithm : uint8_t {
  none,       // not taken: the caller uses conv2d
  direct,     // a matrix product whose rows are read from the image in place
  winograd,   // kernels of 2x2 to 5x5, dilated ones, or a stride's phases of them, the weight transformed once
  depthwise,  // one input and one output channel per group
};

struct PackedConv2dParams {
  const float* input;     // [N, H, W, C] by its strides
  const float* weight;    // [K, C / groups, R, S] by its strides: pack
  const float* bias;      // [K] or null: pack
  float* packed;          // 64-byte aligned, packed_conv2d_bytes(): written by pack, read by run
  const float* scale;     // [C] or null; where given, with shift, the input is relu(scale * input + shift): direct, 1x1
  const float* shift;     // [C] or null
  const float* residual;  // [N, P, Q, K] by its strides, or null
  float* output;          // [N, P, Q, K] by its strides
  void* workspace;        // 64-byte aligned, packed_conv2d_workspace() bytes
  int64_t N, C, H, W, K, R, S, P, Q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;
  int64_t weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s;
  int64_t output_stride_n, output_stride_h, output_stride_w;        // channels lie side by side
  int64_t residual_stride_n, residual_stride_h, residual_stride_w;  // here too
  float low, high;                                                  // the output is clamped to these (NaN stays)
  PackedConv2dAlgorithm algorithm;
};

constexpr int64_t kPackedConv2dMaxWorkspace = 32 << 20;

namespace cpu {
// The algorithm for these sizes and input_stride_c and _w, no Winograd if conv2d_strict(); other strides, pointers and
// thread counts are not read.
PackedConv2dAlgorithm packed_conv2d_choose(const PackedConv2dParams& p);
// Bytes of p.packed, a function of the weight's sizes, the algorithm and the ISA. What it holds depends on the image's
// layout too: by input_stride_w == 1, Winograd orders a stride's phases.
int64_t packed_conv2d_bytes(const PackedConv2dParams& p);
void packed_conv2d_pack(const PackedConv2dParams& p);
int64_t packed_conv2d_workspace(const PackedConv2dParams& p);
Status packed_conv2d(const PackedConv2dParams& p);
}  // namespace cpu

}  // namespace fastnn
