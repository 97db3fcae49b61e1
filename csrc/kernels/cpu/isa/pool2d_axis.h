// Which inputs a pooling window covers, and which windows cover an input, along one dimension.
#pragma once
#include "../../pool2d.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

template <class A>
constexpr A kLowest = -__builtin_inf();

// a / b for a >= 0, without a 64-bit division (tens of cycles, more than a short row costs) where it can be avoided.
FASTNN_INLINE int64_t quick_div(int64_t a, int64_t b) {
  if (b == 1) return a;
  if (b == 2) return a >> 1;
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}
FASTNN_INLINE int64_t quick_ceil_div(int64_t a, int64_t b) { return quick_div(a + b - 1, b); }

struct Axis : PoolAxis {
  bool adaptive;

  // a * num / den, rounded down or up.
  FASTNN_INLINE int64_t floor_scale(int64_t a, int64_t num, int64_t den) {
    if ((a | num) >> 31) return a / den * num + a % den * num / den;
    return quick_div(a * num, den);
  }
  FASTNN_INLINE int64_t ceil_scale(int64_t a, int64_t num, int64_t den) {
    if ((a | num) >> 31) return a / den * num + (a % den * num + den - 1) / den;
    return quick_ceil_div(a * num, den);
  }

  // Window o has taps at first(o) + i * dilation; those with begin(o) <= i < end(o) lie inside the input.
  __attribute__((always_inline)) int64_t first(int64_t o) const {
    return adaptive ? floor_scale(o, in, out) : o * stride - padding;
  }
  __attribute__((always_inline)) int64_t begin(int64_t o) const {
    const int64_t at = first(o);
    return at < 0 ? quick_ceil_div(-at, dilation) : 0;
  }
  __attribute__((always_inline)) int64_t end(int64_t o) const {
    const int64_t at = first(o);
    if (adaptive) return ceil_scale(o + 1, in, out) - at;
    return at >= in ? 0 : min64(kernel, quick_ceil_div(in - at, dilation));
  }
  // Input x lies between the first and the last tap of windows low(x) <= o < high(x); tap(x, o) is -1 where it falls
  // between two taps.
  __attribute__((always_inline)) int64_t low(int64_t x) const {
    if (adaptive) return floor_scale(x, out, in);
    const int64_t reach = x + padding - (kernel - 1) * dilation;
    return reach <= 0 ? 0 : quick_ceil_div(reach, stride);
  }
  __attribute__((always_inline)) int64_t high(int64_t x) const {
    if (adaptive) return ceil_scale(x + 1, out, in);
    return min64(out, quick_div(x + padding, stride) + 1);
  }
  __attribute__((always_inline)) int64_t tap(int64_t x, int64_t o) const {
    const int64_t distance = x - first(o);
    return dilation == 1                                          ? distance
           : quick_div(distance, dilation) * dilation == distance ? quick_div(distance, dilation)
                                                                  : -1;
  }
  // What window o counts in an average along this dimension.
  __attribute__((always_inline)) int64_t count(int64_t o, bool include_pad) const {
    if (adaptive) return end(o);
    const int64_t from = first(o), to = min64(from + kernel, in + padding);
    return include_pad ? to - from : min64(to, in) - max64(from, 0);
  }
};

// Windows [from, from + count) of every row, without the divisions.
struct Columns {
  static constexpr int64_t kMost = 128;
  int64_t from, count;
  int64_t first[kMost], begin[kMost], end[kMost];

  Columns(const Axis& w, int64_t from) : from(from), count(min64(kMost, w.out - from)) {
    for (int64_t o = 0; o < count; ++o)
      first[o] = w.first(from + o), begin[o] = w.begin(from + o), end[o] = w.end(from + o);
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

FASTNN_INLINE Axis axis_h(const Pool2dParams& p) { return {p.h, p.adaptive}; }
FASTNN_INLINE Axis axis_w(const Pool2dParams& p) { return {p.w, p.adaptive}; }

// From a window's first tap to behind its last.
FASTNN_INLINE int64_t reach_of(const PoolAxis& a) { return (a.kernel - 1) * a.dilation + 1; }

FASTNN_INLINE bool windows_overlap(const Pool2dParams& p) {
  return p.adaptive || (p.h.kernel - 1) * p.h.dilation >= p.h.stride || (p.w.kernel - 1) * p.w.dilation >= p.w.stride;
}
// Whether windows that do not overlap leave no input out.
FASTNN_INLINE bool windows_cover(const Pool2dParams& p) {
  const PoolAxis* axes[] = {&p.h, &p.w};
  for (const PoolAxis* a : axes)
    if (a->padding != 0 || a->in != a->out * a->kernel || a->dilation != 1) return false;
  return true;
}
// Most windows that cover one row or column.
FASTNN_INLINE int64_t most_covers(const Axis& a) {
  return a.adaptive ? ceil_div(a.out, a.in) + 1 : ceil_div((a.kernel - 1) * a.dilation + 1, a.stride);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
