// The ways to pool, from the special to the general; pool2d.cpp picks one per call.
#pragma once
#include "pool2d_axis.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// channels_last, any windows: vectors of channels.
Status max_pool2d_forward_nhwc(const Pool2dParams& p);
Status max_pool2d_backward_nhwc(const Pool2dParams& p);
Status avg_pool2d_forward_nhwc(const Pool2dParams& p);
Status avg_pool2d_backward_nhwc(const Pool2dParams& p);

// Contiguous, any windows: one output or input at a time.
Status max_pool2d_forward_any(const Pool2dParams& p);
Status max_pool2d_backward_any(const Pool2dParams& p);
Status avg_pool2d_forward_any(const Pool2dParams& p);
Status avg_pool2d_backward_any(const Pool2dParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
