// What Winograd's forward and weight gradient share: the transforms of F(5x5, 2x2), F(4x4, 3x3), F(3x3, 4x4) and
// F(2x2, 5x5), and strips of padded rows. All have six points (0, 1, -1, 2, -2, infinity), so 6x6 tiles of the input
// transform alike; a larger kernel's tiles overlap more. TAPS is the kernel's size, 7 - TAPS the side of a tile of
// outputs.
// A strided problem is one of stride 1 with more channels (conv2d_phases.h).
#pragma once
#include "conv2d_phases.h"
#include "conv2d_problem.h"
#include "simd.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// A stride of an odd number of cache lines: the 36 planes of a tile then fall into different cache sets.
FASTNN_INLINE int64_t odd_lines(int64_t elements) { return (ceil_div(elements, 16) | 1) * 16; }

template <int TAPS>
constexpr int kTileOut = 7 - TAPS;
constexpr int kMaxKernel = 16 * 16;  // taps: conv2d_choose.cpp asks for no more

// Calls f.operator()<TAPS>().
template <class F>
FASTNN_INLINE auto dispatch_taps(const ConvProblem& d, const F& f) {
  switch (ceil_div(d.r, d.stride_h)) {
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    default: return f.template operator()<5>();
  }
}

// ---- one line of a transform ---------------------------------------------------------------------------------------

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

// A^T m: outputs of one line.
template <int OUT>
FASTNN_INLINE void output_line(const f32v m[6], f32v y[OUT]) {
  const f32v a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
#pragma GCC unroll 5
  for (int i = 0; i < OUT; ++i) {
    y[i] = i % 2 ? b + float(1 << i) * e : a + float(1 << i) * c;
    if (i == 0) y[i] = y[i] + m[0];
    if (i == OUT - 1) y[i] = y[i] + m[5];
  }
}

// G g: the points of one line of a kernel.
template <int TAPS>
FASTNN_INLINE void weight_line(const f32v g[TAPS], f32v t[6]) {
  f32v even = g[0], odd = g[1], even2 = g[0] * (1.f / 24), odd2 = g[1] * (1.f / 12);
  if constexpr (TAPS >= 3) even = even + g[2], even2 = even2 + g[2] * (1.f / 6);
  if constexpr (TAPS >= 4) odd = odd + g[3], odd2 = odd2 + g[3] * (1.f / 3);
  if constexpr (TAPS >= 5) even = even + g[4], even2 = even2 + g[4] * (2.f / 3);
  const f32v a = even * (-1.f / 6), b = odd * (1.f / 6);
  t[0] = g[0] * 0.25f;
  t[1] = a - b;
  t[2] = a + b;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = g[TAPS - 1];
}

// A g: the points of one line of grad_output.
template <int OUT>
FASTNN_INLINE void grad_line(const f32v g[OUT], f32v t[6]) {
  f32v even = g[0], odd = g[1], even2 = g[0], odd2 = 2.f * g[1];
  if constexpr (OUT >= 3) even = even + g[2], even2 = even2 + 4.f * g[2];
  if constexpr (OUT >= 4) odd = odd + g[3], odd2 = odd2 + 8.f * g[3];
  if constexpr (OUT >= 5) even = even + g[4], even2 = even2 + 16.f * g[4];
  t[0] = g[0];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = g[OUT - 1];
}

// G^T u: one line of the weight's gradient.
template <int TAPS>
FASTNN_INLINE void grad_weight_line(const f32v u[6], f32v w[TAPS]) {
  const f32v a = u[1] + u[2], b = u[2] - u[1], c = u[3] + u[4], e = u[3] - u[4];
#pragma GCC unroll 5
  for (int i = 0; i < TAPS; ++i) {
    const float power = float(1 << i) / 24;
    w[i] = i % 2 ? (1.f / 6) * b + power * e : power * c - (1.f / 6) * a;
    if (i == 0) w[i] = w[i] + 0.25f * u[0];
    if (i == TAPS - 1) w[i] = w[i] + u[5];
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// A transform in two dimensions: kLine(in, out) of every column of load(r, s), IN values to OUT, then of every row of
// what that gave.
template <auto kLine, int IN, int OUT, class Load>
FASTNN_INLINE void transform_columns(const Load& load, f32v mid[OUT][IN]) {
#pragma GCC unroll 8
  for (int s = 0; s < IN; ++s) {
    f32v in[IN], out[OUT];
#pragma GCC unroll 8
    for (int r = 0; r < IN; ++r) in[r] = load(r, s);
    kLine(in, out);
#pragma GCC unroll 8
    for (int r = 0; r < OUT; ++r) mid[r][s] = out[r];
  }
}
template <auto kLine, int IN, int OUT, class Load, class Store>
FASTNN_INLINE void transform_tile(const Load& load, const Store& store) {
  f32v mid[OUT][IN];
  transform_columns<kLine, IN, OUT>(load, mid);
#pragma GCC unroll 8
  for (int r = 0; r < OUT; ++r) {
    f32v out[OUT];
    kLine(mid[r], out);
#pragma GCC unroll 8
    for (int s = 0; s < OUT; ++s) store(r, s, out[s]);
  }
}

// The 36 points of a tile, `xi_stride` apart, to load or to store.
FASTNN_INLINE auto load_points(const float* m, int64_t xi_stride) {
  return [=](int r, int s) __attribute__((always_inline)) { return Vec<float>::load(m + (r * 6 + s) * xi_stride).v; };
}
FASTNN_INLINE auto store_points(float* v, int64_t xi_stride) {
  return [=](int r, int s, f32v x) __attribute__((always_inline)) { Vec<float>{x}.store(v + (r * 6 + s) * xi_stride); };
}

// ---- strips --------------------------------------------------------------------------------------------------------

template <int TAPS>
FASTNN_INLINE int64_t strip_columns(int64_t tw) {
  constexpr int N = Vec<float>::N;
  return round_up(kTileOut<TAPS> * tw + TAPS - 1, N) + N;
}

// The first `rows` rows of channel group `group` for one row of tiles, padded: strip[row][column][lane]. A phase of an
// input's gradient may leave out the first column: negative padding.
template <int TAPS>
void fill_strip(const ConvProblem& d, int64_t tw, int64_t columns, const float* image, int64_t tile_row, int64_t group,
                int rows, float* strip) {
  using V = Vec<float>;
  constexpr int N = V::N;
  const int64_t used = kTileOut<TAPS> * tw + TAPS - 1;
  if (d.stride_h > 1) return fill_phase_rows(d, image, tile_row * kTileOut<TAPS>, rows, group, used, columns, strip);
  const int lanes = int(min64(N, d.c - group * N));
  const int64_t skipped = max64(0, -d.pad_w), pad = max64(0, d.pad_w), count = min64(d.w - skipped, used - pad);
  const float* x = image + group * N * d.xc + skipped * d.xw;
  for (int r = 0; r < rows; ++r) {
    float* row = strip + r * columns * N;
    const int64_t ih = tile_row * kTileOut<TAPS> + r - d.pad_h;
    if (ih < 0 || ih >= d.h) {
      for (int64_t i = 0; i < used; ++i) V::zero().store(row + i * N);
      continue;
    }
    for (int64_t i = 0; i < pad; ++i) V::zero().store(row + i * N);
    const float* from = x + ih * d.xh;
    if (d.xc == 1) {
      for (int64_t i = 0; i < count; ++i)
        (lanes == N ? V::load(from + i * d.xw) : V::load_n(from + i * d.xw, lanes)).store(row + (pad + i) * N);
    } else {
      for (int64_t i = 0; i < count; i += N)
        transpose_block(from + i * d.xw, d.xc, d.xw, lanes, int(min64(N, count - i)), row + (pad + i) * N);
    }
    for (int64_t i = pad + max64(0, count); i < used; ++i) V::zero().store(row + i * N);
  }
}

// V of every tile of the strip: 36 vectors each, xi_stride elements apart.
template <int TAPS>
void transform_input(int64_t tw, int64_t columns, const float* strip, float* v, int64_t xi_stride) {
  using V = Vec<float>;
  for (int64_t t = 0; t < tw; ++t) {
    const auto load = [&](int r, int s) __attribute__((always_inline)) {
      return V::load(strip + (r * columns + kTileOut<TAPS> * t + s) * V::N).v;
    };
    transform_tile<input_line, 6, 6>(load, store_points(v + t * V::N, xi_stride));
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
