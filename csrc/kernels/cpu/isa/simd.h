// One vector type per ISA: Vec<float> and Vec<double>, with loads and stores that convert bf16 and f16 on the way.
// Arithmetic is the compiler's vector extension; intrinsics appear only where the extension has no word for it.
#pragma once
#include "../../common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A member function that must be inlined: vectors passed in registers, never through memory.
#define FASTNN_VEC_FN inline __attribute__((always_inline))

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

using f32v = float __attribute__((vector_size(kVecBytes)));
using f64v = double __attribute__((vector_size(kVecBytes)));
using i32v = int32_t __attribute__((vector_size(kVecBytes)));
using i64v = int64_t __attribute__((vector_size(kVecBytes)));

// ---- scalar conversions --------------------------------------------------------------------------------------------

FASTNN_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
FASTNN_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

FASTNN_INLINE float to_acc(float x) { return x; }
FASTNN_INLINE double to_acc(double x) { return x; }
FASTNN_INLINE float to_acc(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
FASTNN_INLINE float to_acc(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  // Shifted into place the exponent is 112 too small; the multiplication mends it, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
FASTNN_INLINE T from_acc(acc_t<T> x) {
  if constexpr (sizeof(T) > 2) {
    return x;
  } else if constexpr (__is_same(T, bf16)) {
    const uint32_t b = bits_of(x);
    if (x != x) return bf16{uint16_t(b >> 16 | 0x40)};
    return bf16{uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16)};  // round to nearest even
  } else {
#if defined(__F16C__)
    return f16{_cvtss_sh(x, 0)};
#else
    const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000u;
    const float a = float_of(b & 0x7fffffffu);
    if (!(a < 65520.f)) return f16{uint16_t(sign | (a != a ? 0x7e00u : 0x7c00u))};
    if (a < 0x1p-14f)  // subnormal: adding 0.5 rounds at bit 2^-24
      return f16{uint16_t(sign | (bits_of(a + 0.5f) - 0x3f000000u))};
    const uint32_t m = bits_of(a) - (112u << 23);
    return f16{uint16_t(sign | ((m + 0xfffu + (m >> 13 & 1)) >> 13))};
#endif
  }
}

// ---- vectors -------------------------------------------------------------------------------------------------------

template <class A>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Raw = f32v;
  using Int = i32v;
};
template <>
struct VecTraits<double> {
  using Raw = f64v;
  using Int = i64v;
};

#if defined(__AVX512F__)
// The upper words of all lanes, for a permutation where a shift and a narrowing are three instructions.
struct Words {
  alignas(64) uint16_t at[32];
};
constexpr Words kUpperWords = [] {
  Words w{};
  for (int i = 0; i < 32; ++i) w.at[i] = uint16_t((2 * i + 1) % 32);
  return w;
}();
#endif

// N lanes of A (float or double). Raw is a compiler vector: + - * / and comparisons (which give Int masks of 0 / -1)
// are written on `.v`, select as `mask ? a : b`.
template <class A>
struct Vec {
  using Raw = typename VecTraits<A>::Raw;
  using Int = typename VecTraits<A>::Int;
  static constexpr int N = kVecBytes / sizeof(A);
  Raw v;

  static FASTNN_VEC_FN Vec zero() { return {Raw{}}; }
  static FASTNN_VEC_FN Vec set1(A x) { return {x - Raw{}}; }
  static FASTNN_VEC_FN Vec load(const A* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, kVecBytes);
    return r;
  }
  FASTNN_VEC_FN void store(A* p) const { __builtin_memcpy(p, &v, kVecBytes); }
  // The lower half of the lanes from lo, the upper half from hi.
  static FASTNN_VEC_FN Vec load_halves(const A* lo, const A* hi) {
#if defined(__AVX512F__)
    return {(Raw)_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd((const double*)lo)),
                                    _mm256_loadu_pd((const double*)hi), 1)};
#elif defined(__AVX2__)
    return {(Raw)_mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd((const double*)lo)),
                                      _mm_loadu_pd((const double*)hi), 1)};
#else
    Vec r;
    __builtin_memcpy(&r.v, lo, kVecBytes / 2);
    __builtin_memcpy((char*)&r.v + kVecBytes / 2, hi, kVecBytes / 2);
    return r;
#endif
  }

  static FASTNN_VEC_FN Vec load(const bf16* p) {
#if defined(__AVX512F__)
    return {(Raw)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)};
#elif defined(__AVX2__)
    return {(Raw)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)};
#else
    return from_scalars(p, N, A(0));
#endif
  }
  static FASTNN_VEC_FN Vec load(const f16* p) {
#if defined(__AVX512F__)
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
#elif defined(__AVX2__)
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
#else
    return from_scalars(p, N, A(0));
#endif
  }
  FASTNN_VEC_FN void store(bf16* p) const {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, words(p));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, words(p));
#else
    to_scalars(p, N);
#endif
  }
  FASTNN_VEC_FN void store(f16* p) const {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, words(p));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, words(p));
#else
    to_scalars(p, N);
#endif
  }

  // The first n lanes (0 <= n < N) from memory, the others `fill`. Never touches memory past p[n - 1].
  template <class S>
  static FASTNN_VEC_FN Vec load_n(const S* p, int64_t n, A fill = A(0)) {
#if defined(__AVX512F__)
    const __mmask16 mask = __mmask16((1u << n) - 1);
    if constexpr (__is_same(S, float)) {
      return {_mm512_mask_loadu_ps(set1(fill).v, mask, p)};
    } else if constexpr (__is_same(S, double)) {
      return {_mm512_mask_loadu_pd(set1(fill).v, __mmask8(mask), p)};
    } else if constexpr (__is_same(S, bf16)) {
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
      return {(Raw)_mm512_mask_slli_epi32((__m512i)set1(fill).v, mask, bits, 16)};
    } else {
      return {_mm512_mask_cvtph_ps(set1(fill).v, mask, _mm256_maskz_loadu_epi16(mask, p))};
    }
#else
    return from_scalars(p, n, fill);
#endif
  }
  template <class S>
  FASTNN_VEC_FN void store_n(S* p, int64_t n) const {
#if defined(__AVX512F__)
    const __mmask16 mask = __mmask16((1u << n) - 1);
    if constexpr (__is_same(S, float)) _mm512_mask_storeu_ps(p, mask, v);
    else if constexpr (__is_same(S, double)) _mm512_mask_storeu_pd(p, __mmask8(mask), v);
    else _mm256_mask_storeu_epi16(p, mask, words(p));
#else
    to_scalars(p, n);
#endif
  }

 private:
  // The lanes rounded to the type pointed to.
#if defined(__AVX512F__)
  FASTNN_VEC_FN __m256i words(const f16*) const { return _mm512_cvtps_ph(v, 0); }
  // To nearest even in integers: vcvtneps2bf16 flushes subnormals, which torch does not.
  FASTNN_VEC_FN __m256i words(const bf16*) const {
    const Int b = (Int)v, up = b + 0x7fff;
    const __mmask16 odd = _mm512_test_epi32_mask((__m512i)b, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_mask_add_epi32((__m512i)up, odd, (__m512i)up, _mm512_set1_epi32(1));
    const __m512i out =
        _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), (__m512i)b, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpperWords.at), out));
  }
#elif defined(__AVX2__)
  FASTNN_VEC_FN __m128i words(const f16*) const { return _mm256_cvtps_ph(v, 0); }
  FASTNN_VEC_FN __m128i words(const bf16*) const {
    const Int b = (Int)v, up = b + 0x7fff;
    const Int out = (v == v ? up + ((b >> 16) & 1) : b | 0x400000) >> 16;
    const __m256i w = _mm256_and_si256((__m256i)out, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  }
#endif
  template <class S>
  static FASTNN_VEC_FN Vec from_scalars(const S* p, int64_t n, A fill) {
    A lanes[N];
    for (int i = 0; i < N; ++i) lanes[i] = i < n ? to_acc(p[i]) : fill;
    return load(lanes);
  }
  template <class S>
  FASTNN_VEC_FN void to_scalars(S* p, int64_t n) const {
    A lanes[N];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = from_acc<S>(lanes[i]);
  }
};

template <class A>
FASTNN_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return {a.v + b.v};
}
template <class A>
FASTNN_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return {a.v - b.v};
}
template <class A>
FASTNN_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return {a.v * b.v};
}
template <class A>
FASTNN_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) {
  return {a.v / b.v};
}

// a * b + c: one rounding where the ISA has FMA (-ffp-contract=fast), two in the baseline.
template <class A>
FASTNN_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return {a.v * b.v + c.v};
}

// The larger lane; when either is NaN the result is b's lane (vmaxps), so max(x, running) forgets a NaN and
// max(running, x) keeps the newest x: propagate NaN with a check of its own where that matters.
template <class A>
FASTNN_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) return {_mm512_max_ps(a.v, b.v)};
  else return {_mm512_max_pd(a.v, b.v)};
#elif defined(__AVX2__)
  if constexpr (__is_same(A, float)) return {_mm256_max_ps(a.v, b.v)};
  else return {_mm256_max_pd(a.v, b.v)};
#else
  return {a.v > b.v ? a.v : b.v};
#endif
}
template <class A>
FASTNN_INLINE Vec<A> min(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) return {_mm512_min_ps(a.v, b.v)};
  else return {_mm512_min_pd(a.v, b.v)};
#elif defined(__AVX2__)
  if constexpr (__is_same(A, float)) return {_mm256_min_ps(a.v, b.v)};
  else return {_mm256_min_pd(a.v, b.v)};
#else
  return {a.v < b.v ? a.v : b.v};
#endif
}

template <class A>
FASTNN_INLINE Vec<A> sqrt(Vec<A> a) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) return {_mm512_sqrt_ps(a.v)};
  else return {_mm512_sqrt_pd(a.v)};
#elif defined(__AVX2__)
  if constexpr (__is_same(A, float)) return {_mm256_sqrt_ps(a.v)};
  else return {_mm256_sqrt_pd(a.v)};
#else
  for (int i = 0; i < Vec<A>::N; ++i) a.v[i] = A(__builtin_sqrt(a.v[i]));  // through double: still rounded right
  return a;
#endif
}

template <class A>
FASTNN_INLINE A reduce_add(Vec<A> a) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) return _mm512_reduce_add_ps(a.v);
  else return _mm512_reduce_add_pd(a.v);
#else
  A lanes[Vec<A>::N];
  a.store(lanes);
  for (int step = Vec<A>::N / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}
template <class A>
FASTNN_INLINE A reduce_max(Vec<A> a) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) return _mm512_reduce_max_ps(a.v);
  else return _mm512_reduce_max_pd(a.v);
#else
  A lanes[Vec<A>::N];
  a.store(lanes);
  for (int step = Vec<A>::N / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
#endif
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
