// What groups change of the choice, and depthwise layers.
#include "conv2d_choice.h"
#include "conv2d_taps.h"

namespace fastnn::cpu::choice {

namespace {

// The kernels of (packed_)conv2d_depthwise_3x3.cpp, ahead of torch in every pass: from 1x1 images to 300x300, of 16 to
// 1024 channels, x1.2 to x10 (Zen 4, one thread).
bool depthwise_3x3(const Conv2dParams& p, const Shape& s) {
  if (!s.together || p.R != 3 || p.S != 3 || p.C < 16) return false;
  if (p.dilation_h * p.dilation_w != 1 || p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.pass != Conv2dPass::grad_input) return true;
  return p.stride_h == 1 ? p.pad_h <= 2 && p.pad_w <= 2 : p.pad_h == 1 && p.pad_w == 1;
}

}  // namespace

// One input channel to one output channel.
Conv2dAlgorithm best_depthwise(const Conv2dParams& p, const Shape& s) {
  using enum Conv2dAlgorithm;
  if (p.dtype != DType::f32 || depthwise_3x3(p, s)) return depthwise;
  const int64_t products = s.pixels * p.C * s.taps;
  if (p.N * p.C >= 8192 && p.P * p.Q <= 16) return aten;  // many tiny planes: ours took 1.2 to 3 times torch's time
  if (s.together) {
    const bool unit = p.stride_h == 1 && p.stride_w == 1, small = p.N * p.H * p.W <= 28 * 28 && s.taps <= 25;
    // Kernels whose sums share what they load: over a grid of layers torch took x1.15 (335 layers, AVX-512) and x1.35
    // (258, AVX2) of their time. Its strided ones of many channels read larger inputs faster.
    const bool wide = p.S == 3 || p.S == 5 || (p.S == 7 && unit), far = p.N * p.C * p.H * p.W > 1 << 20;
    const bool shares = p.dilation_w == 1 && wide && p.stride_w <= 2 && (unit || !far || p.C < 384);
    const bool own = p.pass == Conv2dPass::forward ? shares || small || products <= 1 << 20
                     : p.pass == Conv2dPass::grad_input
                         ? (unit && (shares || small)) || products <= (unit ? 1 << 22 : 1 << 17)
                         : s.taps >= 25 || products <= 1 << 17;
    return own ? depthwise : aten;
  }
  const bool has_rows = (p.R == 3 || p.R == 5) && p.R == p.S && p.dilation_h == 1 && p.dilation_w == 1 &&
                        2 * p.pad_w == p.S - 1 && p.P * p.Q > 4;
  if (has_rows || p.N < 16) return depthwise;
  if (s.taps == 1) return products <= (p.pass == Conv2dPass::forward ? 100000 : 16384) ? shift : aten;
  if (!takes(p, batch) || p.C > (p.pass == Conv2dPass::grad_weight ? 192 : 128)) return aten;
  switch (p.pass) {
    case Conv2dPass::forward: return products <= 100000 && p.C > 28 ? depthwise : products <= 4000000 ? batch : aten;
    case Conv2dPass::grad_input: return p.C <= 6 || s.taps > 16 ? batch : depthwise;
    case Conv2dPass::grad_weight: return s.pixels <= 96 ? depthwise : batch;
  }
  return aten;
}

namespace {

// Winograd for groups of fewer channels than shape_of() asks for, whose matrices the others find too small as well. Of
// 1190 random layers (one thread; kernels of 2, 3 and 5) its time was 1/1.44 of the choice before forward, 1/1.27 for
// the input's gradient and 1/1.79 for the weight's, channels_last 1/1.69, 1/1.62 and 1/1.41; 5 to 17 % of them lost
// more than 7 %, nearly all of those still ahead of torch.
bool groups_by_winograd(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  if (p.stride_h != 1 || !may_be_winograd(p) || !fills_tiles(p)) return false;
  const int64_t matrix = s.c * s.k, tiles = tiles_of(p);
  if (!s.together) return matrix >= 64 && chosen != Conv2dAlgorithm::batch;
  switch (p.pass) {
    case Conv2dPass::forward: return min64(s.c, s.k) >= 4 && (s.c >= 8 || tiles <= 50);
    case Conv2dPass::grad_input: return min64(s.c, s.k) >= 4 && (matrix >= 64 || tiles <= 40);
    case Conv2dPass::grad_weight:
      if (p.R == 5 && s.c >= 8) return true;  // of eight channels torch took x1.1 to x1.65 of its time
      return (s.c >= 12 && tiles > 4) || (s.c >= 8 && tiles <= 38 && s.pixels * s.taps >= 94 * tiles);
  }
  return false;
}

// Groups of eight channels fill half the lanes of Winograd's products, and torch's kernels whole (RegNet's and
// ResNeXt's 3x3). Of 200 passes of such layers Winograd took x1.06 (forward) and x1.08 (gradient of the input) of its
// time in channels_last, x1.14 for the gradient of the weight and x1.1 forward on small planes of several images.
bool eights_left_to_torch(const Conv2dParams& p, const Shape& s) {
  if (s.c != 8 || s.k != 8 || s.taps == 1 || p.R > 4 || p.S > 4 || (s.batch && !s.together)) return false;
  if (p.stride_h * p.stride_w > 1 || dilated(p)) return false;
  if (p.pass == Conv2dPass::grad_weight) return !s.together;
  return s.together || (p.N > 1 && p.P * p.Q <= 196);
}

// Strided groups as products where the rules above choose torch, shift or a gradient by Winograd: of 720 random layers
// (one thread) those took, in the order of the cases, 1.97, 1.31, 1.50 and channels_last 2.46, 1.71 and 1.71 of gemm's
// time; 3 to 10 % of them lost more than 7 %. Eights and sixteens of channels, of which the random ones had few, torch
// takes in x0.8 to x0.9 of it (ResNeXt's and RegNet's, 360 passes).
bool strided_groups_by_gemm(const Conv2dParams& p, const Shape& s) {
  const int64_t products = s.pixels * s.c * s.k * s.taps;  // of a group
  const bool eights = s.c % 8 == 0 && s.k % 8 == 0;
  switch (p.pass) {
    case Conv2dPass::forward:
      if (s.together) return s.c * s.k > 84 && s.pixels <= 41;
      if (s.pixels <= 35) return true;
      if (eights) return (p.N == 1 && s.c >= 48) || (p.N <= 2 && s.c > 8 && s.c % 16 == 8);
      return s.c >= 6 && (products <= 145728 || p.N <= 3);
    case Conv2dPass::grad_input:
      if (s.together) return s.k > 18 || (s.pixels <= 164 && p.groups <= 12);
      return s.k > 22 || (products <= 107648 && p.groups <= 25);
    case Conv2dPass::grad_weight:
      if (s.together) return s.pixels <= 67 || (s.c >= 16 && s.k >= 8) || (s.pixels <= 600 && p.groups <= 25);
      return p.N <= 3 && p.groups <= 25 && (s.pixels <= 22 || (p.groups <= 3 && !eights));
  }
  return false;
}

}  // namespace

// What groups change of it. From 1510 random layers timed with every algorithm (one thread), of
// which this changes 150: those x1.27 (shift) to x1.8 (Winograd) as fast as before.
Conv2dAlgorithm among_groups(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  using enum Conv2dAlgorithm;
  if (eights_left_to_torch(p, s)) return aten;
  if (groups_by_winograd(p, s, chosen)) return winograd;
  const bool strided = p.stride_h * p.stride_w > 1;
  const bool sixteens = s.c == 16 && s.k % 16 == 0;
  if (strided && s.together && p.pass == Conv2dPass::grad_weight && sixteens && p.groups >= 10 && s.pixels >= 300)
    return aten;  // x0.5 to x0.9 of gemm's and Winograd's time (ResNeXt)
  if (strided && s.taps > 1 && chosen != batch && strided_groups_by_gemm(p, s)) return gemm;
  // Eights of channels torch's strided kernels take whole (ResNeXt's 3x3/2). Of 226 random
  // layers shift and gemm took x1.2 of torch's time forward and x1.8 for a gradient.
  if (!s.together && strided && s.taps > 1 && s.c % 8 == 0 && s.k % 8 == 0 && chosen != batch) return aten;
  switch (p.pass) {
    case Conv2dPass::forward: return chosen == aten && !s.together && s.c <= 12 && s.taps > 1 ? gemm : chosen;
    case Conv2dPass::grad_input:
      // Strided with few channels a group (ResNeXt's 3x3/2 of four, x0.4 of torch): of 1610 of 8399
      // random layers torch takes x0.79 of shift's and gemm's time, of 732 x0.82 of batch's; 24 %
      // of the layers lost, 10 % now.
      if (!s.together && strided && (chosen != batch || (s.c == 4 && p.stride_h > 2)) && s.taps > 1 && s.taps <= 9 &&
          s.k <= 8 && s.pixels * s.k * s.c * s.taps * p.groups > 100000 &&
          (s.pixels > 1200 || (p.stride_h > 2 && s.c <= 8) || (s.c == 4 && s.k % 4 == 0)))
        return aten;
      // 24 random layers of 400 to 1568 pixels and a kernel took x1.0 to x3.3 of shift's time by gemm (x1.5).
      {
        const int64_t most = s.k <= 2 ? 100 : !strided && s.taps > 1 ? 400 : 1568;  // pixels by gemm
        const bool shifts = s.pixels > most && (!s.pointwise || thin_batch(p, s.k, s.c));
        return chosen == gemm && !s.together && shifts ? shift : chosen;
      }
    case Conv2dPass::grad_weight:
      if (s.together ? chosen != aten || s.c <= 12 : chosen != gemm) return chosen;
      if (s.c >= 16 && s.k >= 8 && may_be_winograd(p)) return winograd;
      return s.together || s.c <= 24 ? gemm : aten;
  }
  return chosen;
}

}  // namespace fastnn::cpu::choice
