// Which algorithm a packed convolution takes: by shape alone.
#include "../conv2d.h"
#include "../packed_conv2d.h"

namespace fastnn::cpu {

PackedConv2dAlgorithm packed_conv2d_choose(const PackedConv2dParams& params) {
  using enum PackedConv2dAlgorithm;
  PackedConv2dParams p = params;
  const auto fits = [&](PackedConv2dAlgorithm algorithm) {
    p.algorithm = algorithm;
    return packed_conv2d_workspace(p) <= kPackedConv2dMaxWorkspace;
  };
  // A norm in front: over one long row of pixels.
  if (p.scale && (p.groups > 1 || p.R * p.S > 1 || p.stride_h * p.stride_w > 1 || p.pad_h || p.pad_w)) return none;
  if (p.groups > 1) return p.groups == p.C && p.K == p.C && p.R * p.S <= 64 ? depthwise : none;
  const bool unit = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  const bool square = p.R == p.S && (p.R == 3 || p.R == 5);
  if (!conv2d_strict() && unit && square && p.pad_h < p.R && p.pad_w < p.R && min64(p.C, p.K) >= 16) {
    const int64_t out = 7 - p.R, tiles = p.N * ceil_div(p.P, out) * ceil_div(p.Q, out);
    const bool fewer = 2 * p.N * p.P * p.Q * p.R * p.S >= 3 * 36 * tiles;
    // Beside few tiles, reading the transformed weight takes longer than the multiplications it saves.
    if (fewer && tiles >= 12 && fits(winograd)) return winograd;
  }
  return fits(direct) ? direct : none;
}

}  // namespace fastnn::cpu
