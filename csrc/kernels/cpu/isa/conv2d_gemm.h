// Implicit GEMM, shared parts: pixels and taps as GEMM dimensions, copies of im2col rows, and the store.
#pragma once
#include "conv2d_problem.h"
#include "gemm_core.h"
#include "lanes.h"
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Channels lie side by side in both images (NHWC).
inline bool channels_together(const ConvProblem& d) { return d.xc == 1 && d.yk == 1 && d.yw != 1; }

// A 1x1 convolution of dense images without stride or padding is a matrix product: one long row per image.
inline ConvProblem flatten_pointwise(ConvProblem d) {
  const bool pointwise = d.r == 1 && d.s == 1 && d.stride_h == 1 && d.stride_w == 1 && d.pad_h == 0 && d.pad_w == 0;
  if (!pointwise) return d;
  if (d.p * d.q == 1 && d.h * d.w == 1) {  // images of one pixel: one image of all of them, channels side by side
    d.w = d.q = d.n, d.n = 1;
    d.xw = d.xn, d.yw = d.yn, d.xh = d.w * d.xw, d.yh = d.q * d.yw;
    return d;
  }
  if (d.p != d.h || d.q != d.w || d.xh != d.w * d.xw || d.yh != d.q * d.yw) return d;
  d.w = d.q = d.h * d.w;
  d.h = d.p = 1;
  d.xh = d.w * d.xw, d.yh = d.q * d.yw;
  return d;
}
inline bool is_pointwise(const ConvProblem& d) {
  return d.r == 1 && d.s == 1 && d.stride_h == 1 && d.stride_w == 1 && d.pad_h == 0 && d.pad_w == 0 && d.p == 1 &&
         d.h == 1 && d.q == d.w;
}

// The channels of all groups side by side in both images, pixels one behind the other.
inline bool groups_dense(const ConvProblem& d, int64_t groups) {
  const int64_t c = d.c * groups, k = d.k * groups;
  return d.xc == 1 && d.yk == 1 && (d.q == 1 || (d.xw == c && d.yw == k)) &&
         (d.n == 1 || (d.xn == d.q * c && d.yn == d.q * k));
}

// Output pixels [first, first + count) of the batch, in runs that lie in one row: f(at, length, n, p, q).
template <class F>
FASTNN_INLINE void for_runs(const ConvProblem& d, int64_t first, int64_t count, const F& f) {
  int64_t n = first / (d.p * d.q), p = first / d.q % d.p, q = first % d.q;
  for (int64_t at = 0; at < count;) {
    const int64_t length = min64(count - at, d.q - q);
    f(at, length, n, p, q);
    at += length;
    q = 0;
    if (++p == d.p) p = 0, ++n;
  }
}

// The first and one past the last i in [0, length) with 0 <= at + i * step < limit.
struct Inside {
  int64_t begin, end;
};
FASTNN_INLINE Inside inside(int64_t at, int64_t step, int64_t limit, int64_t length) {
  Inside in{0, length};  // few are outside: divisions would take longer than to count them
  while (in.begin < in.end && at + in.begin * step < 0) ++in.begin;
  while (in.end > in.begin && at + (in.end - 1) * step >= limit) --in.end;
  return in;
}

// to[i] = from[i * step] for i in `in`, zero elsewhere in [0, length). Writes nothing past to[length - 1].
FASTNN_INLINE void copy_row(float* to, int64_t length, const float* from, int64_t step, Inside in) {
  using V = Vec<float>;
  int64_t i = 0;
  for (; i < in.begin; ++i) to[i] = 0;
  if (step == 1) {
    for (; i + V::N <= in.end; i += V::N) V::load(from + i).store(to + i);
    if (i < in.end) V::load_n(from + i, in.end - i).store_n(to + i, in.end - i);
    i = in.end;
  } else if (step == 2) {
    for (; i < in.end; i += V::N) {
      const int64_t count = min64(V::N, in.end - i), last = 2 * count - 1;  // elements from from[2 * i] on
      evens(load_upto(from + 2 * i, last), load_upto(from + 2 * i + V::N, last - V::N)).store_n(to + i, count);
    }
    i = in.end;
  } else {
    for (; i < in.end; ++i) to[i] = from[i * step];
  }
  for (; i < length; ++i) to[i] = 0;
}

// copy_row() of `rows` rows, to_row and from_row apart; may write zeros into `room` >= length elements of each.
inline void copy_rows(float* to, int64_t to_row, int64_t length, [[maybe_unused]] int64_t room, const float* from,
                      int64_t from_row, int64_t step, Inside in, int64_t rows) {
#if defined(__AVX2__)
  if ((step == 1 || step == 2) && in.begin < in.end) {  // what lies outside is masked
    constexpr int N = Vec<float>::N;
    int64_t at = 0;
    for (; at < length; at += N, to += N, from += N * step) {
      const auto below = [&](int64_t end) { return (1u << max64(0, min64(N, end - at))) - 1; };
      const uint32_t used = below(in.end) & ~below(in.begin), spread = _pdep_u32(used, 0x55555555);
#if defined(__AVX512F__)
      const __mmask16 lanes = __mmask16(below(length)), low = __mmask16(step == 1 ? used : spread),
                      high = __mmask16(spread >> N);
      const auto load = [](const float* p, __mmask16 mask) { return Vec<float>{_mm512_maskz_loadu_ps(mask, p)}; };
#else
      if (room < at + N) break;
      const auto mask_of = [](uint32_t bits) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
      };
      const __m256i low = mask_of(step == 1 ? used : spread), high = mask_of(spread >> N);
      const auto load = [](const float* p, __m256i mask) { return Vec<float>{_mm256_maskload_ps(p, mask)}; };
#endif
      for (int64_t i = 0; i < rows; ++i) {
        const float* const f = from + i * from_row;
        Vec<float> v = load(f, low);
        if (step == 2) v = evens(v, load(f + N, high));
#if defined(__AVX512F__)
        _mm512_mask_storeu_ps(to + i * to_row, lanes, v.v);
#else
        v.store(to + i * to_row);  // a masked store takes a dozen cycles
#endif
      }
    }
    if (at >= length) return;
    length -= at, in = {max64(0, in.begin - at), max64(0, in.end - at)};
  }
#endif
  for (int64_t i = 0; i < rows; ++i) copy_row(to + i * to_row, length, from + i * from_row, step, in);
}

// Where row or column i of the product lies in the result, for a tile's worth of them.
struct ConvStore {
  static constexpr bool kAccumulates = true;
  enum class Axis : uint8_t { channels, pixels, taps };

  const ConvProblem* d;
  float* out;
  Axis rows, columns;
  bool taps_channel_last;    // order of taps: (r, s, c) instead of (c, r, s)
  const float* row_bias;     // or null
  const float* column_bias;  // or null; whole vectors are readable
  bool streams = false;      // whole tiles past the caches: their vectors are aligned and no sum is added to
  bool fetches = false;      // tiles to be written, or, of rows that are channels, to be added to

  void end() const { end_streams(streams); }

  int64_t channel_stride() const { return columns == Axis::taps ? d->wk : d->yk; }

  // All pixels of the batch are equally far apart.
  bool pixels_flat() const { return d->yh == d->q * d->yw && (d->n == 1 || d->yn == d->p * d->q * d->yw); }

  // Columns [first, first + count) are pixels of rows that lie side by side, of two images at most in any vector.
  bool two_images() const {
    const ConvProblem& c = *d;
    return columns == Axis::pixels && c.yw == 1 && (c.p == 1 || c.yh == c.q) && c.p * c.q >= Vec<float>::N;
  }

  // Columns [first, first + count) lie side by side.
  bool dense(int64_t first, int count) const {
    const ConvProblem& c = *d;
    if (columns == Axis::channels) return c.yk == 1;
    if (columns == Axis::taps) {
      if (c.r * c.s == 1) return c.wc == 1;  // whatever the strides of its other sizes, which are 1
      return taps_channel_last ? c.wc == 1 && c.ws == c.c && c.wr == c.s * c.c
                               : c.ws == 1 && c.wr == c.s && c.wc == c.r * c.s;
    }
    return c.yw == 1 && (c.p == 1 || c.yh == c.q) && first % (c.p * c.q) + count <= c.p * c.q;
  }

  void offsets(Axis axis, int64_t first, int count, int64_t* to) const {
    const ConvProblem& c = *d;
    if (axis == Axis::channels) {
      for (int i = 0; i < count; ++i) to[i] = (first + i) * channel_stride();
    } else if (axis == Axis::pixels && pixels_flat()) {
      for (int i = 0; i < count; ++i) to[i] = (first + i) * c.yw;
    } else if (axis == Axis::pixels) {
      for_runs(c, first, count, [&](int64_t at, int64_t length, int64_t n, int64_t p, int64_t q) {
        for (int64_t i = 0; i < length; ++i) to[at + i] = n * c.yn + p * c.yh + (q + i) * c.yw;
      });
    } else {
      for (int i = 0; i < count; ++i) {
        const int64_t t = first + i;
        to[i] = taps_channel_last ? t % c.c * c.wc + t / c.c / c.s * c.wr + t / c.c % c.s * c.ws
                                  : t / (c.r * c.s) * c.wc + t / c.s % c.r * c.wr + t % c.s * c.ws;
      }
    }
  }

  template <int NV>
  FASTNN_VEC_FN void prefetch(int64_t m0, int mb, int64_t n0, bool first) const {
    if (fetches && !(first && rows == Axis::channels)) [[unlikely]]
      fetch<NV>(m0, mb, n0);
  }
  // Not inlined: the tile's loop needs the registers (NHWC 8x32x112x112->16 x0.93).
  template <int NV>
  __attribute__((noinline)) void fetch(int64_t m0, int mb, int64_t n0) const {
    asm volatile("");  // or the compiler drops the call, which has no effect that it knows of
    int64_t column;
    offsets(columns, n0, 1, &column);
    const int64_t step = rows == Axis::pixels ? d->yw : channel_stride();
    fetch_rows<NV>(out + column + m0 * step, step, mb);
  }

  template <int MR, int NV>
  FASTNN_VEC_FN void tile(const GemmTile<float, MR, NV>& t, int64_t m0, int mb, int64_t n0, int nb, bool first,
                          bool) const {
    using V = Vec<float>;
    int64_t row[MR], column[NV * V::N];
    if (dense(n0, nb)) {
      offsets(columns, n0, 1, column);
      float* const at = out + column[0];
      if (rows == Axis::channels || (rows == Axis::pixels && pixels_flat())) {
        const int64_t step = rows == Axis::pixels ? d->yw : channel_stride();
        if (nb == NV * V::N) {
          const auto each = [&](const auto& f, const auto& write) __attribute__((always_inline)) {
            for_whole_tile(t, mb, at + m0 * step, step,
                           [&](V v, float* to, int i, int j)
                               __attribute__((always_inline)) { write(f(v, to, i, j), to); });
          };
          const auto results = [&](const auto& write) __attribute__((always_inline)) {
            if (row_bias)
              each([&](V v, float*, int i, int)
                       __attribute__((always_inline)) { return v + V::set1(row_bias[m0 + i]); },
                   write);
            else if (column_bias)
              each([&](V v, float*, int, int j)
                       __attribute__((always_inline)) { return v + V::load(column_bias + n0 + j); },
                   write);
            else each([](V v, float*, int, int) __attribute__((always_inline)) { return v; }, write);
          };
          const auto store = [](V v, float* to) __attribute__((always_inline)) { v.store(to); };
          if (!first)
            each([](V v, float* to, int, int) __attribute__((always_inline)) { return v + V::load(to); }, store);
          else if (streams) results([](V v, float* to) __attribute__((always_inline)) { stream(v, to); });
          else results(store);
          return;
        }
        for (int i = 0; i < mb; ++i) row[i] = (m0 + i) * step;
      } else {
        offsets(rows, m0, mb, row);
      }
      for_tile(t, mb, nb, [&](V v, int i, int j, int lanes) {
        float* const to = at + row[i] + j;
        if (!first) v = v + load_lanes(to, lanes);
        else if (row_bias) v = v + V::set1(row_bias[m0 + i]);
        else if (column_bias) v = v + V::load(column_bias + n0 + j);
        if (lanes == V::N) v.store(to);
        else v.store_n(to, lanes);
      });
      return;
    }
#if defined(__AVX512F__)
    if (two_images()) {
      offsets(rows, m0, mb, row);
      const int64_t plane = d->p * d->q;
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        const int lanes = int(min64(V::N, nb - j * V::N));
        if (lanes <= 0) break;
        const int64_t at = n0 + j * V::N, image = at / plane, pixel = at % plane;
        const int here = int(min64(lanes, plane - pixel));
        float* const one = out + image * d->yn + pixel;
        float* const two = out + (image + 1) * d->yn - here;  // its lanes begin at `here`
        const __mmask16 m1 = __mmask16((1u << here) - 1), m2 = __mmask16(((1u << lanes) - 1) ^ m1);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          if (i >= mb) break;
          V v = t.v[i][j];
          if (!first) v = v + V{_mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(m1, one + row[i]), m2, two + row[i])};
          else if (row_bias) v = v + V::set1(row_bias[m0 + i]);
          _mm512_mask_storeu_ps(one + row[i], m1, v.v);
          _mm512_mask_storeu_ps(two + row[i], m2, v.v);
        }
      }
      return;
    }
#endif
    offsets(rows, m0, mb, row);
    offsets(columns, n0, nb, column);
    scatter(t, m0, mb, n0, nb, first, row, column);
  }

  template <int MR, int NV>
  __attribute__((noinline)) void scatter(GemmTile<float, MR, NV> t, int64_t m0, int mb, int64_t n0, int nb, bool first,
                                         const int64_t* row, const int64_t* column) const {
    using V = Vec<float>;
    for (int i = 0; i < mb; ++i) {
      float lane[NV * V::N];
      for (int j = 0; j < NV; ++j) t.v[i][j].store(lane + j * V::N);
      for (int j = 0; j < nb; ++j) {
        float& to = out[row[i] + column[j]];
        const float bias = row_bias ? row_bias[m0 + i] : column_bias ? column_bias[n0 + j] : 0.f;
        to = first ? lane[j] + bias : to + lane[j];
      }
    }
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
