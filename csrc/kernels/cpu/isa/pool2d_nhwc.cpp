// Forward pooling of channels_last tensors: the lanes are neighbouring channels, whatever the windows.
#include "pool2d_nhwc.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

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

// Calls f(vectors, channel, lanes) for the vectors of a pixel's channels from c on, four of them together or what is
// left: the last one whole, over the one before, where it would else go lane by lane.
template <int N, class F>
FASTNN_INLINE void for_channels(int64_t c, int64_t channels, const F& f) {
  for (; c + 4 * N <= channels; c += 4 * N) f(Constant<4>{}, c, N);
  if (c + 3 * N <= channels) f(Constant<3>{}, c, N), c += 3 * N;
  else if (c + 2 * N <= channels) f(Constant<2>{}, c, N), c += 2 * N;
  else if (c + N <= channels) f(Constant<1>{}, c, N), c += N;
  if (c < channels)
    kVecBytes<64 && channels> N ? f(Constant<1>{}, channels - N, N) : f(Constant<1>{}, c, int(channels - c));
}

// The same for pixels of at most half a vector: the lanes are all channels of as many neighbouring pixels, in every
// lane those of one channel. False when a NaN was met.
template <class S, class O>
bool max_pixels(const Window& t, int64_t kernel, int64_t channels, const S* first, S* y, O* offsets) {
  using A = acc_t<S>;
  using V = Vec<A>;
  using Int = typename V::Int;
  const int64_t pixels = V::N / channels, step = pixels * channels, length = (t.j1 - t.j0) * channels;
  V best = V::set1(kLowest<A>);
  NanWatch<A> nan;
  Int pixel{};
  for (int l = 0; l < V::N; ++l) pixel[l] = l / int(channels);
  Taps<A> taps(t.i0 * kernel + t.j0);
  taps.taps -= pixel;
  for (int64_t i = t.i0; i < t.i1; ++i, first += t.row_step) {
    int64_t code = i * kernel + t.j0;
    for (int64_t at = 0; at < length; at += step, code += pixels) {
      const V v = length - at >= V::N ? V::load(first + at) : V::load_n(first + at, length - at, kLowest<A>);
      nan.see(v, v);
      if (offsets) taps.update(best, v, code);
      else best = max(v, best);
    }
  }
  if (__builtin_expect(nan.any(), 0)) return false;
  taps.taps += pixel;
  for (int64_t c = 0; c < channels; ++c) {
    A value = best.v[c];
    auto tap = taps.taps[c];
    for (int64_t l = c + channels; l < V::N; l += channels)
      if (best.v[l] > value || (best.v[l] == value && taps.taps[l] < tap)) value = best.v[l], tap = taps.taps[l];
    y[c] = from_acc<S>(value);
    if (offsets) offsets[c] = O(tap);
  }
  return true;
}

// Fetches what the window at the same place `rows` further down is the first to read.
template <class S>
FASTNN_INLINE void prefetch_below(const Pool2dParams& p, const S* first, int64_t rows) {
  constexpr int64_t kLine = 64 / sizeof(S);
  const int64_t row = p.w.in * p.channels, run = p.w.stride * p.channels;
  for (int64_t i = 0; i < min64(p.h.stride, p.h.kernel); ++i)
    for (int64_t c = 0; c < run; c += kLine) __builtin_prefetch(first + (rows + i) * row + c);
}
// How many rows further down: at least 4 KB, whole windows; 0 where the caches surely hold the tensor. Beyond, rows a
// few KB apart wait for every line that is not there (of 12 MB: 3 to 5 times as slow), all there it is 1.0 to 1.2.
// Windows of whole rows read memory in order: 8x64x56x56 to 1x1 took 1.4 of the time.
template <class S>
FASTNN_INLINE int64_t rows_ahead(const Pool2dParams& p) {
  const int64_t row = p.w.in * p.channels * int64_t(sizeof(S));
  if (p.adaptive || p.w.kernel >= p.w.in || p.batch * p.h.in * row <= 4 << 20 || row > 1 << 17) return 0;
  return round_up(ceil_div(4096, row), p.h.stride) + max64(0, p.h.kernel - p.h.stride);
}

// One row of windows. x points at the image [H, W, C], y and offsets at the row's first window.
template <class S, class O>
void max_row(const Pool2dParams& p, const Axis& h, const Columns& w, const S* x, S* y, O* offsets, int64_t oh) {
  const int64_t channels = p.channels, row = p.w.in * channels;
  const int64_t i0 = h.begin(oh), i1 = h.end(oh), row_step = h.dilation * row, column_step = p.w.dilation * channels;
  const S* const top = x + h.first(oh) * row + i0 * row_step;
  constexpr int kLanes = Vec<acc_t<S>>::N;
  const int64_t ahead = rows_ahead<S>(p);
  for (int64_t o = 0; o < w.count; ++o, y += channels) {
    const Window t = {i0, i1, w.begin[o], w.end[o], row_step, column_step};
    const S* const first = top + w.first[o] * channels + t.j0 * t.column_step;
    if (ahead) prefetch_below(p, first, ahead);
    if (2 * channels <= kLanes && p.w.dilation == 1 && (t.j1 - t.j0) * channels >= 2 * kLanes &&
        max_pixels(t, p.w.kernel, channels, first, y, offsets ? offsets + o * channels : offsets))
      continue;
    for_channels<kLanes>(0, channels, [&](auto vectors, int64_t c, int lanes) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      max_vectors<kVectors>(t, p.w.kernel, first + c, y + c, offsets ? offsets + o * channels + c : offsets, lanes);
    });
  }
}

// Windows of so many pixels do not stay in L1 from one group of channels to the next: eight vectors together there read
// each cache line once and fewer of one set (512 channels to 10x10 windows 0.7 of the time; of 5x5 1.2).
constexpr int64_t kFarTaps = 36;

template <int kVectors, class S>
FASTNN_INLINE void avg_vectors(const Window& t, const S* first, S* y, const Divide<acc_t<S>>& mean, int lanes) {
  using V = Vec<acc_t<S>>;
  V sum[kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) sum[k] = V::zero();
  const S* row = first;
  for (int64_t i = t.i0; i < t.i1; ++i, row += t.row_step) {
    const S* at = row;
    for (int64_t j = t.j0; j < t.j1; ++j, at += t.column_step)
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) sum[k] = sum[k] + load_some(at + k * V::N, lanes);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) store_some(mean(sum[k]), y + k * V::N, lanes);
}

template <class S>
void avg_row(const Pool2dParams& p, const Axis& h, const Columns& w, const S* x, S* y, int64_t oh) {
  using A = acc_t<S>;
  const int64_t channels = p.channels, row = p.w.in * channels, rows = h.count(oh, p.count_include_pad);
  const int64_t i0 = h.begin(oh), i1 = h.end(oh);
  const S* const top = x + (h.first(oh) + i0) * row;
  const Axis all = axis_w(p);
  constexpr int N = Vec<A>::N;
  int64_t count = 0;
  Divide<A> mean(0);
  const int64_t ahead = rows_ahead<S>(p);
  for (int64_t o = 0; o < w.count; ++o, y += channels) {
    const Window t = {i0, i1, w.begin[o], w.end[o], row, channels};
    const int64_t taps = p.divisor ? p.divisor : rows * all.count(w.from + o, p.count_include_pad);
    if (taps != count) count = taps, mean = Divide<A>(taps);
    const S* const first = top + (w.first[o] + t.j0) * channels;
    if (ahead) prefetch_below(p, first, ahead);
    int64_t from = 0;
    if ((t.i1 - t.i0) * (t.j1 - t.j0) >= kFarTaps)
      for (; from + 8 * N <= channels; from += 8 * N) avg_vectors<8>(t, first + from, y + from, mean, N);
    for_channels<N>(from, channels, [&](auto vectors, int64_t c, int lanes) __attribute__((always_inline)) {
      avg_vectors<decltype(vectors)::value>(t, first + c, y + c, mean, lanes);
    });
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(columns, image, row) for each row of windows, which may be cut into parts.
template <class F>
void for_window_rows(const Pool2dParams& p, const F& f) {
  const Axis w = axis_w(p);
  const int64_t grain = max64(1, kGrain / max64(1, w.out * p.h.kernel * w.kernel * p.channels));
  parallel_for(0, p.batch * p.h.out, grain, [&](int64_t begin, int64_t end) {
    for (int64_t from = 0; from < w.out; from += Columns::kMost) {
      const Columns columns(w, from);
      for (int64_t r = begin; r < end; ++r) f(columns, r / p.h.out, r % p.h.out);
    }
  });
}

template <class S, class O>
void max_forward(const Pool2dParams& p) {
  const Axis h = axis_h(p);
  const S* x = static_cast<const S*>(p.input);
  S* y = static_cast<S*>(p.output);
  O* offsets = static_cast<O*>(p.offsets);
  for_window_rows(p, [&](const Columns& w, int64_t n, int64_t oh) {
    const int64_t at = ((n * p.h.out + oh) * p.w.out + w.from) * p.channels;
    max_row<S, O>(p, h, w, x + n * p.h.in * p.w.in * p.channels, y + at, offsets ? offsets + at : nullptr, oh);
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

Status avg_pool2d_forward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Axis h = axis_h(p);
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    for_window_rows(p, [&](const Columns& w, int64_t n, int64_t oh) {
      const int64_t at = ((n * h.out + oh) * p.w.out + w.from) * p.channels;
      avg_row(p, h, w, x + n * h.in * p.w.in * p.channels, y + at, oh);
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
