// Transposing blocks of N x N elements between [channel][pixel]
// and [pixel][channel], converting 16-bit types on the way.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
// 16x16 in registers: three rounds of interleaving, 64 shuffles.
FASTNN_INLINE void transpose_registers(f32v r[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    r[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
// 8x8.
FASTNN_INLINE void transpose_registers(f64v r[8]) {
  __m512d t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      r[i + k] = _mm512_shuffle_f64x2(t[i + k], t[i + k + 2], 0x88);
      r[i + k + 2] = _mm512_shuffle_f64x2(t[i + k], t[i + k + 2], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#elif defined(__AVX2__)
// 8x8 in registers: three rounds, 24 shuffles.
FASTNN_INLINE void transpose_registers(f32v r[8]) {
  __m256 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
FASTNN_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Whether N vectors of A are transposed in registers, and their first n <= N lanes.
#if defined(__AVX512F__)
template <class A>
constexpr bool kInRegisters = true;
#elif defined(__AVX2__)
template <class A>
constexpr bool kInRegisters = __is_same(A, float);
#else
template <class A>
constexpr bool kInRegisters = false;
#endif
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_lanes_below(const S* p, int n) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (__is_same(S, float)) return {_mm256_maskload_ps(p, first_lanes(n))};
  if (n == Vec<A>::N) return Vec<A>::load(p);
#endif
  return Vec<A>::load_n(p, n);
}
template <class S, class A>
FASTNN_INLINE void store_lanes_below(Vec<A> v, S* p, int n) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (__is_same(S, float)) return _mm256_maskstore_ps(p, first_lanes(n), v.v);
  if (n == Vec<A>::N) return v.store(p);
#endif
  v.store_n(p, n);
}

// to[pixel][lane] = from[lane * lane_stride + pixel * pixel_stride], `lanes` by `pixels`, other lanes zero. Pixels past
// the last are written too (all N rows of `to` must exist).
template <class S, class A>
FASTNN_INLINE void transpose_block(const S* from, int64_t lane_stride, int64_t pixel_stride, int lanes, int pixels,
                                   A* to) {
  using V = Vec<A>;
  constexpr int N = V::N;
  if constexpr (kInRegisters<A>)
    if (pixel_stride == 1) {
      typename V::Raw r[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) r[i] = i < lanes ? load_lanes_below(from + i * lane_stride, pixels).v : V::zero().v;
      transpose_registers(r);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) V{r[i]}.store(to + i * N);
      return;
    }
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < N; ++l)
      to[i * N + l] = i < pixels && l < lanes ? to_acc(from[l * lane_stride + i * pixel_stride]) : A(0);
}

// to[lane * lane_stride + pixel * pixel_stride] = from[pixel][lane], `lanes` by `pixels`; nothing else is written.
template <class S, class A>
FASTNN_INLINE void untranspose_block(const A* from, S* to, int64_t lane_stride, int64_t pixel_stride, int lanes,
                                     int pixels) {
  using V = Vec<A>;
  constexpr int N = V::N;
  if constexpr (kInRegisters<A>)
    if (pixel_stride == 1) {
      typename V::Raw r[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) r[i] = V::load(from + i * N).v;
      transpose_registers(r);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
        if (i < lanes) store_lanes_below(V{r[i]}, to + i * lane_stride, pixels);
      return;
    }
#if defined(__AVX512F__)
  if constexpr (__is_same(S, float))
    if (pixel_stride == 2) {
      f32v r[16];
      const uint32_t mask = 0x55555555u & (uint32_t)((uint64_t(1) << 2 * pixels) - 1);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * 16);
      transpose_registers(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < lanes) {
          _mm512_mask_storeu_ps(to + i * lane_stride, __mmask16(mask), _mm512_maskz_expand_ps(0x5555, r[i]));
          _mm512_mask_storeu_ps(to + i * lane_stride + 16, __mmask16(mask >> 16),
                                _mm512_maskz_expand_ps(0x5555, _mm512_shuffle_f32x4(r[i], r[i], 0x0e)));
        }
      return;
    }
#endif
  for (int i = 0; i < pixels; ++i)
    for (int l = 0; l < lanes && l < N; ++l) to[l * lane_stride + i * pixel_stride] = from_acc<S>(from[i * N + l]);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
