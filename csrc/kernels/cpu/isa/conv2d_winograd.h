// What Winograd's forward and weight gradient share: strips of padded rows, and the transform of 6x6 input tiles.
#pragma once
#include "conv2d_problem.h"
#include "simd.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// A stride of an odd number of cache lines: the 36 planes of a tile then fall into different cache sets.
FASTNN_INLINE int64_t odd_lines(int64_t elements) { return (ceil_div(elements, 16) | 1) * 16; }

// B^T d for one line of six.
FASTNN_INLINE void input_line(const f32v d[6], f32v t[6]) {
  const f32v a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1];
  const f32v c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
  t[0] = 4.f * d[0] - 5.f * d[2] + d[4];
  t[1] = a + b;
  t[2] = a - b;
  t[3] = c + e;
  t[4] = c - e;
  t[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}

// The first `rows` rows of channel group `group` for one row of tiles, padded: strip[row][column][lane].
inline void fill_strip(const ConvProblem& d, int64_t tw, int64_t columns, const float* image, int64_t tile_row,
                       int64_t group, int rows, float* strip) {
  using V = Vec<float>;
  constexpr int N = V::N;
  const int lanes = int(min64(N, d.c - group * N));
  const float* x = image + group * N * d.xc;
  for (int r = 0; r < rows; ++r) {
    float* row = strip + r * columns * N;
    const int64_t ih = tile_row * 4 + r - d.pad_h, used = 4 * tw + 2;
    if (ih < 0 || ih >= d.h) {
      for (int64_t i = 0; i < used; ++i) V::zero().store(row + i * N);
      continue;
    }
    for (int64_t i = 0; i < d.pad_w; ++i) V::zero().store(row + i * N);
    const float* from = x + ih * d.xh;
    const int64_t count = min64(d.w, used - d.pad_w);
    if (d.xc == 1) {
      for (int64_t i = 0; i < count; ++i)
        (lanes == N ? V::load(from + i * d.xw) : V::load_n(from + i * d.xw, lanes)).store(row + (d.pad_w + i) * N);
    } else {
      for (int64_t i = 0; i < count; i += N)
        transpose_block(from + i * d.xw, d.xc, d.xw, lanes, int(min64(N, count - i)), row + (d.pad_w + i) * N);
    }
    for (int64_t i = d.pad_w + count; i < used; ++i) V::zero().store(row + i * N);
  }
}

// V of every tile of the strip: 36 vectors each, xi_stride elements apart.
inline void transform_input(int64_t tw, int64_t columns, const float* strip, float* v, int64_t xi_stride) {
  using V = Vec<float>;
  using Raw = V::Raw;
  constexpr int N = V::N;
  for (int64_t t = 0; t < tw; ++t) {
    Raw mid[6][6];
#pragma GCC unroll 6
    for (int s = 0; s < 6; ++s) {
      Raw line[6], o[6];
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) line[r] = V::load(strip + (r * columns + 4 * t + s) * N).v;
      input_line(line, o);
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) mid[r][s] = o[r];
    }
    float* to = v + t * N;
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) {
      Raw o[6];
      input_line(mid[r], o);
#pragma GCC unroll 6
      for (int s = 0; s < 6; ++s) V{o[s]}.store(to + (r * 6 + s) * xi_stride);
    }
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
