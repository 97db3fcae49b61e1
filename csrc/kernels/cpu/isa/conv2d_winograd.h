// What Winograd's forward and weight gradient share: transforms of tiles and strips of padded rows. TAPS is the
// kernel's size.
// A strided problem is one of stride 1 with more channels (conv2d_phases.h).
#pragma once
#include "conv2d_phases.h"
#include "conv2d_problem.h"
#include "conv2d_winograd_lines.h"
#include "simd.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// A stride of an odd number of cache lines: the planes of a tile then fall into different cache sets.
FASTNN_INLINE int64_t odd_lines(int64_t elements) { return (ceil_div(elements, 16) | 1) * 16; }

template <int TAPS>
constexpr int kTileIn = winograd_side(TAPS);  // a side
template <int TAPS>
constexpr int kTileOut = winograd_outputs(TAPS);
template <int TAPS>
constexpr int kTilePoints = winograd_points(TAPS);
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

// The points of a tile, `xi_stride` apart, to load or to store.
template <int TAPS>
FASTNN_INLINE auto load_points(const float* m, int64_t xi_stride) {
  return [=](int r, int s)
             __attribute__((always_inline)) { return Vec<float>::load(m + (r * kTileIn<TAPS> + s) * xi_stride).v; };
}
template <int TAPS>
FASTNN_INLINE auto store_points(float* v, int64_t xi_stride) {
  return [=](int r, int s, f32v x)
             __attribute__((always_inline)) { Vec<float>{x}.store(v + (r * kTileIn<TAPS> + s) * xi_stride); };
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

// V of every tile of the strip: kTilePoints vectors each, xi_stride elements apart.
template <int TAPS>
void transform_input(int64_t tw, int64_t columns, const float* strip, float* v, int64_t xi_stride) {
  using V = Vec<float>;
  for (int64_t t = 0; t < tw; ++t) {
    const auto load = [&](int r, int s) __attribute__((always_inline)) {
      return V::load(strip + (r * columns + kTileOut<TAPS> * t + s) * V::N).v;
    };
    transform_tile<Lines<TAPS>::input, kTileIn<TAPS>, kTileIn<TAPS>>(load, store_points<TAPS>(v + t * V::N, xi_stride));
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
