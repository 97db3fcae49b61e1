// Where the taps that max pooling keeps lie: the distance from the first tap of their window.
#pragma once
#include "pool2d_axis.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// In elements, a pixel being `pixel` of them. A tap no window has lies outside every plane.
constexpr int64_t kNowhere = int64_t(1) << 62;
template <class O>
struct Distances;
template <>
struct Distances<uint8_t> {
  int64_t at[256];
  Distances(const Pool2dParams& p, int64_t pixel) {
    int64_t tap = 0;
    for (int64_t row = 0; row < p.h.kernel; ++row)
      for (int64_t column = 0; column < p.w.kernel; ++column, ++tap)
        at[tap] = (row * p.h.dilation * p.w.in + column * p.w.dilation) * pixel;
    for (; tap < 256; ++tap) at[tap] = kNowhere;
  }
  FASTNN_VEC_FN int64_t operator()(uint8_t tap) const { return at[tap]; }
};
template <>
struct Distances<int32_t> {
  uint32_t taps;
  uint64_t inverse;              // of the kernel's width, rounded up: exact for every tap; 0 stands for a width of 1
  int64_t row_end, column_step;  // from one row's last tap to the next row's first; between the columns of a row
  Distances(const Pool2dParams& p, int64_t pixel)
      : taps(uint32_t(p.h.kernel * p.w.kernel)), inverse(~uint64_t(0) / uint64_t(p.w.kernel) + 1) {
    const int64_t row_step = p.h.dilation * p.w.in * pixel;
    column_step = p.w.kernel == 1 ? row_step : p.w.dilation * pixel;
    row_end = row_step - p.w.kernel * column_step;
  }
  FASTNN_VEC_FN int64_t operator()(int32_t tap) const {
    __extension__ using uint128 = unsigned __int128;
    if (uint32_t(tap) >= taps) return kNowhere;
    return int64_t(uint128(inverse) * uint32_t(tap) >> 64) * row_end + tap * column_step;
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
