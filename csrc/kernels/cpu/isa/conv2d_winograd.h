// What Winograd's forward and weight gradient share: transforms of tiles and strips of padded rows. TAPS is the
// kernel's size.
// A strided problem is one of stride 1 with more channels (conv2d_phases.h). A dilated one is dil_h * dil_w ordinary
// ones, each on every dil_h-th row and dil_w-th column: the tiles of an image are those of its row phases, one after
// the other, and the tiles of a row those of its column phases, which lie side by side in a strip.
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
constexpr int kMaxKernel = 16 * 16;  // taps: conv2d_takes.cpp asks for no more

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

// Where the tiles of an image and the columns of a strip lie.
struct Tiling {
  int64_t th, tw;                  // tiles of a column and of a row of an image
  int64_t phases;                  // of a row
  int64_t phase_th, phase_tw;      // tiles of one phase
  int64_t phase_columns, columns;  // of a strip: of one phase, and all

  // The first output row of a row of tiles, and the first column of a tile; the next are dil_h and dil_w apart.
  template <int TAPS>
  int64_t top(const ConvProblem& d, int64_t tile_row) const {
    return tile_row / phase_th + tile_row % phase_th * kTileOut<TAPS> * d.dil_h;
  }
  template <int TAPS>
  int64_t left(const ConvProblem& d, int64_t tile) const {
    return phases == 1 ? tile * kTileOut<TAPS> : tile / phase_tw + tile % phase_tw * kTileOut<TAPS> * d.dil_w;
  }
};

template <int TAPS>
FASTNN_INLINE Tiling make_tiling(const ConvProblem& d) {
  constexpr int N = Vec<float>::N;
  Tiling t{};
  t.phases = d.dil_w;
  t.phase_th = ceil_div(ceil_div(d.p, d.dil_h), kTileOut<TAPS>);
  t.phase_tw = ceil_div(ceil_div(d.q, d.dil_w), kTileOut<TAPS>);
  t.th = d.dil_h * t.phase_th, t.tw = d.dil_w * t.phase_tw;
  t.phase_columns = kTileOut<TAPS> * t.phase_tw + TAPS - 1;
  if (t.phases == 1) t.phase_columns = round_up(t.phase_columns, N) + N;  // whole blocks are written
  t.columns = t.phases * t.phase_columns;
  return t;
}

// A row of the image to its columns in a strip, phase by phase, which is zero.
inline void fill_dilated_row(const ConvProblem& d, const Tiling& t, const float* from, int lanes, float* row) {
  using V = Vec<float>;
  constexpr int N = V::N;
  const int64_t begin = max64(0, -d.pad_w), end = min64(d.w, t.columns - d.pad_w);
  int64_t phase = (begin + d.pad_w) % d.dil_w, column = (begin + d.pad_w) / d.dil_w;
  const auto put = [&](V x) __attribute__((always_inline)) {
    x.store(row + (phase * t.phase_columns + column) * N);
    if (++phase == d.dil_w) phase = 0, ++column;
  };
  if (d.xc == 1) {
    for (int64_t i = begin; i < end; ++i)
      put(lanes == N ? V::load(from + i * d.xw) : V::load_n(from + i * d.xw, lanes));
    return;
  }
  alignas(64) float block[N][N];
  for (int64_t i = begin; i < end; i += N) {
    const int count = int(min64(N, end - i));
    transpose_block(from + i * d.xw, d.xc, d.xw, lanes, count, block[0]);
    for (int j = 0; j < count; ++j) put(V::load(block[j]));
  }
}

// The first `rows` rows of channel group `group` for one row of tiles, padded: strip[row][column][lane]. A phase of an
// input's gradient may leave out the first column: negative padding.
template <int TAPS>
void fill_strip(const ConvProblem& d, const Tiling& t, const float* image, int64_t tile_row, int64_t group, int rows,
                float* strip) {
  using V = Vec<float>;
  constexpr int N = V::N;
  const int64_t used = t.phases == 1 ? kTileOut<TAPS> * t.tw + TAPS - 1 : t.columns, top = t.top<TAPS>(d, tile_row);
  if (d.stride_h > 1) return fill_phase_rows(d, image, top, rows, group, used, t.columns, strip);
  const int lanes = int(min64(N, d.c - group * N));
  const int64_t skipped = max64(0, -d.pad_w), pad = max64(0, d.pad_w), count = min64(d.w - skipped, used - pad);
  const float* x = image + group * N * d.xc + skipped * d.xw;
  for (int r = 0; r < rows; ++r) {
    float* row = strip + r * t.columns * N;
    const int64_t ih = top + r * d.dil_h - d.pad_h;
    if (ih < 0 || ih >= d.h || t.phases > 1)
      for (int64_t i = 0; i < used; ++i) V::zero().store(row + i * N);
    if (ih < 0 || ih >= d.h) continue;
    if (t.phases > 1) {
      fill_dilated_row(d, t, image + group * N * d.xc + ih * d.xh, lanes, row);
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

// V of `tw` tiles of a strip: kTilePoints vectors each, xi_stride elements apart.
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

// Calls f(offset, offset of the first tile) for the columns of each phase of a strip.
template <class F>
FASTNN_INLINE void for_phases(const Tiling& t, const F& f) {
  constexpr int N = Vec<float>::N;
  for (int64_t i = 0; i < t.phases; ++i) f(i * t.phase_columns * N, i * t.phase_tw * N);
}
template <int TAPS>
FASTNN_INLINE void transform_input(const Tiling& t, const float* strip, float* v, int64_t xi_stride) {
  for_phases(t, [&](int64_t column, int64_t tile) {
    transform_input<TAPS>(t.phase_tw, t.columns, strip + column, v + tile, xi_stride);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
