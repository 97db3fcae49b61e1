// Every convolution algorithm of this ISA, each in a file of its own.
#pragma once
#include "../../conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

Status conv2d_reference(const Conv2dParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
