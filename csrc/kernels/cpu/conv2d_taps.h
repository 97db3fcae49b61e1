// Taps of a convolution's kernel that lie within the image, for the choice between algorithms.
#pragma once
#include "../common.h"

namespace fastnn::cpu {

// Along one side, over all its outputs, which are `stride` apart; the taps of one are `dilation` apart.
inline int64_t taps_inside(int64_t outputs, int64_t size, int64_t taps, int64_t stride, int64_t dilation, int64_t pad) {
  int64_t count = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t shift = t * dilation - pad;
    const int64_t first = shift < 0 ? ceil_div(-shift, stride) : 0;
    const int64_t last = size > shift ? min64(outputs, ceil_div(size - shift, stride)) : 0;
    count += max64(0, last - first);
  }
  return count;
}

// Of all pixels of a plane. Those of a dilated kernel in the padding, which torch leaves out, do not count: they are
// half of them where 3x3 reaches as far as the plane is wide.
template <class Params>
int64_t taps_of(const Params& p) {
  if (p.dilation_h * p.dilation_w == 1) return p.P * p.Q * p.R * p.S;
  return taps_inside(p.P, p.H, p.R, p.stride_h, p.dilation_h, p.pad_h) *
         taps_inside(p.Q, p.W, p.S, p.stride_w, p.dilation_w, p.pad_w);
}

}  // namespace fastnn::cpu
