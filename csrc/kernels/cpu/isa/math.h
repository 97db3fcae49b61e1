// exp, tanh and sigmoid on vectors, exp and log on scalars, of the accumulation types.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// 2^n for integral lanes in the normal exponent range.
FASTNN_INLINE f32v pow2i(i32v n) { return (f32v)((n + 127) << 23); }
FASTNN_INLINE f64v pow2i(i64v n) { return (f64v)((n + 1023) << 52); }

// exp: x = n ln2 + r with |r| <= ln2/2, a polynomial in r (Chebyshev fit of the series
// beyond 1 + r), and 2^n. Subnormal results round once more in the baseline and with AVX2.
// exp(-inf) = 0, exp(+inf) = inf, exp(NaN) = NaN. Largest error over random points, with
// FMA: 0.93 ulp in float32 (0.56 with AVX-512); tests/test_loss.py holds float32 to 1 and float64 to 2.5.

// 2^n p for integral n. The clamps below keep n in range; NaN passes through p.
FASTNN_INLINE Vec<float> scale2(f32v p, f32v n) {
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(p, n)};
#else
  const i32v e = __builtin_convertvector(n, i32v), half = e >> 1;
  return {p * pow2i(half) * pow2i(e - half)};
#endif
}
FASTNN_INLINE Vec<double> scale2(f64v p, f64v n) {
#if defined(__AVX512F__)
  return {_mm512_scalef_pd(p, n)};
#else
  const f64v magic = Vec<double>::set1(0x1.8p52).v;  // adding it leaves the integer in the low mantissa bits
  const i64v e = (i64v)(n + magic) - (i64v)magic;
  const i64v half = (i64v)(n * 0.5 + magic) - (i64v)magic;  // a 64-bit arithmetic shift is slow before AVX-512
  return {p * pow2i(half) * pow2i(e - half)};
#endif
}

// f(0) ... f(K - 1): one step of K vectors computed side by side, each of which alone would wait for its own last step.
template <int K, class F>
FASTNN_INLINE void each(const F& f) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) f(k);
}

// exp(x) = 2^n (1 + r p) for x within the clamps of exp.
template <class A, int K>
struct ExpParts {
  typename Vec<A>::Raw n[K], r[K], p[K];
};
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 0x1.715476p+0f;
  static constexpr float kRounder = 0x1.8p23f;   // adding it rounds to an integer
  static constexpr float kLn2 = 0x1.62e400p-1f;  // its high part: n times it is exact
  static constexpr float kLn2Rest = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -104, kHighest = 89;
  static constexpr float kPowers[] = {0x1.6d431ap-10f, 0x1.120b66p-7f, 0x1.5554eap-5f, 0x1.5554dcp-3f, 0.5f, 1.f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLn2 = 0x1.62e42fee00000p-1;
  static constexpr double kLn2Rest = 0x1.a39ef35793c76p-33;
  static constexpr double kLowest = -750, kHighest = 710;
  static constexpr double kPowers[] = {0x1.af38a9b0ec855p-26,
                                       0x1.289185613a3d6p-22,
                                       0x1.71de0dae63bb3p-19,
                                       0x1.a019b90d2ae7ap-16,
                                       0x1.a01a01a7c41d5p-13,
                                       0x1.6c16c1788bd90p-10,
                                       0x1.11111111109b3p-7,
                                       0x1.5555555553d63p-5,
                                       0x1.5555555555556p-3,
                                       0.5,
                                       1.};
};

template <int K, class A>
FASTNN_INLINE ExpParts<A, K> exp_parts(const Vec<A>* x) {
  using C = ExpConstants<A>;
  ExpParts<A, K> e;
  const auto rounder = Vec<A>::set1(C::kRounder).v;
  each<K>([&](int k) { e.n[k] = x[k].v * C::kLog2e + rounder; });
  each<K>([&](int k) { e.n[k] = e.n[k] - rounder; });
  each<K>([&](int k) { e.r[k] = e.n[k] * -C::kLn2 + x[k].v; });
  each<K>([&](int k) { e.r[k] = e.n[k] * -C::kLn2Rest + e.r[k]; });
  each<K>([&](int k) { e.p[k] = e.r[k] * C::kPowers[0] + C::kPowers[1]; });
#pragma GCC unroll 16
  for (int i = 2; i < int(sizeof(C::kPowers) / sizeof(A)); ++i)
    each<K>([&](int k) { e.p[k] = e.p[k] * e.r[k] + C::kPowers[i]; });
  return e;
}
#if defined(__AVX512F__)
// The same in float32 with |r| <= ln2/32: x = n ln2 + r in sixteenths of n, 2^(n - floor(n)) one of sixteen numbers
// that one shuffle looks up by the last bits of n. Seven multiplications instead of nine, 0.85 of the time, and within
// 0.56 ulp: another shuffle adds what a number of the table lacks.
alignas(64) constexpr float kSixteenths[] = {
    1,
    0x1.0b5586p+0f,
    0x1.172b84p+0f,
    0x1.2387a6p+0f,
    0x1.306fep+0f,
    0x1.3dea64p+0f,
    0x1.4bfdaep+0f,
    0x1.5ab07ep+0f,
    0x1.6a09e6p+0f,
    0x1.7a1148p+0f,
    0x1.8ace54p+0f,
    0x1.9c4918p+0f,
    0x1.ae89fap+0f,
    0x1.c199bep+0f,
    0x1.d5818ep+0f,
    0x1.ea4afap+0f,
};
alignas(64) constexpr float kSixteenthsLack[] = {
    0,
    0x1.8d96d4p-25f,
    -0x1.9c0c22p-27f,
    0x1.964904p-25f,
    0x1.125002p-25f,
    0x1.370be4p-25f,
    -0x1.0a355p-25f,
    -0x1.00d8acp-27f,
    0x1.26055cp-26f,
    -0x1.05cb44p-25f,
    0x1.67a1cap-28f,
    0x1.a3b5e4p-28f,
    -0x1.f9c304p-27f,
    -0x1.6961b4p-28f,
    -0x1.a5217cp-28f,
    0x1.61428ep-28f,
};

template <int K>
FASTNN_INLINE void exp_by_table(Vec<float>* a) {
  using C = ExpConstants<float>;
  constexpr float kRounder = C::kRounder / 16, kLn2 = 0x1.62ep-1f, kLn2Rest = 0x1.0bfbe8p-15f;
  // e^r - 1 = r + kSquare r^2 + kCube r^3, the least largest error for this kCube.
  constexpr float kSquare = 0x1.000220p-1f, kCube = 0x1.5555p-3f;
  const f32v rounder = Vec<float>::set1(kRounder).v;
  const __m512 table = _mm512_load_ps(kSixteenths), lack = _mm512_load_ps(kSixteenthsLack);
  f32v bits[K], n[K], r[K], p[K], of_table[K];
  each<K>([&](int k) { bits[k] = a[k].v * C::kLog2e + rounder; });
  each<K>([&](int k) { n[k] = bits[k] - rounder; });
  each<K>([&](int k) { r[k] = n[k] * -kLn2 + a[k].v; });
  each<K>([&](int k) { r[k] = n[k] * -kLn2Rest + r[k]; });
  each<K>([&](int k) { p[k] = r[k] * kCube + kSquare; });
  each<K>([&](int k) { p[k] = p[k] * r[k] + 1.f; });
  each<K>([&](int k) { p[k] = p[k] * r[k] + (f32v)_mm512_permutexvar_ps((__m512i)bits[k], lack); });
  each<K>([&](int k) { of_table[k] = (f32v)_mm512_permutexvar_ps((__m512i)bits[k], table); });
  each<K>([&](int k) { a[k] = scale2(of_table[k] * p[k] + of_table[k], n[k]); });
}
#endif

// The exponentials of K vectors in place: together they take 0.75 of the time of one after another (AVX-512). Without
// kAnySign of numbers up to 80 or NaN, as those less a maximum: 0.9 of the time.
template <int K, bool kAnySign = true, class A>
FASTNN_INLINE void exp_each(Vec<A>* a) {
  using C = ExpConstants<A>;
  using V = Vec<A>;
  // max and min return their second argument when it is NaN.
  each<K>([&](int k) { a[k] = max(V::set1(C::kLowest), a[k]); });
  if constexpr (kAnySign) each<K>([&](int k) { a[k] = min(V::set1(C::kHighest), a[k]); });
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    exp_by_table<(K + 1) / 2>(a);
    if constexpr (K > 1) exp_by_table<K / 2>(a + (K + 1) / 2);
    return;
  }
#endif
  const auto e = exp_parts<K>(a);
  each<K>([&](int k) { a[k] = V{e.p[k] * e.r[k] + A(1)}; });
  each<K>([&](int k) { a[k] = scale2(a[k].v, e.n[k]); });
}
template <class A>
FASTNN_INLINE Vec<A> exp(Vec<A> a) {
  exp_each<1>(&a);
  return a;
}

template <class A>
FASTNN_INLINE Vec<A> abs(Vec<A> a) {
  return max(Vec<A>{-a.v}, a);
}

// The magnitude of m, the sign of x.
template <class A>
FASTNN_INLINE Vec<A> copysign(Vec<A> m, Vec<A> x) {
  using Int = typename Vec<A>::Int;
  const Int sign = (Int)Vec<A>::set1(A(-0.0)).v;
  return {(typename Vec<A>::Raw)(((Int)m.v & ~sign) | ((Int)x.v & sign))};
}

// Of K vectors in place, side by side, as exp_each: silu, tanh and their like take 0.75 to 0.85 of the time.

// tanh in float32: x + x^3 P(x^2) below 0.625, 1 - 2 / (exp(2|x|) + 1) above; within 2 ulp over all floats.
template <int K>
FASTNN_INLINE void tanh_each(Vec<float>* x) {
  Vec<float> e[K];
  f32v t[K], p[K];
  each<K>([&](int k) {
    const f32v m = abs(x[k]).v;
    e[k] = {m + m};
  });
  exp_each<K>(e);
  each<K>([&](int k) { e[k] = {1.f - 2.f / (e[k].v + 1.f)}; });
  each<K>([&](int k) { t[k] = x[k].v * x[k].v; });
  each<K>([&](int k) { p[k] = t[k] * -0.00571699334f + 0.0206505367f; });
  each<K>([&](int k) { p[k] = p[k] * t[k] - 0.0537434808f; });
  each<K>([&](int k) { p[k] = p[k] * t[k] + 0.133314911f; });
  each<K>([&](int k) { p[k] = p[k] * t[k] - 0.333332839f; });
  each<K>([&](int k) { p[k] = x[k].v * t[k] * p[k] + x[k].v; });
  each<K>([&](int k) { x[k] = copysign(Vec<float>{abs(x[k]).v < 0.625f ? p[k] : e[k].v}, x[k]); });  // -0 too
}

// tanh in float64, within 3.5 ulp: E / (E + 2) with E = exp(2|x|) - 1, which 2^n (1 + r p) - 1 gives uncancelled.
template <int K>
FASTNN_INLINE void tanh_each(Vec<double>* x) {
  using V = Vec<double>;
  V twice[K];
  each<K>([&](int k) { twice[k] = min(V::set1(40.), V{abs(x[k]).v * 2.}); });  // tanh(20) rounds to 1; NaN stays
  const auto parts = exp_parts<K>(twice);
  each<K>([&](int k) {
    const f64v power = scale2(V::set1(1.).v, parts.n[k]).v;
    const f64v e = power * (parts.r[k] * parts.p[k]) + (power - 1.);
    x[k] = copysign(V{e / (e + 2.)}, x[k]);
  });
}

// 1 / (1 + exp(-x)); 0 where exp overflows, 1 at +inf, NaN at NaN. In float32 within 2.5 ulp for x > -87.
template <int K, class A>
FASTNN_INLINE void sigmoid_each(Vec<A>* x) {
  each<K>([&](int k) { x[k] = {-x[k].v}; });
  exp_each<K>(x);
  each<K>([&](int k) { x[k] = {A(1) / (x[k].v + A(1))}; });
}

// log: x = 2^e m with m in [sqrt(1/2), sqrt(2)), f = m - 1, s = f / (2 + f), and
// log(1 + f) = f - (f^2/2 - s (f^2/2 + R(s^2))), R fitted to log((1 + s) / (1 - s)) / s - 2. Below 1.5 ulp.
// log(0) = -inf, log(+inf) = +inf, log(NaN) and log of negative numbers NaN.
FASTNN_INLINE Vec<float> log(Vec<float> a) {
  const i32v tiny = a.v < 0x1p-126f;
  const f32v x = tiny ? a.v * 0x1p23f : a.v;
  const i32v e = ((i32v)x - 0x3f3504f3) >> 23;
  const f32v f = (f32v)((i32v)x - (e << 23)) - 1.f;
  const f32v n = __builtin_convertvector(tiny ? e - 23 : e, f32v);
  const f32v s = f / (f + 2.f), z = s * s, half = f * f * 0.5f;
  f32v p = z * 0x1.2ee8c8p-2f + 0x1.997c22p-2f;
  p = p * z + 0x1.55555cp-1f;
  f32v y = n * 0x1.62e400p-1f - ((half - (s * (half + z * p) + n * 0x1.7f7d1cp-20f)) - f);
  y = a.v > 0.f ? y
                : f32v{} - (a.v == 0.f ? Vec<float>::set1(__builtin_inff()).v : Vec<float>::set1(__builtin_nanf("")).v);
  return {a.v == __builtin_inff() ? a.v : y};
}

FASTNN_INLINE Vec<double> log(Vec<double> a) {
  const i64v tiny = a.v < 0x1p-1022;
  const f64v x = tiny ? a.v * 0x1p52 : a.v;
  const i64v e = ((i64v)x - 0x3fe6a09e667f3bcd) >> 52;
  const f64v f = (f64v)((i64v)x - (e << 52)) - 1.;
  const f64v n = __builtin_convertvector(tiny ? e - 52 : e, f64v);
  const f64v s = f / (f + 2.), z = s * s, half = f * f * 0.5;
  f64v p = z * 0x1.2b5f68a50d903p-3 + 0x1.39fdcceb4bb45p-3;
  p = p * z + 0x1.7462b91b8df65p-3;
  p = p * z + 0x1.c71c62d5e53e0p-3;
  p = p * z + 0x1.2492492dfd86cp-2;
  p = p * z + 0x1.9999999995273p-2;
  p = p * z + 0x1.5555555555558p-1;
  f64v y = n * 0x1.62e42fee00000p-1 - ((half - (s * (half + z * p) + n * 0x1.a39ef35793c76p-33)) - f);
  y = a.v > 0. ? y
               : f64v{} - (a.v == 0. ? Vec<double>::set1(__builtin_inf()).v : Vec<double>::set1(__builtin_nan("")).v);
  return {a.v == __builtin_inf() ? a.v : y};
}

// One number: the vector's first lane, so that a value does not depend on how it was reached.
template <class A>
FASTNN_INLINE A exp(A x) {
  return exp(Vec<A>::set1(x)).v[0];
}
template <class A>
FASTNN_INLINE A log(A x) {
  return log(Vec<A>::set1(x)).v[0];
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
