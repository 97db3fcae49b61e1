// Pooling of channels_last tensors: the lanes are neighbouring channels, whatever the windows.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements read per thread at least

// The taps of one window that lie inside the input, and the distance between their rows and columns in elements.
struct Window {
  int64_t i0, i1, j0, j1, row_step, column_step;
};

// kVectors neighbouring vectors of channels of one window, so that walking the taps is paid for once.
template <int kVectors, class S, class O>
FASTNN_INLINE void max_vectors(const Window& t, int64_t kernel, const S* first, S* y, O* offsets, int lanes) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V best[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) best[k] = V::set1(kLowest<A>);
  if (!offsets) {
    NanWatch<A> nan;
    const S* row = first;
    for (int64_t i = t.i0; i < t.i1; ++i, row += t.row_step) {
      const S* at = row;
      for (int64_t j = t.j0; j < t.j1; ++j, at += t.column_step)
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) {
          const V v = load_some(at + k * V::N, lanes);
          nan.see(v, v);
          best[k] = max(v, best[k]);
        }
    }
    if (__builtin_expect(!nan.any(), 1)) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) store_some(best[k], y + k * V::N, lanes);
      return;
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) best[k] = V::set1(kLowest<A>);
  }
  Taps<A> taps[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) taps[k] = Taps<A>(t.i0 * kernel + t.j0);
  const S* row = first;
  for (int64_t i = t.i0; i < t.i1; ++i, row += t.row_step) {
    const S* at = row;
    for (int64_t j = t.j0; j < t.j1; ++j, at += t.column_step)
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) taps[k].update(best[k], load_some(at + k * V::N, lanes), i * kernel + j);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    store_some(best[k], y + k * V::N, lanes);
    if (offsets) taps[k].store(offsets + k * V::N, lanes);
  }
}

// One window, all channels. x points at the image [H, W, C].
template <class S, class O>
void max_window(const Pool2dParams& p, const Axis& h, const Axis& w, const S* x, S* y, O* offsets, int64_t oh,
                int64_t ow) {
  using V = Vec<acc_t<S>>;
  const int64_t channels = p.channels;
  const Window t = {h.begin(oh), h.end(oh), w.begin(ow), w.end(ow), h.dilation * w.in * channels, w.dilation * channels};
  const S* first = x + ((h.first(oh) + t.i0 * h.dilation) * w.in + w.first(ow) + t.j0 * w.dilation) * channels;
  int64_t c = 0;
  for (; c + 4 * V::N <= channels; c += 4 * V::N)
    max_vectors<4>(t, w.kernel, first + c, y + c, offsets ? offsets + c : offsets, V::N);
  for (; c < channels; c += V::N)
    max_vectors<1>(t, w.kernel, first + c, y + c, offsets ? offsets + c : offsets, int(min64(V::N, channels - c)));
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

template <int kVectors, class S>
FASTNN_INLINE void avg_vectors(const Window& t, const S* first, S* y, const Divide<acc_t<S>>& mean, int lanes) {
  using V = Vec<acc_t<S>>;
  V sum[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) sum[k] = V::zero();
  const S* row = first;
  for (int64_t i = t.i0; i < t.i1; ++i, row += t.row_step) {
    const S* at = row;
    for (int64_t j = t.j0; j < t.j1; ++j, at += t.column_step)
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) sum[k] = sum[k] + load_some(at + k * V::N, lanes);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) store_some(mean(sum[k]), y + k * V::N, lanes);
}

template <class S>
void avg_window(const Pool2dParams& p, const Axis& h, const Axis& w, const S* x, S* y, int64_t oh, int64_t ow) {
  using V = Vec<acc_t<S>>;
  const int64_t channels = p.channels;
  const Window t = {h.begin(oh), h.end(oh), w.begin(ow), w.end(ow), w.in * channels, channels};
  const S* first = x + ((h.first(oh) + t.i0) * w.in + w.first(ow) + t.j0) * channels;
  const Divide<acc_t<S>> mean(p.divisor ? p.divisor
                                        : h.count(oh, p.count_include_pad) * w.count(ow, p.count_include_pad));
  int64_t c = 0;
  for (; c + 4 * V::N <= channels; c += 4 * V::N) avg_vectors<4>(t, first + c, y + c, mean, V::N);
  for (; c < channels; c += V::N) avg_vectors<1>(t, first + c, y + c, mean, int(min64(V::N, channels - c)));
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

// ---- backward by windows -------------------------------------------------------------------------------------------

// Calls f(output pixel, first row, first column, taps, count) for every window of an image; an average divides by count.
template <class F>
FASTNN_INLINE void for_taps(const Pool2dParams& p, const Axis& h, const Axis& w, const F& f) {
  for (int64_t oh = 0; oh < h.out; ++oh) {
    const int64_t top = h.first(oh), i0 = h.begin(oh), i1 = h.end(oh), rows = h.count(oh, p.count_include_pad);
    for (int64_t ow = 0; ow < w.out; ++ow) {
      const int64_t left = w.first(ow), j0 = w.begin(ow), j1 = w.end(ow);
      const int64_t count = p.divisor ? p.divisor : rows * w.count(ow, p.count_include_pad);
      const Window t = {i0, i1, j0, j1, h.dilation * w.in * p.channels, w.dilation * p.channels};
      f(oh * w.out + ow, top, left, t, count);
    }
  }
}

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

// What becomes of the vectors written: added to what is there, where windows overlap; stored; or, whole and aligned,
// stored past the caches.
enum class Write { kAdd, kStore, kStream };

template <Write kWrite, class S, class V>
FASTNN_INLINE void write(V v, S* to, int lanes) {
#if defined(__AVX512F__)
  if constexpr (kWrite == Write::kStream && __is_same(S, float)) return _mm512_stream_ps(to, v.v);
#endif
  store_some(kWrite == Write::kAdd ? load_some(to, lanes) + v : v, to, lanes);
}

template <int kVectors, Write kWrite, class S, class Value>
FASTNN_INLINE void spread_vectors(const Window& t, int64_t kernel, const S* g, int64_t out, S* first, const Value& value,
                                  int64_t count, int lanes) {
  using V = Vec<acc_t<S>>;
  typename Value::Source source[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) source[k] = value.load(out + k * V::N, lanes, load_some(g + k * V::N, lanes), count);
  S* row = first;
  for (int64_t i = t.i0; i < t.i1; ++i, row += t.row_step) {
    S* pixel = row;
    for (int64_t j = t.j0; j < t.j1; ++j, pixel += t.column_step)
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k)
        write<kWrite>(value.at(source[k], i * kernel + j), pixel + k * V::N, lanes);
  }
}

// Channels [from, to) of one image: what windows do not reach is cleared, and each window adds to (or, where windows
// do not overlap, writes) its inputs.
template <Write kWrite, class S, class Value>
FASTNN_INLINE void spread_windows(const Pool2dParams& p, const Axis& h, const Axis& w, const S* g, S* dx, int64_t from,
                                  int64_t to, const Value& value) {
  using V = Vec<acc_t<S>>;
  const int64_t channels = p.channels;
  if (kWrite == Write::kAdd || !windows_cover(p)) {
    if (to - from == channels) __builtin_memset(static_cast<void*>(dx), 0, size_t(h.in * w.in * channels) * sizeof(S));
    else
      for (int64_t pixel = 0; pixel < h.in * w.in; ++pixel)
        __builtin_memset(static_cast<void*>(dx + pixel * channels + from), 0, size_t(to - from) * sizeof(S));
  }
  for_taps(p, h, w, [&](int64_t out, int64_t top, int64_t left, const Window& t, int64_t count) {
    S* first = dx + ((top + t.i0 * h.dilation) * w.in + left + t.j0 * w.dilation) * channels;
    int64_t c = from;
    for (; c + 4 * V::N <= to; c += 4 * V::N)
      spread_vectors<4, kWrite>(t, w.kernel, g + out * channels + c, out * channels + c, first + c, value, count, V::N);
    for (; c < to; c += V::N)
      spread_vectors<1, kWrite>(t, w.kernel, g + out * channels + c, out * channels + c, first + c, value, count,
                                  int(min64(V::N, to - c)));
  });
}

template <class S>
struct MaxValue {
  using A = acc_t<S>;
  struct Source {
    Vec<A> g;
    typename Vec<A>::Int taps;
  };
  const uint8_t* taps;
  FASTNN_VEC_FN Source load(int64_t at, int lanes, Vec<A> g, int64_t) const { return {g, load_taps<A>(taps + at, lanes)}; }
  FASTNN_VEC_FN Vec<A> at(const Source& s, int64_t code) const { return only_where(s.taps, code, s.g); }
};
template <class S>
struct AvgValue {
  using A = acc_t<S>;
  using Source = Vec<A>;
  FASTNN_VEC_FN Vec<A> load(int64_t, int, Vec<A> g, int64_t count) const { return g / Vec<A>::set1(A(count)); }
  FASTNN_VEC_FN Vec<A> at(Vec<A> share, int64_t) const { return share; }
};

// 16-bit sums need the wider accumulator that gathering by pixels gives.
FASTNN_INLINE bool fits_spread(const Pool2dParams& p) {
  return !windows_overlap(p) || p.dtype == DType::f32 || p.dtype == DType::f64;
}
// Beyond so many taps a window is cheaper element by element than comparing all of them.
constexpr int64_t kSpreadTaps = 16;

// Channels [from, to) of one image of a maximum's gradient, each added at its own tap.
template <class S>
void scatter_channels(const Pool2dParams& p, const Axis& h, const Axis& w, const S* g, const uint8_t* taps, S* dx,
                      int64_t from, int64_t to) {
  int64_t distance[256];
  const int64_t channels = p.channels, image = h.in * w.in * channels;
  for (int64_t tap = 0; tap < 256; ++tap) {
    const int64_t row = tap / w.kernel, column = tap % w.kernel;
    distance[tap] = row < h.kernel ? (row * h.dilation * w.in + column * w.dilation) * channels : int64_t(1) << 62;
  }
  for (int64_t pixel = 0; pixel < h.in * w.in; ++pixel)
    __builtin_memset(static_cast<void*>(dx + pixel * channels + from), 0, size_t(to - from) * sizeof(S));
  for (int64_t oh = 0; oh < h.out; ++oh)
    for (int64_t ow = 0; ow < w.out; ++ow) {
      const int64_t corner = (h.first(oh) * w.in + w.first(ow)) * channels, out = (oh * w.out + ow) * channels;
#pragma GCC unroll 4
      for (int64_t c = from; c < to; ++c) {
        const int64_t at = corner + distance[taps[out + c]] + c;
        if (__builtin_expect(uint64_t(at) < uint64_t(image), 1)) dx[at] += g[out + c];
      }
    }
}

template <class S, class MakeValue>
void spread(const Pool2dParams& p, const MakeValue& make_value) {
  const Axis h = axis_h(p), w = axis_w(p);
  constexpr int64_t kChannels = 256;  // a unit of work: whole cache lines of one image
  const int64_t blocks = p.batch >= 4 ? 1 : ceil_div(p.channels, kChannels), size = blocks == 1 ? p.channels : kChannels;
  const int64_t grain = max64(1, kGrain / (h.in * w.in * size));
  const bool stream = kVecBytes == 64 && leaves_caches(p) && windows_cover(p) && p.channels % 16 == 0;
  parallel_for(0, p.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / blocks, from = unit % blocks * size, to = min64(p.channels, from + size);
      const S* g = static_cast<const S*>(p.grad_output) + image * h.out * w.out * p.channels;
      S* dx = static_cast<S*>(p.grad_input) + image * h.in * w.in * p.channels;
      const auto value = make_value(image * h.out * w.out * p.channels);
      if constexpr (__is_same(decltype(value), const MaxValue<S>) && __is_same(S, acc_t<S>)) {
        if (windows_overlap(p) && h.kernel * w.kernel > kSpreadTaps) {
          scatter_channels(p, h, w, g, value.taps, dx, from, to);
          continue;
        }
      }
      if (windows_overlap(p)) spread_windows<Write::kAdd>(p, h, w, g, dx, from, to, value);
      else if (stream) spread_windows<Write::kStream>(p, h, w, g, dx, from, to, value);
      else spread_windows<Write::kStore>(p, h, w, g, dx, from, to, value);
    }
#if defined(__AVX512F__)
    if (stream) _mm_sfence();
#endif
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(image, row, column) for every pixel of an [rows, columns] plane of every image; a pixel reads `taps` vectors.
template <class F>
void for_pixels(const Pool2dParams& p, int64_t rows, int64_t columns, int64_t taps, const F& f) {
  const int64_t grain = max64(1, kGrain / max64(1, columns * taps * p.channels));
  parallel_for(0, p.batch * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = r / rows, row = r % rows;
      for (int64_t c = 0; c < columns; ++c) f(image, row, c);
    }
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
    const uint8_t* taps = static_cast<const uint8_t*>(p.offsets);
    if (!p.wide && fits_spread(p)) spread<S>(p, [&](int64_t at) { return MaxValue<S>{taps + at}; });
    else if (p.wide) max_backward<S, int32_t>(p);
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
    if (fits_spread(p)) {
      spread<S>(p, [](int64_t) { return AvgValue<S>(); });
      return Status::ok;
    }
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
