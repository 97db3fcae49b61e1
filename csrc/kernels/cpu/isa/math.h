// exp and log on vectors and scalars of the accumulation types.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// 2^n for integral lanes in the normal exponent range.
FASTNN_INLINE f32v pow2i(i32v n) { return (f32v)((n + 127) << 23); }
FASTNN_INLINE f64v pow2i(i64v n) { return (f64v)((n + 1023) << 52); }

// exp in float32: x = n ln2 + r, |r| <= ln2/2, a degree-6 polynomial on r (Chebyshev fit of the series beyond 1 + r),
// then two half-scalings so that subnormal results round once. With FMA within 0.95 ulp over [-87, 88] (4 M random
// points); exp(-inf) = 0, exp(+inf) = inf, exp(NaN) = NaN.
FASTNN_INLINE Vec<float> exp(Vec<float> a) {
  const f32v x = a.v;
  // Clamped so that the exponent arithmetic stays in range; NaN falls through the comparisons into the blend below.
  f32v c = x < -104.f ? Vec<float>::set1(-104.f).v : x;
  c = c > 89.f ? Vec<float>::set1(89.f).v : c;
  const f32v magic = Vec<float>::set1(0x1.8p23f).v;  // adding it rounds to an integer in the low mantissa bits
  const f32v t = c * 0x1.715476p+0f + magic;
  const f32v n = t - magic;
  f32v r = n * -0x1.62e400p-1f + c;      // ln2's high part: n times it is exact
  r = n * -0x1.7f7d1cp-20f + r;
  f32v p = r * 0x1.6d431ap-10f + 0x1.120b66p-7f;
  p = p * r + 0x1.5554eap-5f;
  p = p * r + 0x1.5554dcp-3f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const i32v e = (i32v)t - (i32v)magic;
  const i32v half = e >> 1;
  const f32v y = p * pow2i(half) * pow2i(e - half);
  return {x == x ? y : x};
}

FASTNN_INLINE float exp(float x) { return __builtin_expf(x); }
FASTNN_INLINE double exp(double x) { return __builtin_exp(x); }
FASTNN_INLINE float log(float x) { return __builtin_logf(x); }
FASTNN_INLINE double log(double x) { return __builtin_log(x); }

template <class A>
FASTNN_INLINE Vec<A> log(Vec<A> a) {
  for (int i = 0; i < Vec<A>::N; ++i) a.v[i] = log(A(a.v[i]));
  return a;
}

// Lane by lane through libm: float64 is for checking, not for speed.
FASTNN_INLINE Vec<double> exp(Vec<double> a) {
  for (int i = 0; i < Vec<double>::N; ++i) a.v[i] = __builtin_exp(a.v[i]);
  return a;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
