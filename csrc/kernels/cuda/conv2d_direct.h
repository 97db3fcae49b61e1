// What conv2d.cu has beside its matrix products: sums written out, for groups of few channels, and the bias gradient.
#pragma once
#include "../conv2d.h"

namespace fastnn::cuda {

template <class S>
Status direct(const Conv2dParams& p, CUstream_st* stream);
template <class S>
Status direct_grad_bias(const Conv2dParams& p, CUstream_st* stream);

}  // namespace fastnn::cuda
