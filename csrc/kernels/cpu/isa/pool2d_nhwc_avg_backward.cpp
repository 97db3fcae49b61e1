// Backward of average pooling on channels_last tensors. A window sends the same to each of its rows: a row
// of gradients is spread over the columns once, and each input row adds up the spread rows that cover it.
#include "pool2d_nhwc.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kRing = 8192;    // elements of the spread rows kept
constexpr int64_t kShares = 8192;  // elements of the shares of one row's windows
constexpr int64_t kColumns = 256;  // input columns taken together
constexpr int64_t kWindows = 512;  // windows taken together

// What fits the buffers: columns and channels taken together, and the windows over so many columns.
struct Room {
  int64_t columns, channels;
  template <int N>
  static Room of(const Pool2dParams& p, int64_t slots, Constant<N>) {
    const Axis w = axis_w(p);
    const int64_t ring = kRing / slots - N;
    // Neighbouring tiles share windows: rather fewer channels than fewer columns than windows have.
    const int64_t wanted = min64(w.in, w.kernel), least = min64(round_up(p.channels, N), 4 * N);
    int64_t channels = max64(least, ring / wanted / N * N);
    const auto columns_of = [&](int64_t windows) {
      return w.adaptive ? (windows - 2) * w.in / w.out : windows * w.stride - w.kernel + 1;
    };
    for (;; channels -= N) {
      const int64_t taken = min64(p.channels, channels);
      const int64_t columns =
          min64(min64(kColumns, w.in), min64(ring / taken, columns_of(min64(kWindows, kShares / taken))));
      if (columns > 0 || channels <= N) return {columns, taken};
    }
  }
};

// Input columns [begin, end) and channels [from, from + count); the windows over the columns, counted from `low`.
template <class A>
struct Tile {
  int64_t begin, end, from, count, low, high;
  int32_t first[kColumns], last[kColumns];  // windows over each column
  A taps[kWindows];                         // what each window counts along its row

  Tile(const Pool2dParams& p, const Axis& w, int64_t column, int64_t channel, const Room& room)
      : begin(column),
        end(min64(w.in, column + room.columns)),
        from(channel),
        count(min64(room.channels, p.channels - channel)),
        low(w.low(begin)),
        high(w.high(end - 1)) {
    for (int64_t x = begin; x < end; ++x)
      first[x - begin] = int32_t(w.low(x) - low), last[x - begin] = int32_t(w.high(x) - low);
    for (int64_t o = low; o < high; ++o) taps[o - low] = A(p.divisor ? 1 : w.count(o, p.count_include_pad));
  }
};

// What the windows of one row send to each input below them. Whole vectors are read as far as the tensor goes, `left`
// elements, and written: what is too much is overwritten by the next.
template <class S, class A>
FASTNN_INLINE void share_row(const Tile<A>& t, int64_t channels, A rows, const S* g, int64_t left, A* shares) {
  using V = Vec<A>;
  for (int64_t o = 0; o < t.high - t.low; ++o) {
    const V taps = V::set1(rows * t.taps[o]);
    const int64_t at = (t.low + o) * channels + t.from;
    for (int64_t c = 0; c < t.count; c += V::N)
      (load_upto(g + at + c, left - at - c) / taps).store(shares + o * t.count + c);
  }
}

// Stored past the caches (`kStream`: whole aligned vectors), or as far as `left` elements go.
template <bool kStream, class S, class A>
FASTNN_INLINE void store_sum(Vec<A> sum, S* to, int64_t left) {
#if defined(__AVX512F__)
  if constexpr (kStream && __is_same(S, float)) return _mm512_stream_ps(to, sum.v);
#endif
  store_upto(sum, to, left);
}

// The sum of the shares over each input column, `step` elements apart. What may be written: `left` elements where the
// columns follow each other, for what is too much is overwritten by the next; else each column's own.
template <bool kStream, class S, class A>
FASTNN_INLINE void spread_row(const Tile<A>& t, const A* shares, S* to, int64_t step, int64_t left) {
  using V = Vec<A>;
  for (int64_t x = 0; x < t.end - t.begin; ++x, to += step, left -= step) {
    const A *const first = shares + t.first[x] * t.count, *const last = shares + t.last[x] * t.count;
    const int64_t room = step == t.count ? left : t.count;
    for (int64_t c = 0; c < t.count; c += V::N) {
      V sum = first < last ? V::load(first + c) : V::zero();
      for (const A* share = first + t.count; share < last; share += t.count) sum = sum + V::load(share + c);
      store_sum<kStream>(sum, to + c, room - c);
    }
  }
}

// dx[0, n) becomes the sum of the rows, each from `at` on. `left`: how much may be written, since it is written later.
template <bool kStream, class S, class A>
FASTNN_INLINE void add_rows(const A* const* rows, int64_t count, int64_t at, S* dx, int64_t n, int64_t left) {
  using V = Vec<A>;
  for (int64_t i = 0; i < n; i += V::N) {
    V sum = V::zero();
    for (int64_t k = 0; k < count; ++k) sum = sum + V::load(rows[k] + at + i);
    store_sum<kStream>(sum, dx + i, left - i);
  }
}

// Input rows [top, bottom) of one image; `left`: elements of the gradient's tensor from the image's on. Where no row is
// under two windows (`kApart`) the shares are spread right into it.
template <bool kStream, bool kApart, class S, class A>
void tile_backward(const Pool2dParams& p, const Axis& h, const Tile<A>& t, int64_t slots, const S* g, int64_t left,
                   S* dx, int64_t top, int64_t bottom) {
  const int64_t channels = p.channels, columns = t.end - t.begin, row = p.w.in * channels, out_row = p.w.out * channels;
  const int64_t n = columns * t.count, pitch = n + Vec<A>::N;
  A ring[kApart ? 1 : kRing], shares[kShares + Vec<A>::N];
  const A* rows[kRing / Vec<A>::N];
  int64_t next = 0;
  for (int64_t ih = top; ih < bottom; ++ih) {
    const int64_t low = h.low(ih), high = h.high(ih);
    for (next = max64(next, low); next < high; ++next) {
      const int64_t taps = p.divisor ? p.divisor : h.count(next, p.count_include_pad);
      share_row(t, channels, A(taps), g + next * out_row, left - next * out_row, shares);
      if constexpr (!kApart) spread_row<false>(t, shares, ring + next % slots * pitch, t.count, pitch);
    }
    S* const to = dx + ih * row + t.begin * channels + t.from;
    const int64_t room = n == row ? (bottom - ih) * row : n;
    if (kApart && low < high) {
      spread_row<kStream>(t, shares, to, channels, room);
      continue;
    }
    for (int64_t oh = low; oh < high; ++oh) rows[oh - low] = ring + oh % slots * pitch;
    if (t.count == channels) {
      add_rows<kStream>(rows, high - low, 0, to, n, room);
      continue;
    }
    for (int64_t x = 0; x < columns; ++x)
      add_rows<kStream>(rows, high - low, x * t.count, to + x * channels, t.count, t.count);
  }
}

template <class S>
void backward_by_rows(const Pool2dParams& p, const Room& room, int64_t slots) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t image_in = h.in * w.in * p.channels, image_out = h.out * w.out * p.channels;
  // Pixels shorter than a vector are rather spread once and copied.
  const bool apart = slots == 1 && p.channels >= Vec<A>::N;
  const bool stream = kVecBytes == 64 && leaves_caches(p) && p.channels % 16 == 0;
  const S* const g = static_cast<const S*>(p.grad_output);
  S* const dx = static_cast<S*>(p.grad_input);
  for_row_ranges(p, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < p.channels; c += room.channels)
      for (int64_t x = 0; x < w.in; x += room.columns) {
        const Tile<A> t(p, w, x, c, room);
        for_bands(p, begin, end, [&](int64_t n, int64_t top, int64_t bottom) {
          const S* const from = g + n * image_out;
          const int64_t left = (p.batch - n) * image_out;
          S* const to = dx + n * image_in;
          if (stream && apart) tile_backward<true, true>(p, h, t, slots, from, left, to, top, bottom);
          else if (stream) tile_backward<true, false>(p, h, t, slots, from, left, to, top, bottom);
          else if (apart) tile_backward<false, true>(p, h, t, slots, from, left, to, top, bottom);
          else tile_backward<false, false>(p, h, t, slots, from, left, to, top, bottom);
        });
      }
#if defined(__AVX512F__)
    if (stream) _mm_sfence();
#endif
  });
}

// Any windows: one input pixel at a time, from the windows that cover it.
template <class S>
void backward_by_pixels(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t channels = p.channels;
  for_input_pixels(p, [&](int64_t n, int64_t ih, int64_t iw) {
    const S* g = static_cast<const S*>(p.grad_output) + n * h.out * w.out * channels;
    S* dx = static_cast<S*>(p.grad_input) + ((n * h.in + ih) * w.in + iw) * channels;
    const int64_t oh0 = h.low(ih), oh1 = h.high(ih), ow0 = w.low(iw), ow1 = w.high(iw);
    for_vectors<V::N>(channels, [&](int64_t c, int lanes) {
      V sum = V::zero();
      for (int64_t oh = oh0; oh < oh1; ++oh)
        for (int64_t ow = ow0; ow < ow1; ++ow) {
          const int64_t count = h.count(oh, p.count_include_pad) * w.count(ow, p.count_include_pad);
          sum =
              sum + load_some(g + (oh * w.out + ow) * channels + c, lanes) / V::set1(A(p.divisor ? p.divisor : count));
        }
      store_some(sum, dx + c, lanes);
    });
  });
}

}  // namespace

Status avg_pool2d_backward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int N = Vec<acc_t<S>>::N;
    const int64_t slots = most_covers(axis_h(p));
    if (slots * 2 * N > kRing) {
      backward_by_pixels<S>(p);
      return Status::ok;
    }
    const Room room = Room::of(p, slots, Constant<N>{});
    if (room.columns > 0) backward_by_rows<S>(p, room, slots);
    else backward_by_pixels<S>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
