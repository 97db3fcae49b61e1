// Picks the kernel of a pooling call, and turns window taps into the flat indices torch returns.
#include "../../parallel.h"
#include "isa.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// Whether the 2x2 backward is faster than scattering: not where a row is a small part of a vector (64x40x8x2 in
// float32 by AVX2: 20 instead of 10 us, but 64x40x8x8 19 instead of 36), nor where rounding to bfloat16 takes longer.
bool prefers_2x2(const Pool2dParams& p) {
  if (kVecBytes < 32) return p.w.out % 8 == 0;
  if (p.dtype == DType::bf16) return kVecBytes == 64 ? p.w.out >= 10 : p.w.out % 8 == 0;
  return p.w.out >= 4 + (kVecBytes == 64 && p.dtype == DType::f16);
}

// The row kernels shuffle strides up to 3; longer ones they load lane by lane.
bool prefers_table(const Pool2dParams& p) { return p.adaptive || p.w.stride > 3; }

// Rows of two vectors at most are looked up by one permutation: with taps up to 4 times as fast as the row kernels.
bool is_permuted(const Pool2dParams& p, int64_t row) { return kVecBytes == 64 && row <= 2 * lanes_of(p); }

// Rows of few windows, each much longer than a vector: a lookup for every tap would fill a lane or two.
bool has_long_windows(const Pool2dParams& p) { return p.w.kernel >= 16 && p.w.out * 8 <= p.w.in; }

// Rows of one window or two whose shares `any` adds up sooner than a table looks them up: not the long ones, except in
// large planes where rows under the same windows are copies of each other.
bool shares_runs(const Pool2dParams& p) {
  return is_short(p) && (!has_long_windows(p) || (p.h.in * p.w.in > 4096 && p.h.kernel <= p.h.stride));
}

// Rows of too few windows for vectors of neighbours; without taps, columns first, then rows are fewer steps for large
// windows. On 1500 random layers a plane a lane took 0.1 to 1.2 of the other kernels' time there.
bool prefers_planes_max(const Pool2dParams& p) {
  if (!fits_planes(p)) return false;
  const int64_t lanes = lanes_of(p);
  if (is_2x2(p)) return 4 * p.w.out <= lanes;
  const bool permuted = is_permuted(p, p.w.in);
  if (p.offsets) return (permuted ? 2 : 1) * p.w.out <= lanes;
  return p.h.kernel * p.w.kernel <= (permuted ? 15 : 16) ? 2 * p.w.out <= lanes : 8 * p.w.out <= lanes;
}
bool prefers_planes_avg(const Pool2dParams& p) {
  return fits_planes(p) && p.w.kernel <= lanes_of(p) && (is_2x2(p) ? 4 : 1) * p.w.out <= lanes_of(p) * 3 / 4;
}

template <class O>
void indices_from_taps(const Pool2dParams& p) {
  const Axis h = axis_h(p), w = axis_w(p);
  const O* taps = static_cast<const O*>(p.offsets);
  const int64_t inner = p.channels_last ? p.channels : 1, planes = p.channels_last ? p.batch : p.batch * p.channels;
  parallel_for(0, planes * h.out, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t ow = 0; ow < w.out; ++ow)
        for (int64_t c = 0; c < inner; ++c) {
          const int64_t at = (r * w.out + ow) * inner + c, tap = taps[at];
          const int64_t row = h.first(r % h.out) + tap / w.kernel * h.dilation;
          p.indices[at] = row * w.in + w.first(ow) + tap % w.kernel * w.dilation;
        }
  });
}

}  // namespace

Status max_pool2d_forward(const Pool2dParams& p) {
  if (p.channels_last) return max_pool2d_forward_nhwc(p);
  if (prefers_planes_max(p)) return max_pool2d_forward_planes(p);
  if (is_2x2(p)) return max_pool2d_forward_2x2(p);
  if (has_long_windows(p) && p.w.out <= 2) return max_pool2d_forward_any(p);
  const bool permuted = is_permuted(p, p.w.in) && (p.offsets || p.w.stride > 1);
  if ((prefers_table(p) || permuted) && fits_table(p)) return max_pool2d_forward_table(p);
  return fits_rows(p) ? max_pool2d_forward_rows(p) : max_pool2d_forward_any(p);
}
Status max_pool2d_backward(const Pool2dParams& p) {
  if (is_narrow_2x2(p)) return max_pool2d_backward_narrow(p);
  if (fits_max_tiles(p)) return max_pool2d_backward_tiles(p);
  if (fits_same(p)) return max_pool2d_backward_same(p);
  if (p.channels_last) return fits_gather(p) ? max_pool2d_backward_gather(p) : max_pool2d_backward_nhwc(p);
  if (is_2x2(p) && (prefers_2x2(p) || !fits_scatter(p))) return max_pool2d_backward_2x2(p);
  if (fits_gather(p)) return max_pool2d_backward_gather(p);
  if (fits_scatter(p)) return max_pool2d_backward_scatter(p);
  return fits_rows_backward(p) ? max_pool2d_backward_rows(p) : max_pool2d_backward_any(p);
}
Status avg_pool2d_forward(const Pool2dParams& p) {
  if (p.channels_last) return avg_pool2d_forward_nhwc(p);
  if (is_global(p)) return avg_pool2d_forward_global(p);
  if (prefers_planes_avg(p)) return avg_pool2d_forward_planes(p);
  if (is_2x2(p)) return avg_pool2d_forward_2x2(p);
  if (is_short(p) || has_long_windows(p)) return avg_pool2d_forward_any(p);
  if ((prefers_table(p) || is_permuted(p, p.w.in + 1)) && fits_table(p)) return avg_pool2d_forward_table(p);
  return fits_rows(p) ? avg_pool2d_forward_rows(p) : avg_pool2d_forward_any(p);
}
Status avg_pool2d_backward(const Pool2dParams& p) {
  if (p.channels_last) return avg_pool2d_backward_nhwc(p);
  if (is_global(p)) return avg_pool2d_backward_global(p);
  if (fits_mean_tiles(p)) return avg_pool2d_backward_tiles(p);
  if (is_2x2(p)) return avg_pool2d_backward_2x2(p);
  if (shares_runs(p)) return avg_pool2d_backward_any(p);
  const bool shuffled = kVecBytes == 64 ? is_permuted(p, p.w.out + 1) : p.w.in <= 32;
  if ((p.adaptive || p.w.stride > 2 || shuffled) && fits_table_backward(p)) return avg_pool2d_backward_table(p);
  return fits_rows_backward(p) ? avg_pool2d_backward_rows(p) : avg_pool2d_backward_any(p);
}
Status max_pool2d_indices(const Pool2dParams& p) {
  if (p.wide) indices_from_taps<int32_t>(p);
  else indices_from_taps<uint8_t>(p);
  return Status::ok;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
