// Which algorithm a packed convolution takes: by its sizes and the image's layout.
#include "../conv2d.h"
#include "../packed_conv2d.h"
#include "conv2d_taps.h"
#include "winograd_tile.h"

namespace fastnn::cpu {
namespace {

// Winograd's kernels of 2x2 to 5x5, each pixel phase of a stride being a channel of its own.
bool winograd_takes(const PackedConv2dParams& p) {
  const int64_t stride = p.stride_h, taps = ceil_div(p.R, stride);
  if (stride != p.stride_w || (stride != 1 && stride != 2 && stride != 4) || p.R > 16 || p.S > 16) return false;
  if (taps < 2 || taps > 5 || taps != ceil_div(p.S, stride) || (stride == 1 && p.S != p.R)) return false;
  if (p.dilation_h * p.dilation_w > 1 && stride > 1) return false;
  return p.groups == 1 && p.pad_h <= p.dilation_h * (p.R - 1) && p.pad_w <= p.dilation_w * (p.S - 1);
}

// In multiplications, what direct and Winograd take: transforms count as 10 and 5 for every point of a tile, reading
// the transformed weight, which may have left the cache, as 4. Fitted to 15000 random layers on one thread, 4500 of
// them on AVX2, 3300 with weights that came from memory: the choice takes 3 % more than the better of the two would
// (23 % when only 3x3 and 5x5 of stride 1 went to Winograd), 11 % of the layers lose more than 5 % (47 %).
bool winograd_pays(const PackedConv2dParams& p) {
  const int64_t stride = p.stride_h, taps = ceil_div(p.R, stride), channels = p.C * stride * stride;
  if (channels < (stride == 1 ? 16 : 12)) return false;  // in a short sum the error of the points' weights would show
  const int64_t tiles = p.N * winograd_tiles(taps, p.P, p.dilation_h) * winograd_tiles(taps, p.Q, p.dilation_w);
  const int64_t c = round_up(channels, 16), k = round_up(p.K, 16);
  // More than 18 MB come from memory, at the pace of one core's reads for all of them.
  const int64_t reading = c * k > 1 << 17 ? 8 : 4;
  const int64_t direct = p.N * k * (p.C * taps_of(p) + 4 * p.P * p.Q);
  return direct > winograd_points(taps) * (tiles * (5 * channels * k / 4 + 10 * c + 5 * k) + reading * c * k);
}

// Batches to few output channels, which would leave lanes of a panel empty: conv2d takes an image per lane. Of 2000
// random layers direct took x1.9 (NCHW images) and x1.65 (NHWC) of its time; 4 and 12 % were faster by more than 7 %.
bool lanes_pay(const PackedConv2dParams& p) {
  const bool few = p.K < 16 || (p.K <= 20 && p.C > 4 && p.C < 16), filled = 4 * p.N >= 3 * 16 * ceil_div(p.N, 16);
  return p.groups == 1 && p.R * p.S > 1 && few && p.K > 1 && filled && p.C * p.R * p.S * p.K <= 1 << 14;
}

// Images in NCHW to few output channels: conv2d has columns in its lanes. From so many pixels on direct took x1.2 to
// x3.8 of conv2d's and the activation's time (2300 of 4300 random layers, one thread), before x0.5 to x0.9; the number
// of input channels does not matter.
bool planes_pay(const PackedConv2dParams& p) {
  const bool planes = p.input_stride_w == 1 && (p.input_stride_c != 1 || p.C == 1);
  return planes && p.groups == 1 && p.R * p.S > 1 && p.K < 16 && p.N * p.P * p.Q >= 128 * max64(4, p.K);
}

// Groups of channels that fill vectors, where conv2d has no Winograd for them: of ResNeXt's and RegNet's strided 3x3
// conv2d, which leaves those of NHWC images to torch, took x1.4 to x2.2 of direct's time, of eight channels x0.7 to
// x1.7.
bool groups_pay(const PackedConv2dParams& p) {
  const int64_t c = p.C / p.groups, k = p.K / p.groups;
  const bool elsewhere = p.stride_h * p.stride_w == 1 && p.R == p.S && p.R <= 5 && !conv2d_strict();
  return c >= 12 && 4 * k >= 3 * round_up(k, 16) && p.R * p.S > 1 && p.dilation_h * p.dilation_w == 1 && !elsewhere;
}

}  // namespace

PackedConv2dAlgorithm packed_conv2d_choose(const PackedConv2dParams& params) {
  using enum PackedConv2dAlgorithm;
  PackedConv2dParams p = params;
  const auto fits = [&](PackedConv2dAlgorithm algorithm) {
    p.algorithm = algorithm;
    return packed_conv2d_workspace(p) <= kPackedConv2dMaxWorkspace;
  };
  // A norm in front: over one long row of pixels.
  if (p.scale && (p.groups > 1 || p.R * p.S > 1 || p.stride_h * p.stride_w > 1 || p.pad_h || p.pad_w)) return none;
  if (p.groups > 1 && p.groups == p.C && p.K == p.C) return p.R * p.S <= 64 ? depthwise : none;
  if (p.groups > 1) return groups_pay(p) && fits(direct) ? direct : none;
  if (lanes_pay(p)) return none;
  const bool by_winograd = !conv2d_strict() && winograd_takes(p) && winograd_pays(p) && fits(winograd);
  if (planes_pay(p) && !(by_winograd && p.K >= 12)) return none;
  if (by_winograd) return winograd;
  // A border of which a fifth of all taps lie in is copied and multiplied: 28x28 by 3x3, 6 and 12 apart, x1.7 and x2 of
  // conv2d's time (one thread, 2048 channels to 256).
  const bool border = p.dilation_h * p.dilation_w > 1 && 5 * taps_of(p) < 4 * p.P * p.Q * p.R * p.S && p.C >= 64;
  return !border && fits(direct) ? direct : none;
}

}  // namespace fastnn::cpu
