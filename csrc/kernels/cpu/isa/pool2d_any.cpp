// Pooling of contiguous planes with any windows, one element at a time: adaptive windows of unequal sizes, and windows
// wider than the row kernels' buffers.
#include "../../parallel.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 12;  // window taps per thread at least
constexpr int64_t kColumns = 1024;   // columns of a gradient row accumulated at a time

template <class S, class O>
void max_row(const Pool2dParams& p, const S* x, S* y, O* offsets, int64_t oh) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t top = h.first(oh), i0 = h.begin(oh), i1 = h.end(oh);
  for (int64_t ow = 0; ow < w.out; ++ow) {
    const int64_t left = w.first(ow), j0 = w.begin(ow), j1 = w.end(ow);
    A best = kLowest<A>;
    int64_t offset = i0 * w.kernel + j0;
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j) {
        const A v = to_acc(x[(top + i * h.dilation) * w.in + left + j * w.dilation]);
        if (v > best || v != v) best = v, offset = i * w.kernel + j;
      }
    y[ow] = from_acc<S>(best);
    if (offsets) offsets[ow] = O(offset);
  }
}

// Columns [from, to) of input row ih's gradient.
template <class S, class O>
void max_row_backward(const Pool2dParams& p, const S* g, const O* offsets, S* dx, int64_t ih, int64_t from, int64_t to) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  A sum[kColumns] = {};
  const int64_t ow_begin = w.low(from), ow_end = w.high(to - 1);
  for (int64_t oh = h.low(ih); oh < h.high(ih); ++oh) {
    const int64_t i = h.tap(ih, oh);
    if (i < 0) continue;
    for (int64_t ow = ow_begin; ow < ow_end; ++ow) {
      const int64_t j = int64_t(offsets[oh * w.out + ow]) - i * w.kernel;
      if (j < 0 || j >= w.kernel) continue;
      const int64_t column = w.first(ow) + j * w.dilation;
      if (column >= from && column < to) sum[column - from] += to_acc(g[oh * w.out + ow]);
    }
  }
  for (int64_t c = from; c < to; ++c) dx[c] = from_acc<S>(sum[c - from]);
}

template <class S>
void avg_row(const Pool2dParams& p, const S* x, S* y, int64_t oh) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t top = h.first(oh), i0 = h.begin(oh), i1 = h.end(oh), rows = h.count(oh, p.count_include_pad);
  for (int64_t ow = 0; ow < w.out; ++ow) {
    const int64_t left = w.first(ow), j0 = w.begin(ow), j1 = w.end(ow);
    A sum = 0;
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j) sum += to_acc(x[(top + i) * w.in + left + j]);
    y[ow] = from_acc<S>(sum / A(p.divisor ? p.divisor : rows * w.count(ow, p.count_include_pad)));
  }
}

template <class S>
void avg_row_backward(const Pool2dParams& p, const S* g, S* dx, int64_t ih, int64_t from, int64_t to) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  A sum[kColumns] = {};
  const int64_t ow_begin = w.low(from), ow_end = w.high(to - 1);
  for (int64_t oh = h.low(ih); oh < h.high(ih); ++oh) {
    const int64_t rows = h.count(oh, p.count_include_pad);
    for (int64_t ow = ow_begin; ow < ow_end; ++ow) {
      const int64_t left = w.first(ow), begin = max64(from, left + w.begin(ow)), end = min64(to, left + w.end(ow));
      const A share = to_acc(g[oh * w.out + ow]) / A(p.divisor ? p.divisor : rows * w.count(ow, p.count_include_pad));
      for (int64_t c = begin; c < end; ++c) sum[c - from] += share;
    }
  }
  for (int64_t c = from; c < to; ++c) dx[c] = from_acc<S>(sum[c - from]);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(plane, row) for each of `rows` rows of every plane; `work` is the taps a row costs.
template <class F>
void for_plane_rows(const Pool2dParams& p, int64_t rows, int64_t work, const F& f) {
  parallel_for(0, p.batch * p.channels * rows, max64(1, kGrain / max64(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r / rows, r % rows);
  });
}
template <class F>
void for_plane_row_tiles(const Pool2dParams& p, int64_t work, const F& f) {
  for_plane_rows(p, p.h.in, work, [&](int64_t plane, int64_t row) {
    for (int64_t from = 0; from < p.w.in; from += kColumns) f(plane, row, from, min64(p.w.in, from + kColumns));
  });
}

template <class S, class O>
void max_forward(const Pool2dParams& p) {
  const S* x = static_cast<const S*>(p.input);
  S* y = static_cast<S*>(p.output);
  O* offsets = static_cast<O*>(p.offsets);
  for_plane_rows(p, p.h.out, p.w.out * p.w.kernel * p.h.kernel, [&](int64_t plane, int64_t oh) {
    const int64_t at = (plane * p.h.out + oh) * p.w.out;
    max_row<S, O>(p, x + plane * p.h.in * p.w.in, y + at, offsets ? offsets + at : nullptr, oh);
  });
}
template <class S, class O>
void max_backward(const Pool2dParams& p) {
  const S* g = static_cast<const S*>(p.grad_output);
  S* dx = static_cast<S*>(p.grad_input);
  const O* offsets = static_cast<const O*>(p.offsets);
  for_plane_row_tiles(p, p.w.in * 2, [&](int64_t plane, int64_t ih, int64_t from, int64_t to) {
    const int64_t at = plane * p.h.out * p.w.out;
    max_row_backward<S, O>(p, g + at, offsets + at, dx + (plane * p.h.in + ih) * p.w.in, ih, from, to);
  });
}

}  // namespace

Status max_pool2d_forward_any(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) max_forward<S, int32_t>(p);
    else max_forward<S, uint8_t>(p);
    return Status::ok;
  });
}

Status max_pool2d_backward_any(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) max_backward<S, int32_t>(p);
    else max_backward<S, uint8_t>(p);
    return Status::ok;
  });
}

Status avg_pool2d_forward_any(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    for_plane_rows(p, p.h.out, p.w.out * p.w.kernel * p.h.kernel, [&](int64_t plane, int64_t oh) {
      avg_row(p, x + plane * p.h.in * p.w.in, y + (plane * p.h.out + oh) * p.w.out, oh);
    });
    return Status::ok;
  });
}

Status avg_pool2d_backward_any(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* g = static_cast<const S*>(p.grad_output);
    S* dx = static_cast<S*>(p.grad_input);
    for_plane_row_tiles(p, p.w.in * 2, [&](int64_t plane, int64_t ih, int64_t from, int64_t to) {
      avg_row_backward(p, g + plane * p.h.out * p.w.out, dx + (plane * p.h.in + ih) * p.w.in, ih, from, to);
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
