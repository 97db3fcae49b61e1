// What pooling of channels_last tensors shares.
#pragma once
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// The taps of one window that lie inside the input, and the distance between their rows and columns in elements.
struct Window {
  int64_t i0, i1, j0, j1, row_step, column_step;
};

constexpr int64_t kGrain = 1 << 14;  // elements read, or written backwards, per thread at least

// Calls f(begin, end) for ranges of the input rows of all images.
template <class F>
FASTNN_INLINE void for_row_ranges(const Pool2dParams& p, const F& f) {
  parallel_for(0, p.batch * p.h.in, max64(1, kGrain / (p.w.in * p.channels)), f);
}
// Calls f(image, top, bottom) for the rows of each image in such a range.
template <class F>
FASTNN_INLINE void for_bands(const Pool2dParams& p, int64_t begin, int64_t end, const F& f) {
  for (int64_t r = begin, next; r < end; r = next) {
    const int64_t image = r / p.h.in, first = image * p.h.in;
    next = min64(end, first + p.h.in);
    f(image, r - first, next - first);
  }
}
// Calls f(image, row, column) for every input pixel.
template <class F>
FASTNN_INLINE void for_input_pixels(const Pool2dParams& p, const F& f) {
  for_row_ranges(p, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t x = 0; x < p.w.in; ++x) f(r / p.h.in, r % p.h.in, x);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
