// One line of Winograd's transforms, forward and transposed, by the size of the kernel: its points are 0, 1, -1, 2, -2
// and infinity, and for five taps 1/2 and -1/2 as well. A transform of a tile is its line applied to every column, then
// to every row (transform_tile()). In the gradient of the weight, grad and grad_weight stand for output and weight. In
// the transposed gradient of the input, a tile of outputs' gradients becomes points (grad), the products with the
// weight give points of the input's gradient, and input_back makes them a tile that overlaps its neighbours.
#pragma once
#include "../winograd_tile.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// For two, three and four taps: the same six points, so their tiles of the input transform alike.
template <int TAPS>
struct Lines {
  static constexpr int OUT = winograd_outputs(TAPS);
  static_assert(winograd_side(TAPS) == 6);
  // B^T d.
  FASTNN_INLINE void input(const f32v d[6], f32v t[6]) {
    const f32v a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1];
    const f32v c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    t[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = 4.f * d[1] - 5.f * d[3] + d[5];
  }
  // A^T m.
  FASTNN_INLINE void output(const f32v m[6], f32v y[OUT]) {
    const f32v a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
#pragma GCC unroll 5
    for (int i = 0; i < OUT; ++i) {
      y[i] = i % 2 ? b + float(1 << i) * e : a + float(1 << i) * c;
      if (i == 0) y[i] = y[i] + m[0];
      if (i == OUT - 1) y[i] = y[i] + m[5];
    }
  }
  // G g.
  FASTNN_INLINE void weight(const f32v g[TAPS], f32v t[6]) {
    f32v even = g[0], odd = g[1], even2 = g[0] * (1.f / 24), odd2 = g[1] * (1.f / 12);
    if constexpr (TAPS >= 3) even = even + g[2], even2 = even2 + g[2] * (1.f / 6);
    if constexpr (TAPS >= 4) odd = odd + g[3], odd2 = odd2 + g[3] * (1.f / 3);
    const f32v a = even * (-1.f / 6), b = odd * (1.f / 6);
    t[0] = g[0] * 0.25f;
    t[1] = a - b;
    t[2] = a + b;
    t[3] = even2 + odd2;
    t[4] = even2 - odd2;
    t[5] = g[TAPS - 1];
  }
  // A g.
  FASTNN_INLINE void grad(const f32v g[OUT], f32v t[6]) {
    f32v even = g[0] + g[2], odd = g[1], even2 = g[0] + 4.f * g[2], odd2 = 2.f * g[1];
    if constexpr (OUT >= 4) odd = odd + g[3], odd2 = odd2 + 8.f * g[3];
    if constexpr (OUT >= 5) even = even + g[4], even2 = even2 + 16.f * g[4];
    t[0] = g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = even2 + odd2;
    t[4] = even2 - odd2;
    t[5] = g[OUT - 1];
  }
  // G^T u.
  FASTNN_INLINE void grad_weight(const f32v u[6], f32v w[TAPS]) {
    const f32v a = u[1] + u[2], b = u[2] - u[1], c = u[3] + u[4], e = u[3] - u[4];
#pragma GCC unroll 5
    for (int i = 0; i < TAPS; ++i) {
      const float power = float(1 << i) / 24;
      w[i] = i % 2 ? (1.f / 6) * b + power * e : power * c - (1.f / 6) * a;
      if (i == 0) w[i] = w[i] + 0.25f * u[0];
      if (i == TAPS - 1) w[i] = w[i] + u[5];
    }
  }
  // B m.
  FASTNN_INLINE void input_back(const f32v m[6], f32v y[6]) {
    const f32v s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = 4.f * m[0];
    y[1] = 4.f * (m[5] - d1) - 2.f * d2;
    y[2] = -5.f * m[0] - 4.f * s1 - s2;
    y[3] = d1 + 2.f * d2 - 5.f * m[5];
    y[4] = m[0] + s1 + s2;
    y[5] = m[5];
  }
};

template <>
struct Lines<5> {
  // B^T d.
  FASTNN_INLINE void input(const f32v d[8], f32v t[8]) {
    const f32v a = d[2] + d[6] - 4.25f * d[4], b = d[1] + d[5] - 4.25f * d[3];
    const f32v c = d[6] + 0.25f * d[2] - 1.25f * d[4], e = 0.5f * d[1] - 2.5f * d[3] + 2.f * d[5];
    const f32v f = d[6] + 4.f * d[2] - 5.f * d[4], g = 2.f * d[1] - 2.5f * d[3] + 0.5f * d[5];
    t[0] = d[0] - d[6] + 5.25f * (d[4] - d[2]);
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = f + g;
    t[6] = f - g;
    t[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  }
  // A^T m.
  FASTNN_INLINE void output(const f32v m[8], f32v y[4]) {
    const f32v s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    const f32v s3 = m[5] + m[6], d3 = m[5] - m[6];
    y[0] = m[0] + s1 + (s2 + s3);
    y[1] = d1 + 2.f * d2 + 0.5f * d3;
    y[2] = s1 + 4.f * s2 + 0.25f * s3;
    y[3] = d1 + 8.f * d2 + (0.125f * d3 + m[7]);
  }
  // G g.
  FASTNN_INLINE void weight(const f32v g[5], f32v t[8]) {
    const f32v a = (-2.f / 9) * (g[0] + g[2] + g[4]), b = (-2.f / 9) * (g[1] + g[3]);
    const f32v c = (1.f / 90) * g[0] + (2.f / 45) * g[2] + (8.f / 45) * g[4];
    const f32v e = (1.f / 45) * g[1] + (4.f / 45) * g[3];
    const f32v f = (32.f / 45) * g[0] + (8.f / 45) * g[2] + (2.f / 45) * g[4];
    const f32v h = (16.f / 45) * g[1] + (4.f / 45) * g[3];
    t[0] = g[0];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = f + h;
    t[6] = f - h;
    t[7] = g[4];
  }
  // A g.
  FASTNN_INLINE void grad(const f32v g[4], f32v t[8]) {
    const f32v a = g[0] + g[2], b = g[1] + g[3], c = g[0] + 4.f * g[2], e = 2.f * g[1] + 8.f * g[3];
    const f32v f = g[0] + 0.25f * g[2], h = 0.5f * g[1] + 0.125f * g[3];
    t[0] = g[0];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = f + h;
    t[6] = f - h;
    t[7] = g[3];
  }
  // G^T u.
  FASTNN_INLINE void grad_weight(const f32v u[8], f32v w[5]) {
    const f32v s1 = (-2.f / 9) * (u[1] + u[2]), d1 = (-2.f / 9) * (u[1] - u[2]);
    const f32v s2 = (1.f / 90) * (u[3] + u[4]), d2 = (1.f / 90) * (u[3] - u[4]);
    const f32v s3 = (2.f / 45) * (u[5] + u[6]), d3 = (2.f / 45) * (u[5] - u[6]);
    w[0] = u[0] + s1 + s2 + 16.f * s3;
    w[1] = d1 + 2.f * d2 + 8.f * d3;
    w[2] = s1 + 4.f * s2 + 4.f * s3;
    w[3] = d1 + 8.f * d2 + 2.f * d3;
    w[4] = s1 + 16.f * s2 + s3 + u[7];
  }
  // B m.
  FASTNN_INLINE void input_back(const f32v m[8], f32v y[8]) {
    const f32v s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    const f32v s3 = m[5] + m[6], d3 = m[5] - m[6];
    y[0] = m[0];
    y[1] = d1 + 0.5f * d2 + (2.f * d3 - m[7]);
    y[2] = s1 + 0.25f * s2 + (4.f * s3 - 5.25f * m[0]);
    y[3] = 5.25f * m[7] - 4.25f * d1 - 2.5f * (d2 + d3);
    y[4] = 5.25f * m[0] - 4.25f * s1 - (1.25f * s2 + 5.f * s3);
    y[5] = d1 + 2.f * d2 + (0.5f * d3 - 5.25f * m[7]);
    y[6] = s1 + s2 + (s3 - m[0]);
    y[7] = m[7];
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
