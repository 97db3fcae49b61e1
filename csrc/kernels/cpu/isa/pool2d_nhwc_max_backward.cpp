// Backward of max pooling on channels_last tensors. Whole vectors of channels are
// compared with every tap of their window; windows of many taps, and the channels
// left, are added one by one at their maximum, as are 16-bit sums, in a buffer.
#include "pool2d_distances.h"
#include "pool2d_nhwc.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kShort = 16;       // channels of a short pixel
constexpr int64_t kClear = 1 << 20;  // elements cleared at a time: less than an image is slower out of the caches
constexpr int64_t kFew = 16;         // windows over a pixel
constexpr int64_t kSums = 1 << 15;   // elements of the buffer in which 16-bit gradients are added up
constexpr int64_t kPlane = 1 << 16;  // elements of that buffer where outputs are few
constexpr int64_t kSparse = 32;      // inputs for each output from which on only sums where outputs are get converted
constexpr int64_t kStarts = 2048;    // windows of a row, or their channels

// What becomes of the vectors written: added to what is there, where windows overlap; stored; or, whole and aligned,
// stored past the caches.
enum class Write { kAdd, kStore, kStream };

// ---- one window ----------------------------------------------------------------------------------------------------

// SIDE: of a whole square window; 0 for any other.
template <int SIDE, int kVectors, Write kWrite, class S>
FASTNN_INLINE void spread_vectors(const Window& t, int64_t kernel, const S* g, const uint8_t* taps, S* first,
                                  int lanes) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V grad[kVectors];
  typename V::Int tap[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k)
    grad[k] = load_some(g + k * V::N, lanes), tap[k] = load_taps<A>(taps + k * V::N, lanes);
  const auto spread = [&](int64_t code, S* pixel) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      S* const to = pixel + k * V::N;
#if defined(__AVX512F__)
      if constexpr (kWrite == Write::kStream && __is_same(S, float)) {
        _mm512_stream_ps(to, only_where(tap[k], code, grad[k]).v);
        continue;
      }
#endif
      const V mine = only_where(tap[k], code, grad[k]);
      store_some(kWrite == Write::kAdd ? load_some(to, lanes) + mine : mine, to, lanes);
    }
  };
  if constexpr (SIDE > 0) {
#pragma GCC unroll 3
    for (int i = 0; i < SIDE; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < SIDE; ++j) spread(i * SIDE + j, first + i * t.row_step + j * t.column_step);
  } else {
    S* row = first;
    for (int64_t i = t.i0; i < t.i1; ++i, row += t.row_step) {
      S* pixel = row;
      for (int64_t j = t.j0; j < t.j1; ++j, pixel += t.column_step) spread(i * kernel + j, pixel);
    }
  }
}

// Channels [0, split) of one window. What is left of a vector is masked; without masks the last vector begins earlier,
// and writes again what the one before it wrote (see vector_channels()).
template <int SIDE, Write kWrite, class S>
FASTNN_INLINE void spread_window(const Window& t, int64_t kernel, const S* g, const uint8_t* taps, S* to,
                                 int64_t split) {
  constexpr int N = Vec<acc_t<S>>::N;
  int64_t c = 0;
  if constexpr (SIDE == 0)
    for (; c + 4 * N <= split; c += 4 * N) spread_vectors<SIDE, 4, kWrite>(t, kernel, g + c, taps + c, to + c, N);
  for (; c + N <= split; c += N) spread_vectors<SIDE, 1, kWrite>(t, kernel, g + c, taps + c, to + c, N);
  if (c == split) return;
#if defined(__AVX512F__)
  spread_vectors<SIDE, 1, kWrite>(t, kernel, g + c, taps + c, to + c, int(split - c));
#else
  c = split - N;
  spread_vectors<SIDE, 1, kWrite>(t, kernel, g + c, taps + c, to + c, N);
#endif
}

// Adds (stores where windows do not overlap) g[i] to the sum
// its tap says. What lies outside the `size` sums is skipped.
template <Write kWrite, class S>
FASTNN_INLINE void scatter_one(int64_t at, int64_t size, S g, S* sums) {
  if (__builtin_expect(uint64_t(at) >= uint64_t(size), 0)) return;
  if constexpr (kWrite != Write::kAdd) sums[at] = g;
  else sums[at] += g;
}

// `count` elements, `first` and corner[i] from their windows' first tap. Not inlined: its loop needs the registers.
template <Write kWrite, class S, class O>
__attribute__((noinline)) void scatter_run(const Distances<O>& distance, const int64_t* corner, int64_t first,
                                           int64_t size, const S* g, const O* taps, S* sums, int64_t count) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i) scatter_one<kWrite>(first + corner[i] + distance(taps[i]), size, g[i], sums);
}

// ---- bands of rows -------------------------------------------------------------------------------------------------

// Of pixels shorter than a vector (`flat`) also where, in a row of inputs, the window
// of each element of a row of windows begins: the row is then one run of elements.
struct Corners : Columns {
  bool flat;
  int64_t corner[kMost * kShort];

  Corners(const Axis& w, int64_t from, int64_t channels, bool flat) : Columns(w, from), flat(flat) {
    for (int64_t o = 0; o < count && flat; ++o)
      for (int64_t c = 0; c < channels; ++c)
        corner[o * channels + c] = begin[o] < end[o] ? first[o] * channels + c : kNowhere;
  }
};

// What the windows of one row write, and where: `count` channels a pixel, `pitch` in the gradient. The channels before
// `split` go by vectors.
template <class S, class O>
struct Row {
  const Corners& columns;
  const Distances<O>& distance;
  int64_t count, pitch, split;
  Window window;   // its rows; columns as they come
  int64_t kernel;  // in columns
  int64_t corner;  // of the row's first pixel in the sums
  int64_t size;    // of the sums
  const S* g;
  const O* taps;
  S* sums;
};

// Windows [from, to) of a row, SIDE (0: any) by SIDE taps. Not inlined, as above.
template <int SIDE, Write kWrite, class S, class O>
__attribute__((noinline)) void spread_row(const Row<S, O>& r, int64_t from, int64_t to) {
  Window t = r.window;
  for (int64_t o = from; o < to; ++o) {
    t.j0 = r.columns.begin[o], t.j1 = r.columns.end[o];
    if (SIDE == 0 && t.j0 >= t.j1) continue;
    const int64_t window = r.corner + r.columns.first[o] * r.count;
    const S* const g = r.g + o * r.pitch;
    const O* const taps = r.taps + o * r.pitch;
    if constexpr (__is_same(O, uint8_t)) {
      S* const at = r.sums + window + (SIDE ? 0 : t.i0 * t.row_step + t.j0 * t.column_step);
      if (r.split) spread_window<SIDE, kWrite>(t, r.kernel, g, taps, at, r.split);
    }
#pragma GCC unroll 4
    for (int64_t c = r.split; c < r.count; ++c)
      scatter_one<kWrite>(window + r.distance(taps[c]) + c, r.size, g[c], r.sums);
  }
}

// Channels [0, count) of the input rows [top, bottom) of one image, `pitch` elements a pixel in the gradient and
// `count` in the sums, which are cleared just before they are needed. The channels before `split` go by vectors.
template <Write kWrite, class S, class O>
void band_backward(const Pool2dParams& p, const Corners& columns, const Distances<O>& distance, const S* g,
                   const O* taps, S* sums, int64_t top, int64_t bottom, int64_t count, int64_t split) {
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t row = w.in * count, pitch = p.channels, size = (bottom - top) * row;
  const int64_t reach = (h.kernel - 1) * h.dilation + 1;
  const bool clears = columns.from == 0 && (kWrite == Write::kAdd || split < count || !windows_cover(p));
  int64_t cleared = clears ? top : bottom;
  const auto clear_until = [&](int64_t end) {
    if (end <= cleared) return;
    end = min64(bottom, max64(end, cleared + kClear / row));
    __builtin_memset(static_cast<void*>(sums + (cleared - top) * row), 0, uint64_t((end - cleared) * row) * sizeof(S));
    cleared = end;
  };
  // Windows [low, high) of a row have all their columns.
  int64_t low = 0, high = 0;
  if (!p.adaptive && split > 0 && h.kernel == w.kernel && (w.kernel == 2 || w.kernel == 3)) {
    const auto whole = [&](int64_t o) { return columns.end[o] - columns.begin[o] == w.kernel; };
    high = columns.count;
    while (low < high && !whole(low)) ++low;
    while (low < high && !whole(high - 1)) --high;
  }
  for (int64_t oh = h.low(top); oh < h.high(bottom - 1); ++oh) {
    const int64_t first = h.first(oh), corner = (first - top) * row;
    clear_until(min64(bottom, first + reach));
    const int64_t i0 = max64(h.begin(oh), quick_ceil_div(max64(0, top - first), h.dilation));
    const int64_t i1 = min64(h.end(oh), quick_ceil_div(max64(0, bottom - first), h.dilation));
    if (i0 >= i1) continue;
    const int64_t out_row = (oh * w.out + columns.from) * pitch;
    if (columns.flat) {
      scatter_run<kWrite>(distance, columns.corner, corner, size, g + out_row, taps + out_row, sums,
                          columns.count * pitch);
      continue;
    }
    const Row<S, O> all = {
        columns,  distance, count, pitch,       split,          {i0, i1, 0, 0, h.dilation * row, w.dilation * count},
        w.kernel, corner,   size,  g + out_row, taps + out_row, sums};
    const bool whole = low < high && i1 - i0 == h.kernel;
    spread_row<0, kWrite>(all, 0, whole ? low : columns.count);
    if (!whole) continue;
    if (w.kernel == 2) spread_row<2, kWrite>(all, low, high);
    else spread_row<3, kWrite>(all, low, high);
    spread_row<0, kWrite>(all, high, columns.count);
  }
  clear_until(bottom);
}

// Calls f(columns) for the windows of a row, a part at a time.
template <class F>
FASTNN_INLINE void for_columns(const Pool2dParams& p, bool flat, const F& f) {
  const Axis w = axis_w(p);
  for (int64_t from = 0; from < w.out; from += Columns::kMost) f(Corners(w, from, p.channels, flat));
}

// How many channels go by vectors. Roughly, in cycles: each tap costs a vector 2 where it is stored and 3 where
// it is added, a masked vector 2 and 10 besides what a window costs anyway; a channel of its own costs 3.
template <int N>
FASTNN_INLINE int64_t vector_channels(const Pool2dParams& p) {
  const auto usual = [&](const PoolAxis& a) { return p.adaptive ? ceil_div(a.in, a.out) : a.kernel; };
  const int64_t taps = usual(p.h) * usual(p.w), rest = p.channels % N, whole = p.channels - rest;
  if (p.wide || taps > 64) return 0;
#if !defined(__AVX512F__)
  if (rest && windows_overlap(p)) return taps > 12 ? 0 : whole;
  if (rest) return whole ? p.channels : 0;
#endif
  if (!windows_overlap(p)) return rest == 0 || 3 * p.channels > 8 + 2 * taps ? p.channels : 0;
  if (taps > 12) return 0;
  return 3 * rest > 8 + 10 * taps ? p.channels : whole;
}

template <class S, class O>
void backward_in_place(const Pool2dParams& p) {
  const Distances<O> distance(p, p.channels);
  const int64_t image_in = p.h.in * p.w.in * p.channels, image_out = p.h.out * p.w.out * p.channels;
  const int64_t split = vector_channels<Vec<acc_t<S>>::N>(p);
  const bool overlap = windows_overlap(p), flat = split == 0 && p.channels < kShort;
  const bool stream =
      kVecBytes == 64 && leaves_caches(p) && windows_cover(p) && p.channels % 16 == 0 && split == p.channels;
  const auto band = [&](const Corners& w, int64_t image, int64_t top, int64_t bottom) {
    const S* g = static_cast<const S*>(p.grad_output) + image * image_out;
    const O* taps = static_cast<const O*>(p.offsets) + image * image_out;
    S* dx = static_cast<S*>(p.grad_input) + image * image_in + top * p.w.in * p.channels;
    if (overlap) {
      if constexpr (__is_same(S, acc_t<S>))
        band_backward<Write::kAdd>(p, w, distance, g, taps, dx, top, bottom, p.channels, split);
    } else if (stream) {
      band_backward<Write::kStream>(p, w, distance, g, taps, dx, top, bottom, p.channels, split);
    } else {
      band_backward<Write::kStore>(p, w, distance, g, taps, dx, top, bottom, p.channels, split);
    }
  };
  for_row_ranges(p, [&](int64_t begin, int64_t end) {
    for_columns(p, flat, [&](const Corners& w) {
      for_bands(p, begin, end, [&](int64_t image, int64_t top, int64_t bottom) { band(w, image, top, bottom); });
    });
#if defined(__AVX512F__)
    if (stream) _mm_sfence();
#endif
  });
}

// ---- 16-bit gradients of overlapping windows ------------------------------------------------------------------------

// Where, in a row of sums, the windows of a row begin: `flat` for each of their channels, which then are one run.
struct Starts {
  bool flat;
  int64_t at[kStarts];
  Starts(const Axis& w, int64_t channels, bool all) : flat(all && w.out * channels <= kStarts) {
    const int64_t each = flat ? channels : 1;
    for (int64_t o = 0; o < w.out; ++o)
      for (int64_t c = 0; c < each; ++c)
        at[o * each + c] = w.begin(o) < w.end(o) ? w.first(o) * channels + c : kNowhere;
  }
};

// A ring of sums: as many rows as a window reaches, of some channels. `first`, `size` and `base` are elements from the
// band's first row: a row of windows, the band's end, what lies at the ring's beginning.
template <class S, class A, class O>
struct Ring {
  A* sums;
  int64_t length, first, size, base;

  FASTNN_VEC_FN void add(int64_t corner, S g) const {
    uint64_t at = uint64_t(corner - base);
    at -= uint64_t(length) & -uint64_t(at >= uint64_t(length));  // a branch would be foreseen by nobody
    if (__builtin_expect(uint64_t(corner) >= uint64_t(size) || at >= uint64_t(length), 0)) return;
    sums[at] += to_acc(g);
  }
  // Not inlined: the loops need the registers.
  __attribute__((noinline)) void add_row(const Starts& starts, const Distances<O>& distance, const S* g, const O* taps,
                                         int64_t windows, int64_t count, int64_t pitch) const {
    const Ring ring = *this;
    if (starts.flat) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < windows * count; ++i) ring.add(ring.first + starts.at[i] + distance(taps[i]), g[i]);
      return;
    }
    for (int64_t o = 0; o < windows; ++o, g += pitch, taps += pitch) {
      const int64_t corner = ring.first + starts.at[o];
#pragma GCC unroll 4
      for (int64_t c = 0; c < count; ++c) ring.add(corner + distance(taps[c]) + c, g[c]);
    }
  }
};

bool fits_ring(const Pool2dParams& p) { return p.w.out <= kStarts && min64(p.h.in, reach_of(p.h)) * p.w.in <= kSums; }

// Added up in a ring of rows, of as many channels as fit; a row is stored when no later window reaches it.
template <class S, class O>
void backward_ring(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t channels = p.channels, image_in = h.in * w.in * channels, image_out = h.out * w.out * channels;
  const int64_t rows = min64(h.in, reach_of(h)), room = kSums / (rows * w.in);
  const int64_t most = min64(channels, room > V::N ? room / V::N * V::N : room);
  for_row_ranges(p, [&](int64_t begin, int64_t end) {
    alignas(kVecBytes) A sums[kSums + V::N];  // the last vectors are read past their end
    for (int64_t c = 0; c < channels; c += most) {
      const int64_t count = min64(most, channels - c), row = w.in * count;
      const Distances<O> distance(p, count);
      const Starts starts(w, count, count == channels);
      __builtin_memset(sums, 0, uint64_t(rows * row + V::N) * sizeof(A));
      for_bands(p, begin, end, [&](int64_t image, int64_t top, int64_t bottom) {
        const S* const g = static_cast<const S*>(p.grad_output) + image * image_out + c;
        const O* const taps = static_cast<const O*>(p.offsets) + image * image_out + c;
        S* const dx = static_cast<S*>(p.grad_input) + image * image_in + c;
        const int64_t runs = count == channels ? 1 : w.in, run = row / runs;
        int64_t stored = top, slot = 0;
        const auto store_until = [&](int64_t to) {
          for (; stored < to; ++stored) {
            A* const from = sums + slot * row;
            if (++slot == rows) slot = 0;
            for (int64_t x = 0; x < runs; ++x)
              for_vectors<V::N>(run, [&](int64_t k, int lanes) {
                store_some(V::load(from + x * run + k), dx + (stored * w.in + x) * channels + k, lanes);
              });
            __builtin_memset(from, 0, uint64_t(row) * sizeof(A));
          }
        };
        for (int64_t oh = h.low(top), high = h.high(bottom - 1); oh < high; ++oh) {
          const int64_t first = h.first(oh);
          store_until(min64(bottom, first));
          if (h.begin(oh) >= h.end(oh)) continue;
          const Ring<S, A, O> ring{sums, rows * row, (first - top) * row, (bottom - top) * row,
                                   (stored - top - slot) * row};
          ring.add_row(starts, distance, g + oh * w.out * channels, taps + oh * w.out * channels, w.out, count,
                       channels);
        }
        store_until(bottom);
      });
    }
  });
}

// Few outputs: the gradient is cleared, and some channels after the others added up in a plane that is read where its
// outputs have their maxima, and zero again after that.
template <class S, class O>
void backward_sparse(const Pool2dParams& p) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t channels = p.channels, inputs = h.in * w.in, outputs = h.out * w.out;
  const Distances<O> distance(p, 1);
  const Starts starts(w, 1, true);
  const int64_t most = min64(kPlane / inputs, min64(channels, 32));
  parallel_for(0, p.batch, max64(1, kGrain / (inputs * channels)), [&](int64_t begin, int64_t end) {
    A sums[kPlane];
    __builtin_memset(sums, 0, uint64_t(inputs * most) * sizeof(A));
    for (int64_t image = begin; image < end; ++image) {
      const S* const g = static_cast<const S*>(p.grad_output) + image * outputs * channels;
      const O* const taps = static_cast<const O*>(p.offsets) + image * outputs * channels;
      S* const dx = static_cast<S*>(p.grad_input) + image * inputs * channels;
      __builtin_memset(static_cast<void*>(dx), 0, uint64_t(inputs * channels) * sizeof(S));
      for (int64_t from = 0; from < channels; from += most) {
        const int64_t to = min64(channels, from + most);
        const auto each = [&](const auto& f) __attribute__((always_inline)) {
          for (int64_t oh = 0; oh < h.out; ++oh) {
            if (h.begin(oh) >= h.end(oh)) continue;
            const int64_t first = h.first(oh) * w.in;
            for (int64_t ow = 0; ow < w.out; ++ow)
              for (int64_t c = from, o = (oh * w.out + ow) * channels; c < to; ++c) {
                const int64_t at = first + starts.at[ow] + distance(taps[o + c]);
                if (__builtin_expect(uint64_t(at) < uint64_t(inputs), 1))
                  f(sums[at * most + c - from], at * channels + c, o + c);
              }
          }
        };
        each([&](A& sum, int64_t, int64_t o) __attribute__((always_inline)) { sum += to_acc(g[o]); });
        each([&](A& sum, int64_t at, int64_t) __attribute__((always_inline)) { dx[at] = from_acc<S>(sum); });
        each([&](A& sum, int64_t, int64_t) __attribute__((always_inline)) { sum = 0; });
      }
    }
  });
}

// One input pixel at a time, from the few windows that cover it: listed once for all channels.
template <class S, class O>
void backward_by_windows(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t channels = p.channels, image_out = h.out * w.out * channels;
  for_row_ranges(p, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const S* const g = static_cast<const S*>(p.grad_output) + r / h.in * image_out;
      const O* const taps = static_cast<const O*>(p.offsets) + r / h.in * image_out;
      S* dx = static_cast<S*>(p.grad_input) + r * w.in * channels;
      int64_t row_at[kFew], row_code[kFew], at[kFew], code[kFew];
      int rows = 0;
      for (int64_t oh = h.low(r % h.in), last = h.high(r % h.in); oh < last; ++oh)
        if (const int64_t i = h.tap(r % h.in, oh); i >= 0) row_at[rows] = oh * w.out, row_code[rows++] = i * w.kernel;
      for (int64_t x = 0; x < w.in; ++x, dx += channels) {
        const int64_t low = w.low(x), high = w.high(x);
        int count = 0;
        for (int k = 0; k < rows; ++k)
          for (int64_t ow = low; ow < high; ++ow)
            if (const int64_t j = w.tap(x, ow); j >= 0)
              at[count] = (row_at[k] + ow) * channels, code[count++] = row_code[k] + j;
        for_vectors<V::N>(channels, [&](int64_t c, int lanes) __attribute__((always_inline)) {
          V sum = V::zero();
          for (int k = 0; k < count; ++k) {
            const V v = load_some(g + at[k] + c, lanes);
            if (sizeof(O) == 1 && lanes == V::N)
              sum = add_where_bytes(sum, (const uint8_t*)taps + at[k] + c, code[k], v);
            else sum = add_where(sum, load_taps<A>(taps + at[k] + c, lanes), code[k], v);
          }
          store_some(sum, dx + c, lanes);
        });
      }
    }
  });
}

// One input pixel at a time, from all the windows that cover it.
template <class S, class O>
void backward_by_pixels(const Pool2dParams& p) {
  using V = Vec<acc_t<S>>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t channels = p.channels;
  for_input_pixels(p, [&](int64_t n, int64_t ih, int64_t iw) {
    const S* g = static_cast<const S*>(p.grad_output) + n * h.out * w.out * channels;
    const O* taps = static_cast<const O*>(p.offsets) + n * h.out * w.out * channels;
    S* dx = static_cast<S*>(p.grad_input) + ((n * h.in + ih) * w.in + iw) * channels;
    const int64_t oh0 = h.low(ih), oh1 = h.high(ih), ow0 = w.low(iw), ow1 = w.high(iw);
    for_vectors<V::N>(channels, [&](int64_t c, int lanes) {
      V sum = V::zero();
      for (int64_t oh = oh0; oh < oh1; ++oh) {
        const int64_t i = h.tap(ih, oh);
        if (i < 0) continue;
        for (int64_t ow = ow0; ow < ow1; ++ow) {
          const int64_t j = w.tap(iw, ow), at = (oh * w.out + ow) * channels + c;
          if (j < 0) continue;
          sum = add_where(sum, load_taps<acc_t<S>>(taps + at, lanes), i * w.kernel + j, load_some(g + at, lanes));
        }
      }
      store_some(sum, dx + c, lanes);
    });
  });
}

// Whether that is fewer cycles than adding the outputs up one by one. Roughly, a pixel costs 10, more where its windows
// are found by divisions, and each of its vectors 4 and 4 for each window; an output costs 3, a sum one third.
template <int N>
bool prefers_windows(const Pool2dParams& p) {
  const int64_t inputs = p.h.in * p.w.in, outputs = p.h.out * p.w.out, taps = outputs * p.h.kernel * p.w.kernel;
  if (most_covers(axis_h(p)) * most_covers(axis_w(p)) > kFew || p.channels < N) return false;
  const int64_t by_windows = inputs * (p.adaptive ? 40 : 10) + ceil_div(p.channels, N) * 4 * (inputs + taps);
  return by_windows < p.channels * (inputs / 3 + outputs * 3);
}

template <class S, class O>
void backward(const Pool2dParams& p) {
  if (sizeof(S) > 2 || !windows_overlap(p)) return backward_in_place<S, O>(p);
  if constexpr (sizeof(S) == 2) {
    const int64_t inputs = p.h.in * p.w.in;
    if (p.h.out * p.w.out * kSparse < inputs && inputs <= kPlane && p.w.out <= kStarts) backward_sparse<S, O>(p);
    else if (prefers_windows<Vec<acc_t<S>>::N>(p)) backward_by_windows<S, O>(p);
    else if (fits_ring(p)) backward_ring<S, O>(p);
    else backward_by_pixels<S, O>(p);
  }
}

}  // namespace

Status max_pool2d_backward_nhwc(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) backward<S, int32_t>(p);
    else backward<S, uint8_t>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
