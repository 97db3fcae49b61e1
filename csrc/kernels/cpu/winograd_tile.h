// The tiles of Winograd's convolution, by the size of the kernel: F(5x5, 2x2), F(4x4, 3x3), F(3x3, 4x4), F(4x4, 5x5).
#pragma once
#include "../common.h"

namespace fastnn::cpu {

// A tile of the input is this wide and high, has so many points, and gives a tile of outputs this wide and high.
constexpr int winograd_side(int taps) { return taps == 5 ? 8 : 6; }
constexpr int winograd_points(int taps) { return winograd_side(taps) * winograd_side(taps); }
constexpr int winograd_outputs(int taps) { return winograd_side(taps) + 1 - taps; }

// Tiles along so many outputs. A dilation's phases, every so many-th of them, have tiles of their own.
constexpr int64_t winograd_tiles(int taps, int64_t outputs, int64_t dilation) {
  const int64_t phase = (outputs + dilation - 1) / dilation, side = winograd_outputs(taps);
  return dilation * ((phase + side - 1) / side);
}

}  // namespace fastnn::cpu
