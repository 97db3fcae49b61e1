// 2-D convolution and its two gradients: sizes, strides, the list of algorithms, and the choice among them.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

enum class Conv2dPass : uint8_t { forward, grad_input, grad_weight };

// One entry per way of computing a pass; cpu/conv2d_choose.cpp picks one by shape.
enum class Conv2dAlgorithm : uint8_t {
  reference,       // plain loops over strides: anything, slowly
  shift,           // a padded band of the image read at one shifted address per tap
  winograd,        // F(5x5, 2x2) to F(4x4, 5x5), strided and dilated too: a sixth to a third of the products; float32
  depthwise,       // channels in the vector lanes: one input and one output channel per group
  gemm,            // implicit GEMM: im2col rows copied straight into the GEMM's panels; float32 only
  batch,           // one image per vector lane, for batches of small images; float32 only
  batch_winograd,  // the same by F(4x4, 3x3) and F(4x4, 5x5); float32 only
  aten,            // measured: torch's own kernel is faster here
};
const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm);

// All strides count elements. A gradient has the sizes and strides of what it is the gradient of: grad_output is
// described by output_stride_*, grad_input by input_stride_*, grad_weight by weight_stride_*.
struct Conv2dParams {
  const void* input;        // [N, C, H, W]: forward, grad_weight
  const void* weight;       // [K, C / groups, R, S]: forward, grad_input
  const void* bias;         // [K] or null: forward
  const void* grad_output;  // [N, K, P, Q]: grad_input, grad_weight
  void* output;             // [N, K, P, Q]: forward
  void* grad_input;         // [N, C, H, W]: grad_input
  void* grad_weight;        // [K, C / groups, R, S]: grad_weight
  void* grad_bias;          // [K] or null: grad_weight
  void* workspace;          // 64-byte aligned, conv2d_workspace() bytes
  int64_t N, C, H, W;       // batch, input channels, height, width
  int64_t K, R, S;          // output channels, kernel height, kernel width
  int64_t P, Q;             // output height, width
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;
  int64_t weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s;
  int64_t output_stride_n, output_stride_k, output_stride_p, output_stride_q;
  DType dtype;
  Conv2dPass pass;
  Conv2dAlgorithm algorithm;
  bool tf32;  // CUDA, float32: the operands may be rounded to tf32
};

// Workspace of any pass and algorithm stays below this, whatever the batch.
constexpr int64_t kConv2dMaxWorkspace = 32 << 20;

namespace cpu {
// The algorithm for p.pass on these sizes, strides and dtype; p.algorithm and the pointers are not read.
Conv2dAlgorithm conv2d_choose(const Conv2dParams& p);
// Bytes of workspace that conv2d(p) needs for p.pass by p.algorithm with the current number of threads.
int64_t conv2d_workspace(const Conv2dParams& p);
// Runs p.pass by p.algorithm.
Status conv2d(const Conv2dParams& p);

// Strict mode never chooses Winograd, whose rounding error is larger than a plain sum's. Returns the mode before.
bool conv2d_set_strict(bool strict);
bool conv2d_strict();
// For tests and measurements: choose this algorithm wherever it takes the shape (by name; "" ends it). False when there
// is no such algorithm.
bool conv2d_force(const char* name);
// grad_bias alone, where grad_weight is not wanted.
Status conv2d_grad_bias(const Conv2dParams& p);
}  // namespace cpu

namespace cuda {
// Bytes of workspace for p.pass; p.algorithm is not read.
int64_t conv2d_workspace(const Conv2dParams& p);
Status conv2d(const Conv2dParams& p, CUstream_st* stream);
Status conv2d_grad_bias(const Conv2dParams& p, CUstream_st* stream);
// True where a group has so few channels that plain sums run instead of tiles of a matrix product.
bool conv2d_few_channels(const Conv2dParams& p);
}  // namespace cuda

}  // namespace fastnn
