// Max, average and adaptive pooling over the last two dimensions, forward and backward, contiguous or channels_last.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

// One dimension of the pooling windows: window o begins at o * stride - padding and has `kernel` taps `dilation` apart.
// Adaptive windows instead run from floor(o in / out) to ceil((o + 1) in / out); `kernel` is then an upper bound.
struct PoolAxis {
  int64_t in;
  int64_t out;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

struct Pool2dParams {
  const void* input;        // forward: [N, C, H, W]
  void* output;             // forward: [N, C, OH, OW]
  const void* grad_output;  // backward: [N, C, OH, OW]
  void* grad_input;         // backward: [N, C, H, W]
  // max: tap of the window the maximum came from, row * kernel width + column, [N, C, OH, OW]; uint8, or int32 when
  // `wide`. Null in a forward without gradients.
  void* offsets;
  int64_t* indices;  // indices: flat position in the [H, W] plane, [N, C, OH, OW]
  int64_t batch;
  int64_t channels;
  PoolAxis h;
  PoolAxis w;
  int64_t divisor;  // average: 0 to divide by the window's own size
  DType dtype;
  bool wide;
  bool adaptive;
  bool channels_last;
  bool count_include_pad;
};

namespace cpu {
Status max_pool2d_forward(const Pool2dParams& p);
Status max_pool2d_backward(const Pool2dParams& p);
Status max_pool2d_indices(const Pool2dParams& p);  // offsets -> indices
Status avg_pool2d_forward(const Pool2dParams& p);
Status avg_pool2d_backward(const Pool2dParams& p);
}  // namespace cpu

namespace cuda {
Status max_pool2d_forward(const Pool2dParams& p, CUstream_st* stream);
Status max_pool2d_backward(const Pool2dParams& p, CUstream_st* stream);
Status max_pool2d_indices(const Pool2dParams& p, CUstream_st* stream);
Status avg_pool2d_forward(const Pool2dParams& p, CUstream_st* stream);
Status avg_pool2d_backward(const Pool2dParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
