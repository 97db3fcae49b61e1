// Which algorithm computes which convolution: the one place that decides, by shape alone.
#include <atomic>
#include <cstring>

#include "conv2d_choice.h"
#include "conv2d_taps.h"

namespace fastnn {

const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm) {
  switch (algorithm) {
    case Conv2dAlgorithm::reference: return "reference";
    case Conv2dAlgorithm::shift: return "shift";
    case Conv2dAlgorithm::winograd: return "winograd";
    case Conv2dAlgorithm::depthwise: return "depthwise";
    case Conv2dAlgorithm::gemm: return "gemm";
    case Conv2dAlgorithm::batch: return "batch";
    case Conv2dAlgorithm::batch_winograd: return "batch_winograd";
    case Conv2dAlgorithm::aten: return "aten";
  }
  return "unknown";
}

namespace cpu {
namespace choice {

// Pointwise sums of so few channels over a batch of tiny planes (larger ones conv2d_few_channels.cpp takes) that a
// product loses to shift, which takes x0.95 of its time. With groups or one channel shift takes x1.4 to x2.9 of it for
// one or two images (their copies), x1.1 to x1.3 for batches of five channels and more (600 random layers, one thread
// and two); of 2 to 31 channels batch takes x1.7.
bool thin_batch(const Conv2dParams& p, int64_t sums, int64_t results) {
  return p.N > 2 && p.P * p.Q < 16 && (sums == 1 || (sums < 5 && (results < 3 || p.groups > 1)));
}

namespace {

Shape shape_of(const Conv2dParams& p) {
  Shape s{};
  s.c = p.C / p.groups, s.k = p.K / p.groups, s.taps = p.R * p.S, s.pixels = p.N * p.P * p.Q;
  const bool unit = p.stride_h == 1 && p.stride_w == 1;
  s.pointwise = s.taps == 1 && unit && p.pad_h == 0 && p.pad_w == 0;
  const auto wide = [&] { return (p.R != 5 || p.groups > 1) && min64(s.c, s.k) >= 16 && fills_tiles(p); };
  s.winograd = unit && may_be_winograd(p) && (wide() || winograd_counts_less(p));
  s.batch = s.taps > 1 && s.c * s.k <= 2048 && s.c * s.k * s.taps <= 1 << 16 && fills_lanes(p) &&
            takes(p, Conv2dAlgorithm::batch);
  s.vendor_fits = s.k % 16 == 0;
  s.sixteens = s.vendor_fits && s.c % 16 == 0;
  s.together = p.output_stride_k == 1 && p.output_stride_q != 1;
  return s;
}

// First layers of small images in NHWC, which gemm reads in place: torch took x1.3 (224x224 to 32 by 3x3 stride 2) to
// x4 (32x32 to 16) of its time on Zen 4; of larger outputs it is as fast, but for those of 32 channels at most (128
// images of 32x32 to 16 x1.1, where batch took x1.3).
bool few_together(const Conv2dParams& p, const Shape& s) {
  const int64_t most = s.k <= 32 && p.P * p.Q <= 6400 ? 1 << 22 : 1 << 19;
  return p.dtype == DType::f32 && p.groups == 1 && s.c > 1 && s.c <= 4 && s.vendor_fits && s.taps > 1 &&
         s.pixels * s.k <= most && takes(p, Conv2dAlgorithm::gemm);
}

// Measured on one thread in float32 (benches/sweep_conv2d.py); 16-bit types have no product kernels of their own here.
Conv2dAlgorithm best_forward(const Conv2dParams& p, const Shape& s) {
  if (s.winograd) return Conv2dAlgorithm::winograd;
  if (s.pointwise && (!thin_batch(p, s.c, s.k) || p.P * p.Q == 1)) return Conv2dAlgorithm::gemm;
  if (s.together) {
    if (s.pointwise || (s.taps == 1 && s.c >= 128)) return Conv2dAlgorithm::gemm;
    if (few_together(p, s)) return Conv2dAlgorithm::gemm;
    if (s.batch && s.c > 1 && s.k <= 20) return Conv2dAlgorithm::batch;
    return s.c > 1 && s.vendor_fits ? Conv2dAlgorithm::aten : Conv2dAlgorithm::shift;
  }
  if (s.c <= 4 || !s.vendor_fits || (s.taps == 1 && (s.pointwise || s.c < 32))) return Conv2dAlgorithm::shift;
  return s.batch ? Conv2dAlgorithm::batch : Conv2dAlgorithm::aten;
}

Conv2dAlgorithm best_grad_input(const Conv2dParams& p, const Shape& s) {
  if (s.winograd) return Conv2dAlgorithm::winograd;
  if (s.pointwise) return Conv2dAlgorithm::gemm;
  const bool unit = p.stride_h == 1 && p.stride_w == 1;
  if (s.batch && (s.together || !unit || s.c > 4 || s.k < 16)) return Conv2dAlgorithm::batch;
  if (!s.together && unit && s.taps > 1 && s.k <= 32 && s.c % 16 != 0) return Conv2dAlgorithm::gemm;
  if (s.taps == 1 && !s.together) return Conv2dAlgorithm::shift;
  if (s.vendor_fits && (s.c % 16 == 0 || (s.together && p.stride_h > 1))) return Conv2dAlgorithm::aten;
  return Conv2dAlgorithm::shift;
}

// Gradients of at most nine pixels an image. From 3236 random layers timed with every algorithm (one thread): against
// torch the rules for larger images reached x1.0 (NCHW) and x2.0 (NHWC), 30 % and 8 % of the layers
// losing more than 7 %; these x1.43 and x2.18, 4 % and 5 %.
Conv2dAlgorithm few_pixels_grad_weight(const Conv2dParams& p, const Shape& s) {
  using enum Conv2dAlgorithm;
  const bool tiles = p.P * p.Q >= 4 && !s.together && p.R != 5;
  if (tiles && min64(s.c, s.k) >= 16 && may_be_winograd(p)) return winograd;
  if (s.together) return s.k == 1 ? batch : gemm;
  const int64_t weights = s.c * s.k * s.taps;
  if (weights <= 12000 && (s.k <= 32 || s.pixels > 256)) return batch;
  if (weights <= 40000 && s.batch && !s.sixteens) return batch;
  return (s.pixels <= 242 && s.k > 24 && s.c <= 24) || (s.pixels <= 128 && s.k > 128) ? gemm : aten;
}

Conv2dAlgorithm best_grad_weight(const Conv2dParams& p, const Shape& s) {
  if (s.winograd) return s.together && s.pixels <= 36 ? Conv2dAlgorithm::gemm : Conv2dAlgorithm::winograd;
  if (s.pointwise)
    return (s.together && s.pixels < 64) || min64(s.c, s.k) <= 4 ? Conv2dAlgorithm::aten : Conv2dAlgorithm::gemm;
  if (s.batch && min64(s.c, s.k) < 16)
    return s.together && s.c * s.k * s.taps > 3456 ? Conv2dAlgorithm::aten : Conv2dAlgorithm::batch;
  // Strided, or of another size than Winograd's. Of 1900 random layers x1.45 of torch; torch's kernels for sixteens of
  // channels are the faster the longer the rows.
  if (s.batch && !s.together && s.c <= 48 && (!s.sixteens || s.c * s.taps <= 480)) return Conv2dAlgorithm::batch;
  if (s.together) {
    if (s.c >= 64 && s.k >= 128 && s.taps > 1) return Conv2dAlgorithm::gemm;
    // oneDNN reads past the image there (a strided 1x1 of 12 channels ends the process, torch 2.13).
    if (s.taps == 1 && s.c % 16) return Conv2dAlgorithm::shift;
    return s.c > 1 && s.vendor_fits ? Conv2dAlgorithm::aten : Conv2dAlgorithm::shift;
  }
  if (s.taps == 1 && s.c < 32) return Conv2dAlgorithm::shift;
  if (s.vendor_fits && (s.c % 16 == 0 || p.stride_h > 2)) return Conv2dAlgorithm::aten;
  return Conv2dAlgorithm::shift;
}

// 1x1 with a stride, the shortcuts of residual networks: of 330 random layers torch and shift, which the rules below
// chose for most, took x1.1 (NHWC weight gradients) to x1.6 (NCHW input gradients) of gemm's time.
bool strided_pointwise(const Conv2dParams& p, const Shape& s) {
  return p.groups == 1 && s.taps == 1 && p.stride_h * p.stride_w > 1 && min64(s.c, s.k) >= 16 && s.pixels >= 9;
}
Conv2dAlgorithm best_strided_pointwise(const Conv2dParams& p, const Shape& s) {
  using enum Conv2dAlgorithm;
  if (p.pass == Conv2dPass::grad_input && s.together) return s.k < 16 * s.c ? gemm : aten;
  if (p.pass == Conv2dPass::grad_weight && !s.together && s.c >= 8 * s.k) return aten;
  if (s.together || p.pass == Conv2dPass::forward || s.pixels <= 1100) return gemm;
  if (p.pass == Conv2dPass::grad_input) return s.c >= 200 ? shift : gemm;
  return s.c <= 64 && s.pixels > 4400 ? shift : aten;
}

// float32 layers that the rules above leave to shift though no network of the sweep has them: small images, many output
// channels, groups, odd strides. From 4771 random layers timed with every algorithm
// (one thread): against torch shift alone lost 31 % of the gradients by more than 7
// % and reached a geometric mean of x1.4, this loses 4 % and reaches x1.9.
Conv2dAlgorithm unless_shift(const Conv2dParams& p, const Shape& s) {
  using enum Conv2dAlgorithm;
  const int64_t rows = s.c * s.taps, weights = s.k * rows;
  const bool strided = p.stride_h * p.stride_w > 1;
  const bool filled = p.N >= 12 && 5 * p.N >= 3 * 16 * ceil_div(p.N, 16) && p.Q <= 56;  // an image per lane
  const bool sparse = strided && s.c >= 128;
  if (s.together && p.groups > 1) return aten;
  switch (p.pass) {
    case Conv2dPass::forward:
      if (s.together) {
        if (s.c == 1) return shift;
        if (s.c >= 256 && s.pixels * s.k <= 64) return aten;
        if (s.k <= 6) return s.c > 64 ? aten : s.pixels <= 25 ? gemm : shift;
        return s.pixels <= 484 ? gemm : rows <= 12 ? shift : aten;
      }
      if (filled && p.Q <= 18) return rows <= 2 ? shift : s.k <= 128 ? batch : gemm;
      if (filled) return s.c > 4 && s.c <= 12 ? batch : shift;
      if (s.taps == 1) return s.pixels <= 4096 ? gemm : shift;
      if (s.pixels <= 32) return rows <= 2500 ? gemm : aten;
      return rows >= 2500 || sparse ? aten : shift;
    case Conv2dPass::grad_input:
      if (s.together) {
        if (s.c == 1) return s.k <= 32 ? shift : aten;
        if (s.c <= 8) return p.N > 16 || weights > 3600 ? aten : s.pixels <= 4 ? gemm : shift;
        if (s.pixels > 289) return s.c <= 128 ? aten : gemm;
        return s.k <= 48 && s.c <= 256 && !(strided && s.c >= 64) ? gemm : aten;
      }
      if (s.taps == 1 && filled) return aten;
      if (s.taps == 1 && s.pixels > 1024) return shift;
      if (filled) return batch;
      if (!strided) return weights <= 24576 && s.k <= 64 ? shift : aten;
      return s.c <= 4 ? (s.k <= 32 ? shift : aten) : weights <= 8192 ? gemm : aten;
    case Conv2dPass::grad_weight:
      if (s.together) {
        if (s.k <= 3) return s.c > 96 ? aten : p.Q > 1 ? shift : gemm;
        return s.pixels <= 4608 ? gemm : aten;
      }
      if (s.pixels <= 242) return rows > 1600 || (sparse && s.k < 16) ? aten : s.k <= 3 && s.pixels > 9 ? shift : gemm;
      if (filled) return weights <= 13824 ? batch : rows <= 600 ? gemm : aten;
      if (s.k > 32) return s.pixels <= 2178 ? gemm : shift;
      return weights <= 7840 && !sparse ? shift : aten;
  }
  return shift;
}

// float32 layers that the rules above leave to torch, too small for it: oneDNN
// takes some 25 us before its first product. From 6692 random layers timed with
// every algorithm (one thread): as fast as torch before, now x1.05 to x1.4 by kind.
Conv2dAlgorithm unless_aten(const Conv2dParams& p, const Shape& s) {
  using enum Conv2dAlgorithm;
  const int64_t rows = s.c * s.taps, weights = s.k * rows, products = s.pixels * weights * p.groups;
  const bool short_taps = s.taps <= 9, unit = p.stride_h == 1 && p.stride_w == 1;
  const bool lanes = p.N >= 12 && 5 * p.N >= 3 * 16 * ceil_div(p.N, 16) && products <= 8000000 && takes(p, batch);
  // One or two pixels are a vector times a matrix, which gemm would pack.
  const bool repays_packing = s.pixels >= 4 || weights <= 6000;
  if (p.groups > 1) {
    if (p.pass == Conv2dPass::grad_weight)
      return short_taps && s.pixels <= (min64(s.c, s.k) >= 8 ? 456 : 32) ? gemm : aten;
    if (p.pass == Conv2dPass::grad_input && s.together) return aten;
    if (s.c * s.k <= 16) return products <= 100000 && p.C <= 64 ? shift : aten;
    return p.pass == Conv2dPass::forward && s.pixels <= 68 && short_taps && repays_packing ? gemm : aten;
  }
  switch (p.pass) {
    case Conv2dPass::forward:
      if (p.N >= 12) return lanes && (!s.together || rows <= 1500) ? batch : aten;
      if (s.together)
        return s.k > 28 && s.c >= 8 && rows <= 2000 && products <= 4000000 && repays_packing ? gemm : aten;
      return s.pixels <= 100 && rows <= 800 && repays_packing ? gemm : aten;
    case Conv2dPass::grad_input:
      if (p.N >= 12) return lanes && s.taps > 1 ? batch : aten;
      return s.together && s.c >= 16 && products <= 2000000 && (!unit || s.taps <= 4) && s.pixels >= 4 ? gemm : aten;
    case Conv2dPass::grad_weight:
      if (s.together) return s.k > 3 && s.c > 1 && s.taps <= 25 && s.pixels <= 1460 ? gemm : aten;
      return s.k >= 16 && rows <= 1000 && s.taps <= 25 && s.pixels <= 242 && products <= 4000000 ? gemm : aten;
  }
  return aten;
}

// Large planes, of which the layers that the rules above come from had few. Of 360 random layers of at most 16 channels
// and 32x32 to 256x256 pixels (one thread and two) this changes a third of the input gradients, which took x2 to x4 of
// its time, and 2x2 kernels forward, x1.2 to x10.
Conv2dAlgorithm on_large_planes(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  using enum Conv2dAlgorithm;
  const int64_t plane = p.P * p.Q;
  if (p.groups > 1 || p.stride_h * p.stride_w > 1 || s.taps == 1 || plane < 900) return chosen;
  switch (p.pass) {
    case Conv2dPass::forward:
      if (s.taps != 4 || s.c > 8 || plane < 4096) return chosen;
      return s.together && chosen == shift ? aten : !s.together && chosen == aten ? shift : chosen;
    case Conv2dPass::grad_input:
      if (s.together) {
        const bool pays = p.R == 2 || (s.c == 3 && s.k >= 24);
        return chosen == shift && pays && may_be_winograd(p) ? winograd : chosen;
      }
      if (s.c > 8) return chosen;
      return chosen == aten || (chosen == gemm && plane >= (s.k <= 24 ? 3000 : 12000)) ? shift : chosen;
    case Conv2dPass::grad_weight: return chosen;
  }
  return chosen;
}

// Dilated layers that Winograd does not pay for and that shift or batch are no match for either: kernels nearly as wide
// as the image, most of which is border then (of 60 random passes torch took x0.8 of their time, x0.03 at best, 64x64
// by 3x3, 18 apart), and most batches (of 50 x0.75). In channels_last gemm, which copies the border (of 14 x0.6).
bool left_to_torch_dilated(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  using enum Conv2dAlgorithm;
  if (!dilated(p) || p.groups > 1) return false;
  const bool grad_input = p.pass == Conv2dPass::grad_input,
             far = 20 * p.P * p.Q < 11 * (p.H + 2 * p.pad_h) * (p.W + 2 * p.pad_w);
  const int64_t products = p.N * taps_of(p) * s.c * s.k;
  if (chosen == batch) return products > 1 << 20;
  if (chosen == gemm)
    return s.together && p.pass != Conv2dPass::grad_weight && 2 * taps_of(p) < p.P * p.Q * s.taps && products > 1 << 19;
  return chosen == shift && far && products > (grad_input && s.together ? 1 << 16 : 1 << 20);
}

// Layers of few output pixels that the rules above leave to torch, which copies the whole weight before it multiplies:
// of 1286 random ones torch takes x1.6 (NCHW) and x1.85 (NHWC) of gemm's time. Left out are those of many taps and few
// output channels, which copy the pixels for nothing.
bool few_pixels_pay(const Conv2dParams& p, const Shape& s) {
  if (p.pass != Conv2dPass::forward || p.groups > 1 || p.N > 8 || s.pixels < 2 || s.pixels > 256) return false;
  if (dilated(p) && 2 * taps_of(p) < p.P * p.Q * s.taps) return false;  // torch leaves out the taps in the padding
  const int64_t rows = s.c * s.taps;
  if ((s.together && s.pixels <= 64) || rows < 1200) return true;
  return s.k >= 24 * (1 + s.pixels / 64) && (s.together || rows < 2500 || s.k >= 64);
}

Conv2dAlgorithm best(const Conv2dParams& p) {
  const Shape s = shape_of(p);
  if (p.groups > 1 && takes(p, Conv2dAlgorithm::depthwise)) return best_depthwise(p, s);
  // NHWC that an output of one channel does not show.
  if (p.dtype == DType::f32 && p.K == 1 && p.C > 1 && p.input_stride_c == 1 && p.H * p.W > 1)
    return Conv2dAlgorithm::aten;
  // All taps but one are padding, which torch knows to leave out: ours took 1.3 times as long (17 random layers).
  if (p.dtype == DType::f32 && p.pass == Conv2dPass::forward && p.weight_stride_c == 1 && p.H * p.W == 1 &&
      s.taps > 1 && s.c * s.taps > 600)
    return Conv2dAlgorithm::aten;
  if (p.dtype == DType::f64) return Conv2dAlgorithm::shift;  // torch has no direct kernel for it
  if (p.dtype != DType::f32 && s.c >= 16 && s.k >= 16) return Conv2dAlgorithm::aten;
  const bool few_pixels = p.N >= 12 && p.P * p.Q <= 9 && s.taps > 1 && p.groups == 1 && !s.winograd;
  if (p.dtype == DType::f32 && p.pass == Conv2dPass::grad_weight && few_pixels) return few_pixels_grad_weight(p, s);
  if (p.dtype == DType::f32 && strided_pointwise(p, s)) return best_strided_pointwise(p, s);
  auto chosen = p.pass == Conv2dPass::forward      ? best_forward(p, s)
                : p.pass == Conv2dPass::grad_input ? best_grad_input(p, s)
                                                   : best_grad_weight(p, s);
  if (p.dtype != DType::f32) return chosen;
  if (chosen == Conv2dAlgorithm::shift) chosen = unless_shift(p, s);
  if (chosen == Conv2dAlgorithm::aten) chosen = unless_aten(p, s);
  chosen = on_large_planes(p, s, chosen);
  if (left_to_torch_dilated(p, s, chosen)) chosen = Conv2dAlgorithm::aten;
  if (winograd_beats(p, s, chosen)) return Conv2dAlgorithm::winograd;
  if (strided_winograd_pays(p, s, chosen)) return Conv2dAlgorithm::winograd;
  if (batch_winograd_pays(p, s, chosen)) return Conv2dAlgorithm::batch_winograd;
  if ((chosen == Conv2dAlgorithm::aten || chosen == Conv2dAlgorithm::shift) && few_pixels_pay(p, s))
    return Conv2dAlgorithm::gemm;
  if (p.groups > 1) return among_groups(p, s, chosen);
  return chosen == Conv2dAlgorithm::gemm && winograd_pays(p, s) ? Conv2dAlgorithm::winograd : chosen;
}

}  // namespace
}  // namespace choice

namespace {
std::atomic<bool> g_strict{false};
std::atomic<int> g_forced{-1};
}  // namespace

Conv2dAlgorithm conv2d_choose(const Conv2dParams& p) {
  const int forced = g_forced;
  if (forced >= 0 && choice::takes(p, Conv2dAlgorithm(forced))) return Conv2dAlgorithm(forced);
  const Conv2dAlgorithm chosen = choice::best(p);
  if (choice::takes(p, chosen)) return chosen;
  return choice::takes(p, Conv2dAlgorithm::shift) ? Conv2dAlgorithm::shift : Conv2dAlgorithm::reference;
}

bool conv2d_set_strict(bool strict) { return g_strict.exchange(strict); }
bool conv2d_strict() { return g_strict; }

bool conv2d_force(const char* name) {
  if (!*name) return g_forced = -1, true;
  for (int i = 0; i <= int(Conv2dAlgorithm::aten); ++i)
    if (std::strcmp(name, conv2d_algorithm_name(Conv2dAlgorithm(i))) == 0) return g_forced = i, true;
  return false;
}

}  // namespace cpu
}  // namespace fastnn
