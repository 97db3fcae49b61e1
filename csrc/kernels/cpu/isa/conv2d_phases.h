// A strided convolution as one of stride 1 (space to depth): the pixels (a, b) modulo the stride of an input channel c
// are an input channel of their own, on which the kernel has every stride-th tap. So 7x7/2 of 3 channels is 4x4 of 12,
// 11x11/4 is 3x3 of 48, with zeros for the taps there are not.
#pragma once
#include "conv2d_problem.h"
#include "simd.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

FASTNN_INLINE int64_t phase_channels(const ConvProblem& d) { return d.c * d.stride_h * d.stride_h; }

// Phase channels lie in the order in which an image has them: [c][a][b] in NCHW, [a][b][c] in NHWC.
struct PhaseChannel {
  int64_t c, a, b;
};
FASTNN_INLINE PhaseChannel phase_channel(const ConvProblem& d, int64_t i) {
  const int64_t s = d.stride_h;
  if (d.xw == 1) return {i / (s * s), i / s % s, i % s};
  return {i % d.c, i / d.c / s, i / d.c % s};
}

#if defined(__AVX512F__)
// Four by four quarters of a vector.
FASTNN_INLINE void transpose_quarters(f32v r[4]) {
  const __m512 a = _mm512_shuffle_f32x4(r[0], r[1], 0x44), b = _mm512_shuffle_f32x4(r[0], r[1], 0xee);
  const __m512 c = _mm512_shuffle_f32x4(r[2], r[3], 0x44), e = _mm512_shuffle_f32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_f32x4(a, c, 0x88), r[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_f32x4(b, e, 0x88), r[3] = _mm512_shuffle_f32x4(b, e, 0xdd);
}
#endif

// to[column][lane] of `count` columns of NCHW: STRIDE pixels of each of N / STRIDE rows, some of them null (zeros, as
// `to` holds before). Up to N columns more are written.
template <int STRIDE>
void interleave_rows(const float* const* rows, int64_t count, float* to) {
  using V = Vec<float>;
  constexpr int N = V::N, kRuns = N / STRIDE;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < count; i += kRuns, to += kRuns * N) {
    const int64_t pixels = min64(N, (count - i) * STRIDE);
    f32v r[kRuns];
#pragma GCC unroll 8
    for (int j = 0; j < kRuns; ++j) r[j] = rows[j] ? load_lanes_below(rows[j] + i * STRIDE, int(pixels)).v : f32v{};
    if constexpr (STRIDE == 4) {
      transpose_quarters(r);
    } else {
      f64v d[kRuns];
#pragma GCC unroll 8
      for (int j = 0; j < kRuns; ++j) d[j] = (f64v)r[j];
      transpose_registers(d);
#pragma GCC unroll 8
      for (int j = 0; j < kRuns; ++j) r[j] = (f32v)d[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRuns; ++j) V{r[j]}.store(to + j * N);
  }
#else
  for (int j = 0; j < kRuns; ++j, to += STRIDE) {
    if (!rows[j]) continue;
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + i * N, rows[j] + i * STRIDE, STRIDE * sizeof(float));
  }
#endif
}

// `rows` rows from row `top` (of phases; the padding's are negative) of phase channels [N group, N group + N), padded:
// strip[row][column][lane] of `used` columns. A row is `columns` long, at least N longer.
inline void fill_phase_rows(const ConvProblem& d, const float* image, int64_t top, int rows, int64_t group,
                            int64_t used, int64_t columns, float* strip) {
  using V = Vec<float>;
  constexpr int N = V::N;
  const int64_t stride = d.stride_h, begin = group * N, lanes = min64(N, phase_channels(d) - begin);
  PhaseChannel channel[N];
  for (int64_t i = 0; i < lanes; ++i) channel[i] = phase_channel(d, begin + i);
  // Columns [first, last) lie within the image with all their pixels, [left, right) with some.
  const int64_t first = min64(used, ceil_div(d.pad_w, stride)), left = d.pad_w / stride;
  const int64_t last = max64(first, min64(used, (d.w + d.pad_w) / stride));
  const int64_t right = min64(used, ceil_div(d.w + d.pad_w, stride)), at = first * stride - d.pad_w;
  const int64_t run = d.xw == d.c ? stride * d.c : d.c;  // NHWC: channels that lie side by side in the image
  for (int r = 0; r < rows; ++r) {
    float* const row = strip + r * columns * N;
    const int64_t ih = (top + r) * stride - d.pad_h;
    const float* line[N];  // null in the padding
    for (int64_t i = 0; i < lanes; ++i) {
      const PhaseChannel p = channel[i];
      const bool inside = ih + p.a >= 0 && ih + p.a < d.h;
      line[i] = inside ? image + p.c * d.xc + (ih + p.a) * d.xh + p.b * d.xw : nullptr;
    }
    for (int64_t i = 0; i < used; ++i) V::zero().store(row + i * N);
    if (d.xw == 1) {
      const float* runs[N] = {};
      for (int64_t i = 0; i < lanes; i += stride)
        if (line[i]) runs[i / stride] = line[i] + at;
      if (stride == 2) interleave_rows<2>(runs, last - first, row + first * N);
      else interleave_rows<4>(runs, last - first, row + first * N);
      for (int64_t i = last; i < min64(used, last + N); ++i) V::zero().store(row + i * N);
    } else {
      for (int64_t i = 0, count; i < lanes; i += count) {
        count = min64(lanes, i + run - (begin + i) % run) - i;
        if (!line[i]) continue;
        const float* from = line[i] + at * d.xw;
        float* to = row + first * N + i;
        for (int64_t q = first; q < last; ++q, from += stride * d.xw, to += N) {
          if (count == N) V::load(from).store(to);
          else V::load_n(from, count).store_n(to, count);
        }
      }
    }
    const auto fill = [&](int64_t q) {  // a column partly outside
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t iw = q * stride - d.pad_w, b = channel[i].b;
        if (line[i] && iw + b >= 0 && iw + b < d.w) row[q * N + i] = line[i][iw * d.xw];
      }
    };
    for (int64_t q = left; q < first; ++q) fill(q);
    for (int64_t q = last; q < right; ++q) fill(q);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
