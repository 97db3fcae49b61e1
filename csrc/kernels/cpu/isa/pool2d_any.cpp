// Pooling of contiguous planes with any windows, one element at a time: adaptive windows of
// unequal sizes, windows wider than the row kernels' buffers, rows of one window or two.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 12;  // window taps per thread at least
constexpr int64_t kColumns = 1024;   // columns of a gradient row accumulated at a time

// The first maximum of `rows` rows of `columns` >= a vector elements, and its tap when codes start at `code` and rows
// are `kernel` of them apart. A row's last vector may overlap the one before: no lane meets its taps out of order.
// False when a NaN was met.
template <class S, class A = acc_t<S>>
bool long_max(const S* x, int64_t row_step, int64_t rows, int64_t columns, int64_t kernel, int64_t code, bool taken,
              A& value, int64_t& tap) {
  using V = Vec<A>;
  using Int = typename V::Int;
  V best = V::set1(kLowest<A>);
  NanWatch<A> nan;
  Int lane{};
#pragma GCC unroll 16
  for (int l = 0; l < V::N; ++l) lane[l] = l;
  Taps<A> taps(code);
  taps.taps -= lane;
  for (int64_t i = 0; i < rows; ++i, x += row_step, code += kernel)
    for (int64_t j = 0; j < columns; j += V::N) {
      const int64_t at = min64(j, columns - V::N);
      const V v = V::load(x + at);
      nan.see(v, v);
      if (taken) taps.update(best, v, code + at);
      else best = max(v, best);
    }
  if (__builtin_expect(nan.any(), 0)) return false;
  taps.taps += lane;
  value = best.v[0], tap = taps.taps[0];
  for (int l = 1; l < V::N; ++l)
    if (best.v[l] > value || (best.v[l] == value && taps.taps[l] < tap)) value = best.v[l], tap = taps.taps[l];
  return true;
}

template <class S, class O>
void max_row(const Pool2dParams& p, const S* x, S* y, O* offsets, int64_t oh) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t top = h.first(oh), i0 = h.begin(oh), i1 = h.end(oh);
  for (int64_t ow = 0; ow < w.out; ++ow) {
    const int64_t left = w.first(ow), j0 = w.begin(ow), j1 = w.end(ow);
    A best = kLowest<A>;
    int64_t offset = i0 * w.kernel + j0;
    const bool done = w.dilation == 1 && j1 - j0 >= Vec<A>::N &&
                      long_max(x + (top + i0 * h.dilation) * w.in + left + j0, h.dilation * w.in, i1 - i0, j1 - j0,
                               w.kernel, offset, offsets != nullptr, best, offset);
    for (int64_t i = done ? i1 : i0; i < i1; ++i)
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
void max_row_backward(const Pool2dParams& p, const S* g, const O* offsets, S* dx, int64_t ih, int64_t from,
                      int64_t to) {
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

// Windows [w.from, w.from + w.count) of row oh.
template <class S>
void avg_row(const Pool2dParams& p, const Axis& h, const Columns& w, const S* x, S* y, int64_t oh) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis all = axis_w(p);
  const int64_t i0 = h.begin(oh), i1 = h.end(oh), rows = h.count(oh, p.count_include_pad);
  const S* const top = x + (h.first(oh) + i0) * all.in;
  for (int64_t o = 0; o < w.count; ++o) {
    const S* from = top + w.first[o] + w.begin[o];
    const int64_t columns = w.end[o] - w.begin[o];
    A sum = 0;
    if (columns >= V::N / 2 && columns >= 4) {
      V sums = V::zero();
      for (int64_t i = i0; i < i1; ++i, from += all.in)
        for (int64_t j = 0; j < columns; j += V::N) sums = sums + load_upto(from + j, columns - j);
      sum = reduce_add(sums);
    } else {
      for (int64_t i = i0; i < i1; ++i, from += all.in)
        for (int64_t j = 0; j < columns; ++j) sum += to_acc(from[j]);
    }
    const int64_t ow = w.from + o;
    y[ow] = from_acc<S>(sum / A(p.divisor ? p.divisor : rows * all.count(ow, p.count_include_pad)));
  }
}

// Adds `share` to `count` sums. Where rows are shorter than a vector, masked ones would wait for the row before.
template <bool kMasked = false, class A>
FASTNN_INLINE void add_share(A* sums, int64_t count, A share) {
  using V = Vec<A>;
  const V all = V::set1(share);
  int64_t i = 0;
  for (; i + V::N <= count; i += V::N) (V::load(sums + i) + all).store(sums + i);
  if (kMasked && count - i >= V::N / 2) return store_upto(load_upto(sums + i, count - i) + all, sums + i, count - i);
  for (; i < count; ++i) sums[i] += share;
}

// The sums of the shares that the windows of rows [low, high) send to the input columns [from, to).
template <class S>
void share_row(const Pool2dParams& p, const Axis& h, const Axis& w, const S* g, int64_t low, int64_t high, int64_t from,
               int64_t to, acc_t<S>* sum) {
  using A = acc_t<S>;
  for (int64_t c = from; c < to; ++c) sum[c - from] = 0;
  const int64_t ow_begin = w.low(from), ow_end = w.high(to - 1);
  for (int64_t oh = low; oh < high; ++oh) {
    const int64_t rows = h.count(oh, p.count_include_pad);
    for (int64_t ow = ow_begin; ow < ow_end; ++ow) {
      const int64_t left = w.first(ow), begin = max64(from, left + w.begin(ow)), end = min64(to, left + w.end(ow));
      const A share = to_acc(g[oh * w.out + ow]) / A(p.divisor ? p.divisor : rows * w.count(ow, p.count_include_pad));
      if (begin < end) add_share(sum + begin - from, end - begin, share);
    }
  }
}

// Rows [top, bottom) of one plane's gradient. Neighbouring rows under the same windows are equal.
template <class S>
void avg_plane_backward(const Pool2dParams& p, const S* g, S* dx, int64_t top, int64_t bottom) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p), w = axis_w(p);
  A sum[kColumns + V::N];
  for (int64_t from = 0; from < w.in; from += kColumns) {
    const int64_t to = min64(w.in, from + kColumns);
    int64_t low = -1, high = -1;
    for (int64_t ih = top; ih < bottom; ++ih) {
      const int64_t first = h.low(ih), last = h.high(ih);
      if (first != low || last != high) share_row(p, h, w, g, low = first, high = last, from, to, sum);
      S* const row = dx + ih * w.in;
      for (int64_t c = from; c < to; c += V::N) store_upto(V::load(sum + c - from), row + c, to - c);
    }
  }
}

constexpr int64_t kPlane = 4096;  // elements of a small plane

// A small plane's gradient: each window adds its share to its inputs.
template <class S>
void avg_small_plane_backward(const Pool2dParams& p, const Columns& h, const int64_t* rows, const Columns& w,
                              const int64_t* columns, const S* g, S* dx) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t width = p.w.in, size = p.h.in * width;
  A sums[kPlane + V::N];
  for (int64_t i = 0; i < size; i += V::N) V::zero().store(sums + i);
  for (int64_t oh = 0; oh < h.count; ++oh) {
    A* const top = sums + (h.first[oh] + h.begin[oh]) * width;
    for (int64_t ow = 0; ow < w.count; ++ow) {
      const A share = to_acc(*g++) / A(p.divisor ? p.divisor : rows[oh] * columns[ow]);
      const int64_t count = w.end[ow] - w.begin[ow];
      A* row = top + w.first[ow] + w.begin[ow];
      const int64_t taps = h.end[oh] - h.begin[oh];
      if (kVecBytes == 64 && width >= V::N)
        for (int64_t i = 0; i < taps; ++i) add_share<true>(row + i * width, count, share);
      else
        for (int64_t i = 0; i < taps; ++i) add_share(row + i * width, count, share);
    }
  }
  for_vectors<V::N>(size, [&](int64_t i, int lanes) { store_some(V::load(sums + i), dx + i, lanes); });
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

template <class S>
void avg_small_planes_backward(const Pool2dParams& p) {
  const Axis all_h = axis_h(p), all_w = axis_w(p);
  const Columns h(all_h, 0), w(all_w, 0);
  int64_t rows[Columns::kMost], columns[Columns::kMost];
  for (int64_t o = 0; o < h.count; ++o) rows[o] = all_h.count(o, p.count_include_pad);
  for (int64_t o = 0; o < w.count; ++o) columns[o] = all_w.count(o, p.count_include_pad);
  const int64_t plane_in = p.h.in * p.w.in, plane_out = p.h.out * p.w.out;
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / plane_in), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      avg_small_plane_backward(p, h, rows, w, columns, static_cast<const S*>(p.grad_output) + plane * plane_out,
                               static_cast<S*>(p.grad_input) + plane * plane_in);
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

bool is_short(const Pool2dParams& p) { return p.w.out <= 2; }

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
    const Axis h = axis_h(p), w = axis_w(p);
    const int64_t grain = max64(1, kGrain / (w.out * w.kernel * h.kernel));
    parallel_for(0, p.batch * p.channels * h.out, grain, [&](int64_t begin, int64_t end) {
      for (int64_t from = 0; from < w.out; from += Columns::kMost) {
        const Columns columns(w, from);
        for (int64_t r = begin, plane = begin / h.out, oh = begin % h.out; r < end; ++r) {
          avg_row(p, h, columns, x + plane * h.in * w.in, y + r * w.out, oh);
          if (++oh == h.out) oh = 0, ++plane;
        }
      }
    });
    return Status::ok;
  });
}

Status avg_pool2d_backward_any(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.h.in * p.w.in <= kPlane && p.h.out <= Columns::kMost && p.w.out <= Columns::kMost) {
      avg_small_planes_backward<S>(p);
      return Status::ok;
    }
    const S* g = static_cast<const S*>(p.grad_output);
    S* dx = static_cast<S*>(p.grad_input);
    const int64_t rows = p.h.in;
    parallel_for(0, p.batch * p.channels * rows, max64(1, kGrain / (p.w.in * 2)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin, next; r < end; r = next) {
        const int64_t plane = r / rows, first = plane * rows;
        next = min64(end, first + rows);
        avg_plane_backward(p, g + plane * p.h.out * p.w.out, dx + first * p.w.in, r - first, next - first);
      }
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
