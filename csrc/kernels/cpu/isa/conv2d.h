// Every convolution algorithm of this ISA, each in a file of its own.
#pragma once
#include "../../conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

Status conv2d_reference(const Conv2dParams& p);

int64_t conv2d_depthwise_workspace(const Conv2dParams& p);
Status conv2d_depthwise(const Conv2dParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
