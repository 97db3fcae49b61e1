// What conv2d.cu has beside its matrix products: depthwise convolution by tiles, sums written out for other groups of few
// channels, and the bias gradient.
#pragma once
#include "device/clamp.h"

namespace fastnn::cuda {

template <class S>
Status direct(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream);
template <class S>
Status direct_grad_bias(const Conv2dParams& p, CUstream_st* stream);


// conv2d_depthwise.cu: whether it takes a call of any pass, its workspace, and the call.
bool depthwise_takes(const Conv2dParams& p);
int64_t depthwise_workspace(const Conv2dParams& p);
Status depthwise(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream);

// conv2d.cu: grad_weight as the sum, in their order, of p.workspace[split][output channel][(input channel, tap)], or with
// the channel varying fastest.
template <class S>
Status add_splits(const Conv2dParams& p, int64_t splits, bool channels_fastest, CUstream_st* stream);

}  // namespace fastnn::cuda
