// Gradients of depthwise convolutions by 3x3 of float32 images in NHWC: the weight's, and the input's at stride 2. As
// forward (packed_conv2d_depthwise_3x3.cpp) tiles of a few rows by one vector of channels walk along the columns.
#include "../../parallel.h"
#include "conv2d.h"
#include "lanes.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;
// Of grad_output in a tile: ten sums stay in registers, three columns, and a value of the image (of sixteen registers
// two rows took 1.4 times as long as one).
constexpr int kRows = kVecBytes == 64 ? 4 : 1;
constexpr int kSums = 10;  // the taps, and the bias

struct Tile {
  const float* x;  // what tap (0, 0) of the tile's first output meets, inside the image or not
  const float* g;
  float* sums;
  unsigned inside;  // bit u: row u of the input lies in the image
  bool far;         // more data than stays in the caches
};

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

// ---- the gradient of the weight -------------------------------------------------------------------------------------

// What the tile below is the first to read.
template <int T, int STRIDE>
FASTNN_INLINE void fetch_below(const Conv2dParams& p, const Tile& o, int64_t q) {
#pragma GCC unroll 2
  for (int j = 0; j < STRIDE; ++j)
#pragma GCC unroll 8
    for (int u = 0; u < STRIDE * T; ++u)
      __builtin_prefetch(o.x + (q * STRIDE + j) * p.input_stride_w + (STRIDE * (T - 1) + 3 + u) * p.input_stride_h, 0,
                         2);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) __builtin_prefetch(o.g + q * p.output_stride_q + (T + t) * p.output_stride_p, 0, 2);
}

// Calls f(value, t, r) for every meeting of column k of the image, -pad_w being the first, with a row t of the tile.
template <int T, int STRIDE, bool EDGE, class F>
FASTNN_INLINE void column(const Conv2dParams& p, const Tile& o, int64_t k, const F& f) {
  if (uint64_t(k - p.pad_w) >= uint64_t(p.W)) return;
  const float* const at = o.x + k * p.input_stride_w;
#pragma GCC unroll 16
  for (int u = 0; u < STRIDE * (T - 1) + 3; ++u) {
    if (EDGE && !(o.inside >> u & 1)) continue;
    const Raw v = in_register(V::load(at + u * p.input_stride_h).v);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      if (u >= STRIDE * t && u - STRIDE * t < 3) f(v, t, u - STRIDE * t);
  }
}

template <int T, int STRIDE, bool EDGE>
void weight_walk(const Conv2dParams& p, const Tile& o) {
  constexpr int kKept = STRIDE == 1 ? 3 : 2;  // columns of grad_output that a column of the image meets
  Raw acc[kSums] = {}, g[kKept][T] = {};
  const auto enter = [&](Raw(&to)[T], int64_t q) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      to[t] = in_register(V::load(o.g + t * p.output_stride_p + q * p.output_stride_q).v);
      acc[9] += to[t];
    }
  };
  // Outputs that there are not have no part: 0 times infinity would.
  const auto step = [&](int i, int64_t q, auto inner) __attribute__((always_inline)) {
    constexpr bool kInner = decltype(inner)::value;
    const auto out = [&](int64_t at) __attribute__((always_inline)) { return kInner || uint64_t(at) < uint64_t(p.Q); };
    if (kInner && o.far) fetch_below<T, STRIDE>(p, o, q);
    if (out(q)) enter(g[i], q);
    if constexpr (STRIDE == 1) {
      column<T, 1, EDGE>(p, o, q, [&](Raw v, int t, int r) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s)
          if (out(q - s)) acc[r * 3 + s] += v * g[(i - s + 3) % 3][t];
      });
    } else {
      column<T, 2, EDGE>(p, o, 2 * q, [&](Raw v, int t, int r) __attribute__((always_inline)) {
        if (out(q)) acc[r * 3] += v * g[i][t];
        if (out(q - 1)) acc[r * 3 + 2] += v * g[1 - i][t];
      });
      if (!out(q)) return;
      column<T, 2, EDGE>(p, o, 2 * q + 1,
                         [&](Raw v, int t, int r) __attribute__((always_inline)) { acc[r * 3 + 1] += v * g[i][t]; });
    }
  };
  int64_t q = 0;
  for (; q < p.Q + kKept - 1; q += kKept) {
    if (q >= kKept - 1 && q + kKept <= p.Q) {
#pragma GCC unroll 3
      for (int i = 0; i < kKept; ++i) step(i, q + i, Flag<true>{});
    } else {
#pragma GCC unroll 3
      for (int i = 0; i < kKept; ++i) step(i, q + i, Flag<false>{});
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) V{V::load(o.sums + i * N).v + acc[i]}.store(o.sums + i * N);
}

using Walk = void (*)(const Conv2dParams&, const Tile&);
template <int T, bool EDGE>
Walk find_walk(const Conv2dParams& p) {
  return p.stride_w == 1 ? weight_walk<T, 1, EDGE> : weight_walk<T, 2, EDGE>;
}

bool leaves_caches(const Conv2dParams& p) { return p.N * p.C * (p.H * p.W + p.P * p.Q) > 1 << 21; }

void run_weight(const Conv2dParams& p) {
  const Walk whole[] = {find_walk<kRows, false>(p), find_walk<kRows, true>(p)},
             rest[] = {find_walk<1, true>(p), find_walk<2, true>(p), find_walk<3, true>(p)};
  const bool far = leaves_caches(p);
  float* const sums = static_cast<float*>(p.workspace);
  const int64_t grain = max64(1, (1 << 15) / (p.N * p.P * p.Q * N));
  parallel_for(0, ceil_div(p.C, N), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kSums; i < end * kSums; ++i) V::zero().store(sums + i * N);
    for (int64_t n = 0; n < p.N; ++n)
      for (int64_t h = 0; h < p.P; h += kRows) {
        const int64_t rows = min64(kRows, p.P - h), first = h * p.stride_h - p.pad_h;
        const int64_t count = (rows - 1) * p.stride_h + 3;
        unsigned inside = 0;
        for (int64_t u = 0; u < count; ++u) inside |= unsigned(uint64_t(first + u) < uint64_t(p.H)) << u;
        const Walk walk = rows == kRows ? whole[inside != (1u << count) - 1] : rest[rows - 1];
        const float* const x = static_cast<const float*>(p.input) + n * p.input_stride_n + first * p.input_stride_h -
                               p.pad_w * p.input_stride_w;
        const float* const g = static_cast<const float*>(p.grad_output) + n * p.output_stride_n + h * p.output_stride_p;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t c = min64(i * N, p.C - N);
          walk(p, {x + c, g + c, sums + i * kSums * N, inside, far});
        }
      }
    for (int64_t c = begin * N; c < min64(end * N, p.C); ++c) {
      const int64_t i = c / N;  // the last vector counts back from the end
      const float* const from = sums + i * kSums * N + c - min64(i * N, p.C - N);
      float* const to = static_cast<float*>(p.grad_weight) + c * p.weight_stride_k;
      for (int64_t r = 0; r < 3; ++r)
        for (int64_t s = 0; s < 3; ++s) to[r * p.weight_stride_r + s * p.weight_stride_s] = from[(r * 3 + s) * N];
      if (p.grad_bias) static_cast<float*>(p.grad_bias)[c] = from[9 * N];
    }
  });
}

// ---- the gradient of the input at stride 2 --------------------------------------------------------------------------

// T rows of grad_output, which begin rows of pairs of grad_input. LAST: the row below is outside.
template <int T>
void input_walk(const Conv2dParams& p, const float* weight, const float* g, float* y, bool last, bool odd, bool far) {
  Raw w[9], now[T + 1], next[T + 1];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) w[i] = in_register(V::load(weight + i * N).v);
  const auto load = [&](Raw(&to)[T + 1], int64_t q) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int t = 0; t <= T; ++t)
      to[t] = q < p.Q && !(t == T && last) ? in_register(V::load(g + t * p.output_stride_p + q * p.output_stride_q).v)
                                           : Raw{};
  };
  load(now, 0);
  for (int64_t q = 0; q < p.Q; ++q) {
    float* const to = y + 2 * q * p.input_stride_w;
    if (far) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) __builtin_prefetch(g + (T + 1 + t) * p.output_stride_p + q * p.output_stride_q, 0, 2);
#pragma GCC unroll 4
      for (int t = 0; t < 2 * T; ++t) {
        __builtin_prefetch(to + (2 * T + t) * p.input_stride_h, 1, 2);
        __builtin_prefetch(to + (2 * T + t) * p.input_stride_h + p.input_stride_w, 1, 2);
      }
    }
    load(next, q + 1);
    const bool two = 2 * q + 1 < p.W;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      float* const row = to + 2 * t * p.input_stride_h;
      V{w[4] * now[t]}.store(row);
      if (two) V{w[5] * now[t] + w[3] * next[t]}.store(row + p.input_stride_w);
      if (odd && t == T - 1) continue;  // the image's last row has no other
      V{w[7] * now[t] + w[1] * now[t + 1]}.store(row + p.input_stride_h);
      if (two)
        V{(w[8] * now[t] + w[6] * next[t]) + (w[2] * now[t + 1] + w[0] * next[t + 1])}.store(row + p.input_stride_h +
                                                                                             p.input_stride_w);
    }
#pragma GCC unroll 4
    for (int t = 0; t <= T; ++t) now[t] = next[t];
  }
}

void run_input(const Conv2dParams& p) {
  float* const packed = static_cast<float*>(p.workspace);
  const float* const weight = static_cast<const float*>(p.weight);
  const int64_t vectors = ceil_div(p.C, N);
  for (int64_t i = 0; i < vectors; ++i)
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t s = 0; s < 3; ++s)
        for (int l = 0; l < N; ++l)
          packed[(i * 9 + r * 3 + s) * N + l] =
              weight[(min64(i * N, p.C - N) + l) * p.weight_stride_k + r * p.weight_stride_r + s * p.weight_stride_s];
  const bool far = leaves_caches(p);
  const int64_t tiles = ceil_div(p.P, 2);
  parallel_for(0, p.N * tiles, max64(1, (1 << 15) / (8 * p.Q * p.C)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / tiles, h = item % tiles * 2, rows = min64(2, p.P - h);
      const bool last = h + rows == p.P, odd = last && p.H % 2;
      const float* const g = static_cast<const float*>(p.grad_output) + n * p.output_stride_n + h * p.output_stride_p;
      float* const y = static_cast<float*>(p.grad_input) + n * p.input_stride_n + 2 * h * p.input_stride_h;
      for (int64_t i = 0; i < vectors; ++i) {
        const int64_t c = min64(i * N, p.C - N);
        (rows == 2 ? input_walk<2> : input_walk<1>)(p, packed + i * 9 * N, g + c, y + c, last, odd, far);
      }
    }
  });
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

bool depthwise_3x3_grad_takes(const Conv2dParams& p) {
  if (p.dtype != DType::f32 || p.input_stride_c != 1 || p.output_stride_k != 1 || p.C < N) return false;
  if (p.R != 3 || p.S != 3 || p.dilation_h != 1 || p.dilation_w != 1 || p.stride_h != p.stride_w) return false;
  if (p.pass == Conv2dPass::grad_input) return p.stride_h == 2 && p.pad_h == 1 && p.pad_w == 1;
  return p.pass == Conv2dPass::grad_weight && p.stride_h <= 2;
}

int64_t depthwise_3x3_grad_workspace(const Conv2dParams& p) {
  return ceil_div(p.C, N) * (p.pass == Conv2dPass::grad_weight ? kSums : 9) * kVecBytes;
}

void depthwise_3x3_grad(const Conv2dParams& p) { p.pass == Conv2dPass::grad_weight ? run_weight(p) : run_input(p); }

}  // namespace fastnn::cpu::FASTNN_ISA_NS
