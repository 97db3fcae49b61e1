// Convolution of a batch of small images with one image per vector lane, shared parts: laying images out
// [position][lane = image] and back.
//
// Positions are then independent of one another: no lane is lost to the ends of short rows, every load is aligned, and
// a padded or strided tap is simply another position. The price is a transposition of the input and of the output.
#pragma once
#include "conv2d_problem.h"
#include "vectors.h"
#include "simd.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Strides of a tensor in positions (vectors) and what its memory is made of: runs of `run` elements that lie together.
struct LaneLayout {
  int64_t c, h, w;
  bool together;  // channels are innermost
};
inline LaneLayout lane_layout(bool together, int64_t channels, int64_t rows, int64_t columns) {
  return together ? LaneLayout{1, columns * channels, channels, true} : LaneLayout{rows * columns, columns, 1, false};
}
// The same with channels an odd number of cache lines apart, so that neighbouring positions fall into different sets.
inline LaneLayout odd_lane_layout(bool together, int64_t channels, int64_t rows, int64_t columns) {
  return lane_layout(together, channels | 1, rows, columns);
}

// `count` adjacent elements of each of `lanes` images into
// vectors; after every `row` of them `gap` vectors are left out.
FASTNN_INLINE void gather_images(const float* from, int64_t image_stride, int lanes, int64_t count, int64_t row,
                                 int64_t gap, float* to) {
  constexpr int N = Vec<float>::N;
  // Images whole pages apart share one set of L1, too small for what the hardware fetches ahead of so many streams.
  constexpr int64_t kPage = 4096 / sizeof(float), kAhead = 4 * N;
  const bool crowded = image_stride % kPage == 0;
  int64_t column = 0;
  for (int64_t f = 0; f < count; f += N) {
    const int n = int(min64(N, count - f));
    if (crowded)
      for (int i = 0; i < lanes; ++i) __builtin_prefetch(from + f + kAhead + i * image_stride);
    if (n == N && (gap == 0 || column + N < row)) {
      transpose_block(from + f, image_stride, 1, lanes, N, to);
      to += N * N;
      if (gap) column += N;
      continue;
    }
    alignas(64) float block[N * N];
    transpose_block(from + f, image_stride, 1, lanes, n, block);
    for (int i = 0; i < n; ++i, to += N) {
      Vec<float>::load(block + i * N).store(to);
      if (++column == row) column = 0, to += gap * N;
    }
  }
}

// The other way, `step` elements apart in memory.
FASTNN_INLINE void scatter_images(const float* from, int64_t count, float* to, int64_t image_stride, int64_t step,
                                  int lanes) {
  constexpr int N = Vec<float>::N;
  for (int64_t f = 0; f < count; f += N)
    untranspose_block(from + f * N, to + f * step, image_stride, step, lanes, int(min64(N, count - f)));
}

// Rows [h0, h0 + rows) of x for `lanes` images from `image`, with `pad` zero columns
// before (or, negative, without so many of its first columns) and `columns` in all.
inline void gather_band(const ConvProblem& d, const float* image, int lanes, int64_t h0, int64_t rows, int64_t pad,
                        int64_t columns, const LaneLayout& l, float* band) {
  constexpr int N = Vec<float>::N;
  const int64_t left = min64(columns, max64(0, pad)), skip = min64(d.w, max64(0, -pad));
  const int64_t used = min64(d.w - skip, columns - left), right = columns - left - used;
  const int64_t channels = l.together ? d.c : 1;  // that lie together
  const bool dense = l.w == channels;
  const auto zero = [](float* to, int64_t vectors) {
    for (int64_t i = 0; i < vectors; ++i) Vec<float>::zero().store(to + i * N);
  };
  for (int64_t c = 0; c < d.c; c += channels) {
    float* to = band + c * l.c * N;
    const float* from = image + c * d.xc + h0 * d.xh + skip * d.xw;
    if (used == d.w && dense) {
      gather_images(from, d.xn, lanes, rows * d.w * channels, d.w * channels, (left + right) * channels,
                    to + left * channels * N);
    } else {
      for (int64_t h = 0; h < rows; ++h)
        gather_images(from + h * d.xh, d.xn, lanes, used * channels, channels, l.w - channels,
                      to + (h * l.h + left * l.w) * N);
    }
    for (int64_t h = 0; h < rows; ++h) {
      zero(to + h * l.h * N, left * l.w);
      zero(to + (h * l.h + (left + used) * l.w) * N, right * l.w);
    }
  }
}

// Rows [h0, h0 + rows) of x with zeros around the image.
inline void gather_padded(const ConvProblem& d, const float* image, int lanes, int64_t h0, int64_t rows, int64_t pad,
                          int64_t columns, const LaneLayout& l, float* band) {
  using V = Vec<float>;
  constexpr int N = V::N;
  const int64_t begin = min64(rows, max64(0, -h0)), end = max64(begin, min64(rows, d.h - h0));
  if (begin < end) gather_band(d, image, lanes, h0 + begin, end - begin, pad, columns, l, band + begin * l.h * N);
  for (int64_t c = 0; c < (l.together ? 1 : d.c); ++c)
    for (int64_t h = 0; h < rows; ++h)
      if (h < begin || h >= end)
        for (int64_t i = 0; i < l.h; ++i) V::zero().store(band + (c * l.c + h * l.h + i) * N);
}

// The finished rows [p0, p0 + rows) of `lanes` images to their place.
inline void store_band(const ConvProblem& d, const LaneLayout& l, const float* out, int64_t p0, int64_t rows, int lanes,
                       float* y) {
  constexpr int N = Vec<float>::N;
  y += p0 * d.yh;
  if (l.together) {
    if (d.yw == d.k && d.yh == d.q * d.k) return scatter_images(out, rows * d.q * d.k, y, d.yn, 1, lanes);
    for (int64_t i = 0; i < rows * d.q; ++i)
      scatter_images(out + i * d.k * N, d.k, y + i / d.q * d.yh + i % d.q * d.yw, d.yn, 1, lanes);
    return;
  }
  for (int64_t k = 0; k < d.k; ++k) {
    const float* from = out + k * l.c * N;
    if (d.yh == d.q * d.yw) scatter_images(from, rows * d.q, y + k * d.yk, d.yn, d.yw, lanes);
    else
      for (int64_t i = 0; i < rows; ++i)
        scatter_images(from + i * d.q * N, d.q, y + k * d.yk + i * d.yh, d.yn, d.yw, lanes);
  }
}

// Adds the sum over the band's positions of each output channel's vectors to bias[k].
inline void add_bias(const float* grad, const LaneLayout& l, int64_t k, int64_t rows, int64_t columns, float* bias) {
  using V = Vec<float>;
  constexpr int N = V::N;
  for (int64_t i = 0; i < k; ++i) {
    V sums[4] = {V::load(bias + i * N), V::zero(), V::zero(), V::zero()};  // an addition takes longer than a load
    const float* at = grad + i * l.c * N;
    for (int64_t h = 0; h < rows; ++h, at += l.h * N) {
      int64_t w = 0;
      for (; w + 4 <= columns; w += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) sums[u] = sums[u] + V::load(at + (w + u) * l.w * N);
      for (; w < columns; ++w) sums[0] = sums[0] + V::load(at + w * l.w * N);
    }
    ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(bias + i * N);
  }
}

// What store_band() may read past the last output: it loads whole squares of vectors.
constexpr int64_t kStoreSlack = Vec<float>::N * kVecBytes;

// The sum of each of `count` vectors' lanes.
inline void sum_lanes(const float* from, int64_t count, float* to) {
  using V = Vec<float>;
  constexpr int N = V::N;
  for (int64_t f = 0; f < count; f += N) {
    V v[N];
    for (int i = 0; i < N; ++i) v[i] = f + i < count ? V::load(from + (f + i) * N) : V::zero();
    store_some(sum_rows(v), to + f, int(min64(N, count - f)));
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
