// The ways to pool, from the special to the general; pool2d.cpp picks one per call.
#pragma once
#include "pool2d_axis.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Lanes of a vector of what the elements are added up in.
FASTNN_INLINE int64_t lanes_of(const Pool2dParams& p) { return kVecBytes / (p.dtype == DType::f64 ? 8 : 4); }

// Whether the gradient of the input leaves the caches anyway: aligned vectors are then written past them from the
// start, 1.6 times as fast from 12 MB on, also with the ReLU's backward that reads them next (8 MB: 1.3 times as slow).
FASTNN_INLINE bool leaves_caches(const Pool2dParams& p) {
  const int64_t floats = p.batch * p.channels * p.h.in * p.w.in;
  return p.dtype == DType::f32 && floats >= 3'000'000 && uintptr_t(p.grad_input) % 64 == 0;
}

// Whether contiguous planes come from memory: rows are then fetched by hand, since a few at a time are no pattern that
// the hardware prefetcher follows (8x64x112x112, 2x2: 680 instead of 930 us; of 12 MB, still in L3, 1.2 times as slow).
FASTNN_INLINE bool outside_caches(const Pool2dParams& p) {
  const int64_t size = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  return p.batch * p.channels * p.h.in * p.w.in * size > 16 << 20;
}
// Where the input ends: a row's last vector is read past the row, up to there. The hardware does not fetch ahead of
// masked loads, which were every other line of rows of 32 (avg_pool2d 64x32x32x32, 3x3 with stride 2: 1900 instead of
// 500 us).
template <class S>
FASTNN_INLINE const S* end_of_input(const Pool2dParams& p) {
  return static_cast<const S*>(p.input) + p.batch * p.channels * p.h.in * p.w.in;
}

// Fetches the `count` elements that lie 4 KB behind `at`.
template <class S>
FASTNN_INLINE void prefetch_behind(const S* at, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(at + 64 * kLine + i);
}

// channels_last, any windows: vectors of channels.
Status max_pool2d_forward_nhwc(const Pool2dParams& p);
Status max_pool2d_backward_nhwc(const Pool2dParams& p);
Status avg_pool2d_forward_nhwc(const Pool2dParams& p);
Status avg_pool2d_backward_nhwc(const Pool2dParams& p);

// Contiguous, 2x2 windows with stride 2.
bool is_2x2(const Pool2dParams& p);
Status max_pool2d_forward_2x2(const Pool2dParams& p);
Status max_pool2d_backward_2x2(const Pool2dParams& p);
Status avg_pool2d_forward_2x2(const Pool2dParams& p);
Status avg_pool2d_backward_2x2(const Pool2dParams& p);

// AVX-512, float32, contiguous: stride = kernel, no padding.
bool fits_max_tiles(const Pool2dParams& p);
Status max_pool2d_backward_tiles(const Pool2dParams& p);
bool fits_mean_tiles(const Pool2dParams& p);
Status avg_pool2d_backward_tiles(const Pool2dParams& p);

// AVX-512, float32, 2x2 windows with stride 2, channels_last: pixels shorter than a vector.
bool is_narrow_2x2(const Pool2dParams& p);
Status max_pool2d_backward_narrow(const Pool2dParams& p);

// Contiguous, one window that is the whole plane.
bool is_global(const Pool2dParams& p);
Status avg_pool2d_forward_global(const Pool2dParams& p);
Status avg_pool2d_backward_global(const Pool2dParams& p);

// AVX-512, float32: stride 1, the plane's size kept; channels_last whole vectors of channels and more than 16 taps.
bool fits_same(const Pool2dParams& p);
Status max_pool2d_backward_same(const Pool2dParams& p);

// Stride 1 with the plane's size kept and few taps; contiguous: 3x3 with stride 2.
bool fits_gather(const Pool2dParams& p);
Status max_pool2d_backward_gather(const Pool2dParams& p);

// Contiguous; planes of 16-bit gradients of a bounded size.
bool fits_scatter(const Pool2dParams& p);
Status max_pool2d_backward_scatter(const Pool2dParams& p);

// Contiguous, windows of one size whose rows fit a buffer: vectors of neighbouring outputs or inputs.
bool fits_rows(const Pool2dParams& p);
Status max_pool2d_forward_rows(const Pool2dParams& p);
Status avg_pool2d_forward_rows(const Pool2dParams& p);
bool fits_rows_backward(const Pool2dParams& p);
Status max_pool2d_backward_rows(const Pool2dParams& p);
Status avg_pool2d_backward_rows(const Pool2dParams& p);

// Contiguous, any windows on planes of at most about 1000 rows and columns: vectors by tables.
bool fits_table(const Pool2dParams& p);
Status max_pool2d_forward_table(const Pool2dParams& p);
Status avg_pool2d_forward_table(const Pool2dParams& p);
bool fits_table_backward(const Pool2dParams& p);
Status avg_pool2d_backward_table(const Pool2dParams& p);

// Contiguous, any windows, rows under a window of a bounded size, enough planes: a plane a lane.
bool fits_planes(const Pool2dParams& p);
Status max_pool2d_forward_planes(const Pool2dParams& p);
Status avg_pool2d_forward_planes(const Pool2dParams& p);

// Contiguous, any windows: one output or input at a time; fastest where rows have one window or two.
bool is_short(const Pool2dParams& p);
Status max_pool2d_forward_any(const Pool2dParams& p);
Status max_pool2d_backward_any(const Pool2dParams& p);
Status avg_pool2d_forward_any(const Pool2dParams& p);
Status avg_pool2d_backward_any(const Pool2dParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
