// Depthwise convolution by 3x3 in NHWC of stride 1 and 2: tiles of a few rows of outputs by one vector of channels walk
// along the columns. The nine weights and the sums of the outputs under way stay in registers, so a value of the image
// is loaded once for every tap it meets: with four rows 1.5 loads of it per output instead of 9.
#include "../../parallel.h"
#include "../machine.h"
#include "lanes.h"
#include "packed_conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;
constexpr int kRows = kVecBytes == 64 ? 4 : 2;  // of outputs in a tile
constexpr int64_t kLine = 16;                   // values of a cache line

// What the tile below is the first to read and to write, fetched column by column: rows of lines of x and y, so far
// apart. No x: nothing is fetched.
struct Below {
  const float* x;
  float* y;
  int64_t x_column, x_row, y_column, y_row;
};

struct Tile {
  const float* x;  // what tap (0, 0) of the tile's first output meets, inside the image or not
  const float* w;  // [3][3][N], bias[N]
  const float* residual;
  float* y;
  unsigned inside;  // bit u: row u of the input lies in the image
  Below below;
};

template <bool PLAIN>
FASTNN_INLINE void finish(const PackedConv2dParams& p, const Clamp& clamp, const Tile& o, Raw acc, int64_t row,
                          int64_t q) {
  if constexpr (!PLAIN) {
    if (o.residual) acc = acc + V::load(o.residual + row * p.residual_stride_h + q * p.residual_stride_w).v;
    acc = clamp(acc);
  }
  V{acc}.store(o.y + row * p.output_stride_h + q * p.output_stride_w);
}

// Calls f(value, t, r) for every meeting of column k of the image, -pad_w being the first, with a row t of the tile.
template <int T, int STRIDE, bool EDGE, class F>
FASTNN_INLINE void column(const PackedConv2dParams& p, const Tile& o, int64_t k, const F& f) {
  constexpr int kIn = STRIDE * (T - 1) + 3;
  if (uint64_t(k - p.pad_w) >= uint64_t(p.W)) return;
  const float* const at = o.x + k * p.input_stride_w;
#pragma GCC unroll 16
  for (int u = 0; u < kIn; ++u) {
    if (EDGE && !(o.inside >> u & 1)) continue;
    const Raw v = in_register(V::load(at + u * p.input_stride_h).v);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      if (u >= STRIDE * t && u - STRIDE * t < 3) f(v, t, u - STRIDE * t);
  }
}

template <int T, int STRIDE>
FASTNN_INLINE void fetch_below(const Below& o, int64_t k, int64_t q) {
  if (!o.x) return;
#pragma GCC unroll 8
  for (int u = 0; u < STRIDE * T; ++u) __builtin_prefetch(o.x + k * o.x_column + u * o.x_row, 0, 2);
  if (STRIDE == 2 && k % 2) return;
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) __builtin_prefetch(o.y + q * o.y_column + t * o.y_row, 1, 2);
}

template <int T, bool EDGE, bool PLAIN>
void walk_1(const PackedConv2dParams& p, const Tile& o) {
  const Clamp clamp(p);
  const Raw bias = V::load(o.w + 9 * N).v;
  Raw w[9], acc[3][T];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) w[i] = in_register(V::load(o.w + i * N).v);
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[i][t] = bias;
  for (int64_t k = 0; k < p.Q + 2; k += 3) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      // Column k + i is the first of output k + i, the last of output k + i - 2.
      fetch_below<T, 1>(o.below, k + i, k + i);
      column<T, 1, EDGE>(p, o, k + i, [&](Raw v, int t, int r) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) acc[(i - s + 3) % 3][t] += w[r * 3 + s] * v;
      });
      const int64_t q = k + i - 2;
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        if (uint64_t(q) < uint64_t(p.Q)) finish<PLAIN>(p, clamp, o, acc[(i + 1) % 3][t], t, q);
        acc[(i + 1) % 3][t] = bias;
      }
    }
  }
}

template <int T, bool EDGE, bool PLAIN>
void walk_2(const PackedConv2dParams& p, const Tile& o) {
  const Clamp clamp(p);
  const Raw bias = V::load(o.w + 9 * N).v;
  Raw w[9], acc[T], next[T];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) w[i] = in_register(V::load(o.w + i * N).v);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t] = bias;
  for (int64_t q = 0; q <= p.Q; ++q) {
    fetch_below<T, 2>(o.below, 2 * q, q);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) next[t] = bias;
    column<T, 2, EDGE>(p, o, 2 * q, [&](Raw v, int t, int r) __attribute__((always_inline)) {
      acc[t] += w[r * 3 + 2] * v;
      next[t] += w[r * 3] * v;
    });
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      if (q > 0) finish<PLAIN>(p, clamp, o, acc[t], t, q - 1);
      acc[t] = next[t];
    }
    fetch_below<T, 2>(o.below, 2 * q + 1, q);
    column<T, 2, EDGE>(p, o, 2 * q + 1,
                       [&](Raw v, int t, int r) __attribute__((always_inline)) { acc[t] += w[r * 3 + 1] * v; });
  }
}

using Walk = void (*)(const PackedConv2dParams&, const Tile&);
template <int T, bool EDGE>
Walk find_walk(const PackedConv2dParams& p) {
  const bool plain = !p.residual && p.low == -__builtin_inff() && p.high == __builtin_inff();
  if (p.stride_w == 1) return plain ? walk_1<T, EDGE, true> : walk_1<T, EDGE, false>;
  return plain ? walk_2<T, EDGE, true> : walk_2<T, EDGE, false>;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

bool depthwise_3x3_takes(const PackedConv2dParams& p) {
  return p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1 && p.stride_h == p.stride_w &&
         p.stride_h <= 2 && p.C >= N;
}

void depthwise_3x3_run(const PackedConv2dParams& p) {
  static_assert(kRows == 2 || kRows == 4);
  const Walk whole[] = {find_walk<kRows, false>(p), find_walk<kRows, true>(p)},
             rest[] = {find_walk<1, true>(p), find_walk<2, true>(p), find_walk<kRows - 1, true>(p)};
  const int64_t tiles = ceil_div(p.P, kRows);
  // Of tiles the hardware fetches nothing ahead: 8x144x56x56 took 3.3 times as long without, what stays in the caches
  // 1.05 (stride 1) to 1.25 times as long with.
  const bool far = p.N * p.C * (p.H * p.W + p.P * p.Q) > 1 << 21;
  // In the order of memory rather than that of the walk, Emerald Rapids takes 0.76 of the time for 8x96x112x112 of
  // stride 2, 0.9 for 8x32x112x112, 0.98 to 1.01 for most others.
  const bool in_order = intel() && p.input_stride_w == p.C && p.input_stride_h == p.W * p.C &&
                        p.output_stride_w == p.C && p.output_stride_h == p.Q * p.C;
  parallel_for(0, p.N * tiles, max64(1, (1 << 15) / (p.Q * p.C * kRows)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / tiles, h = item % tiles * kRows, rows = min64(kRows, p.P - h);
      const int64_t first = h * p.stride_h - p.pad_h, count = (rows - 1) * p.stride_h + 3;
      unsigned inside = 0;
      for (int64_t u = 0; u < count; ++u) inside |= unsigned(uint64_t(first + u) < uint64_t(p.H)) << u;
      const bool edge = inside != (1u << count) - 1;
      const Walk walk = rows == kRows ? whole[edge] : rest[rows - 1];
      const float* const x = p.input + n * p.input_stride_n + first * p.input_stride_h - p.pad_w * p.input_stride_w;
      const float* const residual =
          p.residual ? p.residual + n * p.residual_stride_n + h * p.residual_stride_h : nullptr;
      float* const y = p.output + n * p.output_stride_n + h * p.output_stride_h;
      const float* const x_below = x + count * p.input_stride_h;
      float* const y_below = y + rows * p.output_stride_h;
      for (int64_t i = 0; i < p.C; i += N) {
        const int64_t c = min64(i, p.C - N);
        Below below{};
        if (far && in_order) {
          const int64_t lines = rows * kLine, image = i * rows;
          below = {x_below + p.pad_w * p.C + image * p.stride_h * p.W,
                   y_below + image * p.Q,
                   lines * p.stride_h,
                   kLine,
                   lines,
                   kLine};
        } else if (far) {
          below = {x_below + c, y_below + c, p.input_stride_w, p.input_stride_h, p.output_stride_w, p.output_stride_h};
        }
        walk(p, {x + c, p.packed + i * 10, residual ? residual + c : nullptr, y + c, inside, below});
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
