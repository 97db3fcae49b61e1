// Where Winograd is the faster, by counting its work and by what was measured.
#include "conv2d_choice.h"
#include "conv2d_taps.h"
#include "machine.h"
#include "winograd_tile.h"

namespace fastnn::cpu::choice {

// Of a unit stride and a kernel that Winograd takes: its tiles, and whether they are full enough: of a direct sum's
// multiplications at most two thirds remain.
int64_t tiles_of(const Conv2dParams& p) {
  return p.N * winograd_tiles(p.R, p.P, p.dilation_h) * winograd_tiles(p.R, p.Q, p.dilation_w);
}

bool fills_tiles(const Conv2dParams& p) { return 2 * p.N * taps_of(p) >= 3 * winograd_points(p.R) * tiles_of(p); }

namespace {

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

}  // namespace

// Whether it is allowed and, of a dilation, which the rules below were not fitted to, pays: of 740 random dilated
// passes on a Zen 4 core torch took x2.5 of its time where it is 0.3 of a direct sum's, x1.9 where 0.5, x1.35 where
// 0.9, the same where 1.3 to 2; 1 % of those below 1 lost more than 7 %, 17 % of those from 1 to 1.3. 2x2 lost more.
bool may_be_winograd(const Conv2dParams& p) {
  if (conv2d_strict() || !takes(p, Conv2dAlgorithm::winograd)) return false;
  return !dilated(p) || (p.groups > 1 ? fills_tiles(p) : winograd_work_within(p, p.R == 2 ? 7 : 10));
}

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

namespace {

// The gradient of a 5x5 weight by Winograd with an image per lane: the multiplications and additions of its products,
// of its transforms (counted twice, they wait for memory) and of adding up the lanes of every point's sums, against
// those of a direct sum. On a Zen 4 core 200 random layers of 2 to 32 channels took 0.57 of batch's time where they are
// 0.4 to 0.5 of them, 0.83 where 0.6 to 0.7, its time from 0.8 on; 64x10x12x12->20 449 -> 220 us. On an Emerald Rapids
// core 580 took 0.8 where they are 0.4, 0.95 where 0.5, 1.2 where 0.65. For 3x3 it took 0.8 at best.
bool batch_winograd_grad_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  constexpr int64_t kMaxPairs = 256;  // of channels: their sums, one for each point and lane, stay in L2
  if (s.c * s.k > kMaxPairs) return false;
  const int64_t groups = ceil_div(p.N, 16), tiles = groups * ceil_div(p.P, 4) * ceil_div(p.Q, 4);
  const int64_t slices = min64(4, max64(1, groups / 2)), products = winograd_points(5) * s.c * s.k;
  const int64_t work = tiles * (products + 2 * (416 * s.c + 168 * s.k)) + 5 * slices * products;
  if (chosen == Conv2dAlgorithm::winograd) return 5 * winograd_work(p) >= 8 * 16 * work;
  return 10 * work <= (whole_wide_vectors() ? 5 : 7) * groups * p.P * p.Q * s.taps * s.c * s.k;
}

}  // namespace

// The other passes, by the same count. On a Zen 4 core 500 random layers of 2 to 32 channels took 0.4 of batch's time
// where it is 0.3 to 0.4 of a direct sum's, 0.55 where 0.4 to 0.5, 0.75 where 0.6 to 0.7, its time where 0.9. Where
// winograd is chosen, with channels in the lanes, that takes x1.2 of its time where it does 1.4 times the work, but
// threads share its tiles out, while here each wants 16 images of its own: hence twice that for less than 32. On an
// Emerald Rapids core 1700 layers took 0.63 of batch's time where it is 0.4, 0.80 where 0.5, 0.95 where 0.6, 1.06 where
// 0.7; of the other forward passes 0.75 where 0.45, 1.0 where 0.5, 1.3 where 0.65.
bool batch_winograd_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen) {
  if (conv2d_strict() || p.groups > 1 || min64(s.c, s.k) < 2 || !takes(p, Conv2dAlgorithm::batch_winograd))
    return false;
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
  const bool whole = whole_wide_vectors(), others = forward && chosen != Conv2dAlgorithm::batch;
  return 100 * work <= (!whole ? 70 : others ? 45 : 65) * direct;
}

}  // namespace fastnn::cpu::choice
