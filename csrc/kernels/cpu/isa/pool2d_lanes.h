// Lanes for pooling: the comparison that keeps the first maximum and the last NaN, and window taps in vectors of bytes.
#pragma once
#include "lanes.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Calls f(offset, lanes) for each vector along [0, count): lanes == N but for the tail.
template <int N, class F>
FASTNN_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + N <= count; i += N) f(i, N);
  if (i < count) f(i, int(count - i));
}
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_some(const S* p, int lanes) {
  return lanes == Vec<A>::N ? Vec<A>::load(p) : Vec<A>::load_n(p, lanes);
}
template <class S, class A>
FASTNN_INLINE void store_some(Vec<A> v, S* p, int lanes) {
  if (lanes == Vec<A>::N) v.store(p);
  else v.store_n(p, lanes);
}

// torch's rule for a new maximum: larger than the best so far, or NaN.
template <class A>
FASTNN_INLINE typename Vec<A>::Int beats(Vec<A> v, Vec<A> best) {
  return (v.v > best.v) | (v.v != v.v);
}

// One vector of window taps as stored: uint8 or int32.
template <class A, class O>
struct TapVector {
  typedef O type __attribute__((vector_size(sizeof(O) * Vec<A>::N)));
};
template <class A, class O>
using TapBytes = typename TapVector<A, O>::type;
template <class A>
struct IntLane;
template <>
struct IntLane<float> {
  using type = int32_t;
};
template <>
struct IntLane<double> {
  using type = int64_t;
};

template <class A, class O>
FASTNN_INLINE TapBytes<A, O> load_taps_raw(const O* p, int lanes) {
  TapBytes<A, O> raw{};
  if (lanes == Vec<A>::N) {
    __builtin_memcpy(&raw, p, sizeof(raw));
    return raw;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(raw) == 16) return (TapBytes<A, O>)_mm_maskz_loadu_epi8(__mmask16((1u << lanes) - 1), p);
#endif
  for (int i = 0; i < lanes; ++i) raw[i] = p[i];
  return raw;
}
template <class A, class O>
FASTNN_INLINE typename Vec<A>::Int load_taps(const O* p, int lanes) {
  const TapBytes<A, O> raw = load_taps_raw<A, O>(p, lanes);
#if defined(__AVX2__)  // gcc 12 converts these element by element
  __m128i low{};
  if constexpr (sizeof(raw) <= 16) __builtin_memcpy(&low, &raw, sizeof(raw));
#if defined(__AVX512F__)
  if constexpr (sizeof(O) == 1 && Vec<A>::N == 16) return (typename Vec<A>::Int)_mm512_cvtepu8_epi32(low);
  if constexpr (sizeof(O) == 1 && Vec<A>::N == 8) return (typename Vec<A>::Int)_mm512_cvtepu8_epi64(low);
#else
  if constexpr (sizeof(O) == 1 && Vec<A>::N == 8) return (typename Vec<A>::Int)_mm256_cvtepu8_epi32(low);
  if constexpr (sizeof(O) == 1 && Vec<A>::N == 4) return (typename Vec<A>::Int)_mm256_cvtepu8_epi64(low);
#endif
#endif
  return __builtin_convertvector(raw, typename Vec<A>::Int);
}

// sum + (tap == code ? v : 0): a NaN in v stays in its lane.
template <class A>
FASTNN_INLINE Vec<A> add_where(Vec<A> sum, typename Vec<A>::Int taps, int64_t code, Vec<A> v) {
  using Raw = typename Vec<A>::Raw;
  using Lane = typename IntLane<A>::type;
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float))
    return {
        _mm512_mask_add_ps(sum.v, _mm512_cmpeq_epi32_mask((__m512i)taps, _mm512_set1_epi32(int(code))), sum.v, v.v)};
#endif
  return {sum.v + (taps == Lane(code) ? v.v : Raw{})};
}

template <class A, class O>
FASTNN_INLINE void store_taps(typename Vec<A>::Int taps, O* p, int lanes) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // gcc 12 converts these element by element, too
  if constexpr (sizeof(O) == 1 && Vec<A>::N == 8) {
    if (lanes == 8) {
      const __m256i all = (__m256i)taps;
      const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      return _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
    }
  }
#endif
  const auto raw = __builtin_convertvector(taps, TapBytes<A, O>);
  if (lanes == Vec<A>::N) {
    __builtin_memcpy(p, &raw, sizeof(raw));
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(raw) == 16) return _mm_mask_storeu_epi8(p, __mmask16((1u << lanes) - 1), (__m128i)raw);
#endif
  for (int i = 0; i < lanes; ++i) p[i] = raw[i];
}

// sum + (tap == code ? g : 0) on the taps' bytes.
template <class A>
FASTNN_INLINE Vec<A> add_where_bytes(Vec<A> sum, const uint8_t* taps, int64_t code, Vec<A> g) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) {
    const __mmask16 hit = _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i*)taps), _mm_set1_epi8(char(code)));
    return {_mm512_mask_add_ps(sum.v, hit, sum.v, g.v)};
  }
#endif
  return add_where(sum, load_taps<A>(taps, Vec<A>::N), code, g);
}

// tap == code ? v : 0.
template <class A>
FASTNN_INLINE Vec<A> only_where(typename Vec<A>::Int taps, int64_t code, Vec<A> v) {
  using Lane = typename IntLane<A>::type;
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float))
    return {_mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask((__m512i)taps, _mm512_set1_epi32(int(code))), v.v)};
#endif
  return {taps == Lane(code) ? v.v : typename Vec<A>::Raw{}};
}

// The window tap each lane's best value came from.
template <class A>
struct Taps {
  using Int = typename Vec<A>::Int;
  using Lane = typename IntLane<A>::type;
  Int taps;

  Taps() = default;
  FASTNN_VEC_FN explicit Taps(int64_t tap) : taps(Lane(tap) - Int{}) {}
  FASTNN_VEC_FN void update(Vec<A>& best, Vec<A> v, int64_t tap) {
#if defined(__AVX512F__)  // gcc 12 would carry the masks through vectors
    if constexpr (__is_same(A, float)) {
      const __mmask16 take = _mm512_cmp_ps_mask(v.v, best.v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
      best.v = _mm512_mask_mov_ps(best.v, take, v.v);
      taps = (Int)_mm512_mask_set1_epi32((__m512i)taps, take, int(tap));
      return;
    }
#endif
    const Int take = beats(v, best);
    best.v = take ? v.v : best.v;
    taps = take ? Lane(tap) - Int{} : taps;
  }
  template <class O>
  FASTNN_VEC_FN void store(O* p, int lanes) const {
    store_taps<A>(taps, p, lanes);
  }
};

// ---- NaN ------------------------------------------------------------------------------------------------------------

// Whether any lane of any vector so far was NaN: maxima are taken without minding NaN and mended where one was seen.
template <class A>
struct NanWatch {
#if defined(__AVX512F__)
  unsigned seen = 0;
  FASTNN_VEC_FN void see(Vec<A> a, Vec<A> b) {
    if constexpr (__is_same(A, float)) seen |= _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q);
    else seen |= _mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q);
  }
  FASTNN_VEC_FN bool any() const { return seen != 0; }
#elif defined(__AVX2__)
  typename Vec<A>::Raw seen{};
  FASTNN_VEC_FN void see(Vec<A> a, Vec<A> b) {
    if constexpr (__is_same(A, float)) seen = _mm256_or_ps(seen, _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q));
    else seen = _mm256_or_pd(seen, _mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q));
  }
  FASTNN_VEC_FN bool any() const {
    if constexpr (__is_same(A, float)) return _mm256_movemask_ps(seen) != 0;
    else return _mm256_movemask_pd(seen) != 0;
  }
#else
  typename Vec<A>::Int seen{};
  FASTNN_VEC_FN void see(Vec<A> a, Vec<A> b) { seen |= (a.v != a.v) | (b.v != b.v); }
  FASTNN_VEC_FN bool any() const {
    for (int i = 0; i < Vec<A>::N; ++i)
      if (seen[i]) return true;
    return false;
  }
#endif
};

// ---- means ----------------------------------------------------------------------------------------------------------

// Division by one number: exact, and a multiplication where that is exact too.
template <class A>
struct Divide {
  A divisor, inverse;
  bool power_of_two;
  FASTNN_VEC_FN explicit Divide(int64_t n)
      : divisor(A(n)), inverse(A(1) / A(n)), power_of_two(n > 0 && (n & (n - 1)) == 0) {}
  FASTNN_VEC_FN Vec<A> operator()(Vec<A> v) const {
    return power_of_two ? v * Vec<A>::set1(inverse) : v / Vec<A>::set1(divisor);
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
