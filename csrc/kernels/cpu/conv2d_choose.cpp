// Which algorithm computes which convolution: the one place that decides, by shape alone.
#include "../conv2d.h"

#include <atomic>
#include <cstring>

#include "conv2d_taps.h"
#include "winograd_tile.h"

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
namespace {

// Offsets inside an image or a kernel are kept in 32 bits by the fast algorithms.
bool fits_32_bits(const Conv2dParams& p) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t image = max64(p.input_stride_n, p.C * (p.H + 2 * p.pad_h) * (p.W + 2 * p.pad_w));
  return image < kLimit && max64(p.output_stride_n, p.K * p.P * p.Q) < kLimit;
}

bool fits_workspace(Conv2dParams p, Conv2dAlgorithm algorithm) {
  p.algorithm = algorithm;
  return conv2d_workspace(p) <= kConv2dMaxWorkspace;
}

// Every row of an image follows the one before without a gap, in both tensors.
bool rows_together(const Conv2dParams& p) {
  const bool input_apart = p.input_stride_w == 1 && p.input_stride_h == p.W;
  const bool input_together =
      p.groups == 1 && p.input_stride_c == 1 && p.input_stride_w == p.C && p.input_stride_h == p.W * p.C;
  const bool output_apart = p.output_stride_q == 1 && p.output_stride_p == p.Q;
  const bool output_together =
      p.groups == 1 && p.output_stride_k == 1 && p.output_stride_q == p.K && p.output_stride_p == p.Q * p.K;
  return (input_apart || input_together) && (output_apart || output_together);
}

bool dilated(const Conv2dParams& p) { return p.dilation_h * p.dilation_w > 1; }

// Winograd's kernels of 2x2 to 5x5, each pixel phase of a stride being a channel of its own. In the gradient of the
// input the phases are problems of their own, all of one size where the stride divides the kernel.
bool winograd_takes(const Conv2dParams& p) {
  if (p.dtype != DType::f32 || p.pad_h > p.dilation_h * (p.R - 1) || p.pad_w > p.dilation_w * (p.S - 1)) return false;
  if (dilated(p) && p.stride_h * p.stride_w > 1) return false;
  const int64_t stride = p.stride_h, taps = ceil_div(p.R, stride);
  const bool grad_input = p.pass == Conv2dPass::grad_input;
  if (stride != p.stride_w || (stride != 1 && stride != 2 && stride != 4) || p.R > 16 || p.S > 16) return false;
  if (taps < 2 || taps > 5 || taps != ceil_div(p.S, stride)) return false;
  if ((stride == 1 || grad_input) && (p.R % stride || p.S != p.R)) return false;
  // F(5x5, 2x2) weighs its points up to 16 fold: in a short sum that would show.
  return taps > 2 || (grad_input ? p.K : p.C * stride * stride) >= 12 * p.groups;
}

// Of a unit stride and a kernel that Winograd takes: its tiles, and whether they are full enough: of a direct sum's
// multiplications at most two thirds remain.
int64_t tiles_of(const Conv2dParams& p) {
  return p.N * winograd_tiles(p.R, p.P, p.dilation_h) * winograd_tiles(p.R, p.Q, p.dilation_w);
}
bool fills_tiles(const Conv2dParams& p) { return 2 * p.N * taps_of(p) >= 3 * winograd_points(p.R) * tiles_of(p); }

bool takes(const Conv2dParams& p, Conv2dAlgorithm algorithm) {
  const bool channels_or_columns_dense =
      (p.input_stride_c == 1 || p.input_stride_w == 1) && (p.output_stride_k == 1 || p.output_stride_q == 1);
  switch (algorithm) {
    case Conv2dAlgorithm::reference: return true;
    case Conv2dAlgorithm::shift: return fits_32_bits(p) && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::winograd:
      return winograd_takes(p) && channels_or_columns_dense && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::depthwise:
      return p.groups == p.C && p.K == p.C && p.R * p.S <= 64 && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::gemm: return p.dtype == DType::f32 && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::batch:
      return p.dtype == DType::f32 && p.N >= 12 && p.stride_h * p.stride_w <= 16 && rows_together(p) &&
             fits_workspace(p, algorithm);
    case Conv2dAlgorithm::batch_winograd:
      return p.dtype == DType::f32 && p.N >= 12 && (p.R == 5 || (p.R == 3 && p.pass != Conv2dPass::grad_weight)) &&
             p.R == p.S && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
             p.pad_h < p.R && p.pad_w < p.S && rows_together(p) && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::aten: return true;
  }
  return false;
}

std::atomic<bool> g_strict{false};
std::atomic<int> g_forced{-1};

// ---- the choice ----------------------------------------------------------------------------------------------------

// What the rules below speak of; channels are those of one group.
struct Shape {
  int64_t c, k, taps, pixels;
  bool pointwise;    // 1x1, stride 1, no padding
  bool winograd;     // 2x2 to 5x5, stride 1, and channels enough for its transforms to pay
  bool batch;        // images enough to fill the lanes of the batch algorithm, and small matrices of weights
  bool vendor_fits;  // torch's direct kernel wants output channels in sixteens
  bool sixteens;     // so are input channels
  bool together;     // NHWC
};

// Winograd with channels in the lanes, also of the phases of a stride: the multiplications of its products, in lanes of
// sixteen, of its transforms (counted twice, they wait for memory) and of transforming the weight.
int64_t winograd_work(const Conv2dParams& p) {
  constexpr int64_t kLanes = 16;
  const int64_t stride = p.stride_h, phases = stride * stride, taps = ceil_div(p.R, stride);
  const int64_t points = winograd_points(taps);
  // Operations of a tile's transforms, for one channel.
  const int64_t input = taps == 5 ? 416 : 156, output = taps == 5 ? 192 : 25 * (7 - taps);
  const bool grad_input = p.pass == Conv2dPass::grad_input;
  const int64_t h = grad_input ? ceil_div(p.H, stride) : p.P, w = grad_input ? ceil_div(p.W, stride) : p.Q;
  const int64_t tiles = p.N * winograd_tiles(taps, h, p.dilation_h) * winograd_tiles(taps, w, p.dilation_w);
  const auto work = [&](int64_t products, int64_t transforms, int64_t weights) {
    return tiles * (points * products + 2 * transforms) + points * weights;
  };
  const int64_t c = p.C * phases, k = round_up(p.K, kLanes), in = round_up(c, kLanes);
  const int64_t back = phases * round_up(p.C, kLanes);
  switch (p.pass) {
    case Conv2dPass::forward: return work(c * k, input * in + output * k, 4 * c * k);
    case Conv2dPass::grad_input: return work(p.K * back, input * k + output * back, 4 * p.K * back);
    case Conv2dPass::grad_weight: return work(in * k, input * in + output * k, 6 * in * k);
  }
  return 0;
}
// At most `tenths` of a direct sum's multiplications.
bool winograd_work_within(const Conv2dParams& p, int64_t tenths) {
  return 10 * winograd_work(p) <= tenths * p.N * taps_of(p) * p.C * p.K;
}

// Whether it is allowed and, of a dilation, which the rules below were not fitted to, pays: of 740 random dilated
// passes on a Zen 4 core torch took x2.5 of its time where it is 0.3 of a direct sum's, x1.9 where 0.5, x1.35 where
// 0.9, the same where 1.3 to 2; 1 % of those below 1 lost more than 7 %, 17 % of those from 1 to 1.3. 2x2 lost more.
bool may_be_winograd(const Conv2dParams& p) {
  if (g_strict || !takes(p, Conv2dAlgorithm::winograd)) return false;
  return !dilated(p) || (p.groups > 1 ? fills_tiles(p) : winograd_work_within(p, p.R == 2 ? 7 : 10));
}
bool fills_lanes(const Conv2dParams& p) { return 4 * p.N >= 3 * 16 * ceil_div(p.N, 16); }  // an image per lane

// Stride 1 by that count, of four channels or more. On a Zen 4 core 4500 random passes of 2 to 384 channels took 0.35
// of the best other algorithm's time where it is 0.3 of a direct sum's, 0.6 where 0.7, and for batches that fill the
// lanes the same time where 1, for others 0.8 where 1.3 (2x2: where 1.1): layers of thin channels that took 1.4 to 2.5
// times as long by gemm, shift and torch. Batches of 3x3 are left to those with an image per lane, which have fewer
// products.
bool winograd_counts_less(const Conv2dParams& p) {
  if (p.groups > 1 || min64(p.C, p.K) < 4) return false;
  if (dilated(p)) return true;  // of those that may be
  const bool full = fills_lanes(p);
  if (full && p.R == 3 && p.pass != Conv2dPass::grad_weight) return false;
  return winograd_work_within(p, full ? 7 : p.R == 2 ? 11 : 13);
}

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

// Pointwise sums of so few channels over a batch of tiny planes (larger ones conv2d_few_channels.cpp takes) that a
// product loses to shift, which takes x0.95 of its time. With groups or one channel shift takes x1.4 to x2.9 of it for
// one or two images (their copies), x1.1 to x1.3 for batches of five channels and more (600 random layers, one thread
// and two); of 2 to 31 channels batch takes x1.7.
bool thin_batch(const Conv2dParams& p, int64_t sums, int64_t results) {
  return p.N > 2 && p.P * p.Q < 16 && (sums == 1 || (sums < 5 && (results < 3 || p.groups > 1)));
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

// The kernels of (packed_)conv2d_depthwise_3x3.cpp, ahead of torch in every pass: from 1x1 images to 300x300, of 16 to
// 1024 channels, x1.2 to x10 (Zen 4, one thread).
bool depthwise_3x3(const Conv2dParams& p, const Shape& s) {
  if (!s.together || p.R != 3 || p.S != 3 || p.C < 16) return false;
  if (p.dilation_h * p.dilation_w != 1 || p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.pass != Conv2dPass::grad_input) return true;
  return p.stride_h == 1 ? p.pad_h <= 2 && p.pad_w <= 2 : p.pad_h == 1 && p.pad_w == 1;
}

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

// Winograd of thin channels instead of what the rules above found for them, up to the work where it took that one's
// time: of 3200 random passes (4 to 128 channels, fewer than 12 images) this takes 500, x1.3 of shift and gemm and x2.4
// of torch.
bool winograd_beats(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  using enum Conv2dAlgorithm;
  if (p.groups > 1 || p.stride_h > 1 || !may_be_winograd(p)) return false;
  if (chosen == aten ? min64(s.c, s.k) < 3 : min64(s.c, s.k) < 4 || fills_lanes(p)) return false;
  if (chosen != aten && chosen != gemm && chosen != shift) return false;
  if (p.R == 2) return winograd_work_within(p, 13);
  // Torch's kernels for the first layers of images took x0.7 of its time, but x3 (page faults) of 32 MB and more.
  if (p.pass != Conv2dPass::grad_input && s.together && p.R == 3 && s.c <= 4 && chosen == aten)
    return p.pass == Conv2dPass::forward && s.pixels * s.k >= 1 << 23;
  switch (p.pass) {
    case Conv2dPass::forward: return winograd_work_within(p, chosen == shift && !s.together ? 13 : 20);
    case Conv2dPass::grad_input: return winograd_work_within(p, s.together ? 22 : 16);
    case Conv2dPass::grad_weight: return winograd_work_within(p, s.together ? 15 : chosen == gemm ? 26 : 18);
  }
  return false;
}

// Winograd instead of gemm to few output channels, which best_forward() does not send there: of 55 random layers x1.33.
bool winograd_pays(const Conv2dParams& p, const Shape& s) {
  return p.pass == Conv2dPass::forward && p.stride_h == 1 && s.taps > 1 && s.c >= 16 && p.R != 5 &&
         (!s.together || s.k <= 64) && may_be_winograd(p);
}

// Strided layers by Winograd, whatever the rules above chose. Of random ones timed on one thread (kernels of 3 to 12,
// strides of 2 and 4, both layouts) this takes 5500 of 14707 forward passes, x1.68 of the choice before, 1571 of 4987
// weight gradients, x1.51, and 428 of 1820 input gradients, x1.8; 1 to 3 % of them are below x0.93.
bool strided_winograd_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  if (p.groups > 1 || p.stride_h == 1 || !may_be_winograd(p)) return false;
  if (winograd_work_within(p, 6)) return true;
  if (s.k < 16 || ceil_div(p.R, p.stride_h) == 5) return false;
  const int64_t stride = p.stride_h, phases = stride * stride, taps = ceil_div(p.R, stride);
  const int64_t out = winograd_outputs(taps), points = winograd_points(taps);
  const auto tiles = [&](int64_t h, int64_t w) { return ceil_div(h, out) * ceil_div(w, out); };
  const int64_t channels = s.c * phases, h = ceil_div(p.H, stride), w = ceil_div(p.W, stride);
  switch (p.pass) {
    case Conv2dPass::forward:
    case Conv2dPass::grad_weight: {
      const bool forward = p.pass == Conv2dPass::forward;
      if (channels < 12 || channels > (forward ? 512 : 128) || (chosen == Conv2dAlgorithm::batch && s.k <= 32))
        return false;
      return p.N * tiles(p.P, p.Q) >= (forward ? 5 : 9) && p.P * p.Q * s.taps >= 2 * points * phases * tiles(p.P, p.Q);
    }
    case Conv2dPass::grad_input:
      return s.c >= 8 && chosen != Conv2dAlgorithm::batch && p.N * tiles(h, w) >= 5 &&
             4 * h * w * s.taps >= 7 * points * phases * tiles(h, w);
  }
  return false;
}

// The gradient of a 5x5 weight by Winograd with an image per lane: the multiplications and additions of its products,
// of its transforms (counted twice, they wait for memory) and of adding up the lanes of every point's sums, against
// those of a direct sum. On a Zen 4 core 200 random layers of 2 to 32 channels took 0.57 of batch's time where they are
// 0.4 to 0.5 of them, 0.83 where 0.6 to 0.7, its time from 0.8 on; 64x10x12x12->20 449 -> 220 us. For 3x3 it took 0.8
// at best.
bool batch_winograd_grad_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  constexpr int64_t kMaxPairs = 256;  // of channels: their sums, one for each point and lane, stay in L2
  if (s.c * s.k > kMaxPairs) return false;
  const int64_t groups = ceil_div(p.N, 16), tiles = groups * ceil_div(p.P, 4) * ceil_div(p.Q, 4);
  const int64_t slices = min64(4, max64(1, groups / 2)), products = winograd_points(5) * s.c * s.k;
  const int64_t work = tiles * (products + 2 * (416 * s.c + 168 * s.k)) + 5 * slices * products;
  if (chosen == Conv2dAlgorithm::winograd) return 5 * winograd_work(p) >= 8 * 16 * work;
  return 10 * work <= 7 * groups * p.P * p.Q * s.taps * s.c * s.k;
}

// The other passes, by the same count. On a Zen 4 core 500 random layers of 2 to 32 channels took 0.4 of batch's time
// where it is 0.3 to 0.4 of a direct sum's, 0.55 where 0.4 to 0.5, 0.75 where 0.6 to 0.7, its time where 0.9. Where
// winograd is chosen, with channels in the lanes, that takes x1.2 of its time where it does 1.4 times the work, but
// threads share its tiles out, while here each wants 16 images of its own: hence twice that for less than 32.
bool batch_winograd_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  if (g_strict || p.groups > 1 || min64(s.c, s.k) < 2 || !takes(p, Conv2dAlgorithm::batch_winograd)) return false;
  if (!fills_lanes(p) || p.Q > 56) return false;
  if (p.pass == Conv2dPass::grad_weight) return batch_winograd_grad_pays(p, s, chosen);
  const bool forward = p.pass == Conv2dPass::forward, five = p.R == 5;
  const auto tiles = [](int64_t h, int64_t w) { return ceil_div(h, 4) * ceil_div(w, 4); };
  const int64_t from_outputs = tiles(p.P, p.Q), from_inputs = tiles(p.H, p.W);
  const int64_t forth = forward ? from_outputs : from_inputs, back = forward ? from_inputs : from_outputs;
  const int64_t c = forward ? s.c : s.k, k = forward ? s.k : s.c;
  // Operations of a tile's transforms, for one channel.
  const int64_t in = back < forth ? (five ? 168 : 120) : five ? 416 : 156;
  const int64_t out = back < forth ? (five ? 608 : 276) : five ? 192 : 100;
  const int64_t work = min64(back, forth) * (winograd_points(p.R) * c * k + 2 * (in * c + out * k));
  const int64_t direct = p.P * p.Q * s.taps * c * k;
  if (chosen == Conv2dAlgorithm::winograd)
    return five && 5 * winograd_work(p) >= (p.N >= 32 ? 7 : 14) * 16 * ceil_div(p.N, 16) * work;
  return 10 * work <= 7 * direct;
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

Conv2dAlgorithm conv2d_choose(const Conv2dParams& p) {
  const int forced = g_forced;
  if (forced >= 0 && takes(p, Conv2dAlgorithm(forced))) return Conv2dAlgorithm(forced);
  const Conv2dAlgorithm chosen = best(p);
  if (takes(p, chosen)) return chosen;
  return takes(p, Conv2dAlgorithm::shift) ? Conv2dAlgorithm::shift : Conv2dAlgorithm::reference;
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
