// Pooling of channels_last tensors: the lanes are neighbouring channels, whatever the windows.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements read per thread at least

// One window, all channels. x points at the image [H, W, C].
template <class S, class O>
void max_window(const Pool2dParams& p, const Axis& h, const Axis& w, const S* x, S* y, O* offsets, int64_t oh,
                int64_t ow) {
  using V = Vec<acc_t<S>>;
  const int64_t i0 = h.begin(oh), i1 = h.end(oh), j0 = w.begin(ow), j1 = w.end(ow), channels = p.channels;
  const S* corner = x + (h.first(oh) * w.in + w.first(ow)) * channels;
  for_vectors<V::N>(channels, [&](int64_t c, int lanes) {
    V best = V::set1(kLowest<acc_t<S>>);
    if (!offsets) {
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) {
          const V v = load_some(corner + (i * h.dilation * w.in + j * w.dilation) * channels + c, lanes);
          best = {beats(v, best) ? v.v : best.v};
        }
    } else {
      Taps<acc_t<S>> taps(i0 * w.kernel + j0);
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) {
          const V v = load_some(corner + (i * h.dilation * w.in + j * w.dilation) * channels + c, lanes);
          taps.update(best, v, i * w.kernel + j);
        }
      taps.store(offsets + c, lanes);
    }
    store_some(best, y + c, lanes);
  });
}

template <class S, class O>
void max_pixel_backward(const Pool2dParams& p, const Axis& h, const Axis& w, const S* g, const O* offsets, S* dx,
                        int64_t ih, int64_t iw) {
  using V = Vec<acc_t<S>>;
  const int64_t oh0 = h.low(ih), oh1 = h.high(ih), ow0 = w.low(iw), ow1 = w.high(iw), channels = p.channels;
  for_vectors<V::N>(channels, [&](int64_t c, int lanes) {
    V sum = V::zero();
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const int64_t i = h.tap(ih, oh);
      if (i < 0) continue;
      for (int64_t ow = ow0; ow < ow1; ++ow) {
        const int64_t j = w.tap(iw, ow), at = (oh * w.out + ow) * channels + c;
        if (j < 0) continue;
        sum = add_where(sum, load_taps<acc_t<S>>(offsets + at, lanes), i * w.kernel + j, load_some(g + at, lanes));
      }
    }
    store_some(sum, dx + c, lanes);
  });
}

template <class S>
void avg_window(const Pool2dParams& p, const Axis& h, const Axis& w, const S* x, S* y, int64_t oh, int64_t ow) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t i0 = h.begin(oh), i1 = h.end(oh), j0 = w.begin(ow), j1 = w.end(ow), channels = p.channels;
  const S* corner = x + (h.first(oh) * w.in + w.first(ow)) * channels;
  const V divisor = V::set1(A(p.divisor ? p.divisor : h.count(oh, p.count_include_pad) * w.count(ow, p.count_include_pad)));
  for_vectors<V::N>(channels, [&](int64_t c, int lanes) {
    V sum = V::zero();
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j) sum = sum + load_some(corner + (i * w.in + j) * channels + c, lanes);
    store_some(sum / divisor, y + c, lanes);
  });
}

template <class S>
void avg_pixel_backward(const Pool2dParams& p, const Axis& h, const Axis& w, const S* g, S* dx, int64_t ih, int64_t iw) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t oh0 = h.low(ih), oh1 = h.high(ih), ow0 = w.low(iw), ow1 = w.high(iw), channels = p.channels;
  for_vectors<V::N>(channels, [&](int64_t c, int lanes) {
    V sum = V::zero();
    for (int64_t oh = oh0; oh < oh1; ++oh)
      for (int64_t ow = ow0; ow < ow1; ++ow) {
        const int64_t count = h.count(oh, p.count_include_pad) * w.count(ow, p.count_include_pad);
        sum = sum + load_some(g + (oh * w.out + ow) * channels + c, lanes) / V::set1(A(p.divisor ? p.divisor : count));
      }
    store_some(sum, dx + c, lanes);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(image, row, column) for every pixel of an [rows, columns] plane of every image; a pixel reads `taps` vectors.
template <class F>
void for_pixels(const Pool2dParams& p, int64_t rows, int64_t columns, int64_t taps, const F& f) {
  const int64_t grain = max64(1, kGrain / max64(1, columns * taps * p.channels));
  parallel_for(0, p.batch * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < columns; ++c) f(r / rows, r % rows, c);
  });
}

template <class S, class O>
void max_forward(const Pool2dParams& p) {
  const Axis h = axis_h(p), w = axis_w(p);
  const S* x = static_cast<const S*>(p.input);
  S* y = static_cast<S*>(p.output);
  O* offsets = static_cast<O*>(p.offsets);
  for_pixels(p, h.out, w.out, h.kernel * w.kernel, [&](int64_t n, int64_t oh, int64_t ow) {
    const int64_t at = ((n * h.out + oh) * w.out + ow) * p.channels;
    max_window<S, O>(p, h, w, x + n * h.in * w.in * p.channels, y + at, offsets ? offsets + at : nullptr, oh, ow);
  });
}
template <class S, class O>
void max_backward(const Pool2dParams& p) {
  const Axis h = axis_h(p), w = axis_w(p);
  const S* g = static_cast<const S*>(p.grad_output);
  S* dx = static_cast<S*>(p.grad_input);
  const O* offsets = static_cast<const O*>(p.offsets);
  for_pixels(p, h.in, w.in, 2, [&](int64_t n, int64_t ih, int64_t iw) {
    const int64_t at = n * h.out * w.out * p.channels;
    max_pixel_backward<S, O>(p, h, w, g + at, offsets + at, dx + ((n * h.in + ih) * w.in + iw) * p.channels, ih, iw);
  });
}

}  // namespace

Status max_pool2d_forward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) max_forward<S, int32_t>(p);
    else max_forward<S, uint8_t>(p);
    return Status::ok;
  });
}

Status max_pool2d_backward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) max_backward<S, int32_t>(p);
    else max_backward<S, uint8_t>(p);
    return Status::ok;
  });
}

Status avg_pool2d_forward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Axis h = axis_h(p), w = axis_w(p);
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    for_pixels(p, h.out, w.out, h.kernel * w.kernel, [&](int64_t n, int64_t oh, int64_t ow) {
      avg_window(p, h, w, x + n * h.in * w.in * p.channels, y + ((n * h.out + oh) * w.out + ow) * p.channels, oh, ow);
    });
    return Status::ok;
  });
}

Status avg_pool2d_backward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Axis h = axis_h(p), w = axis_w(p);
    const S* g = static_cast<const S*>(p.grad_output);
    S* dx = static_cast<S*>(p.grad_input);
    for_pixels(p, h.in, w.in, 2, [&](int64_t n, int64_t ih, int64_t iw) {
      avg_pixel_backward(p, h, w, g + n * h.out * w.out * p.channels, dx + ((n * h.in + ih) * w.in + iw) * p.channels,
                         ih, iw);
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
