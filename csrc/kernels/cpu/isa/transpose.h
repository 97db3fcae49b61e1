// Transposing blocks of N x N elements between [channel][pixel]
// and [pixel][channel], converting 16-bit types on the way.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
// 16x16 in registers: three rounds of interleaving, 64 shuffles.
FASTNN_INLINE void transpose_registers(__m512 r[16]) {
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
#elif defined(__AVX2__)
// 8x8 in registers: three rounds, 24 shuffles.
FASTNN_INLINE void transpose_registers(__m256 r[8]) {
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

// to[pixel][lane] = from[lane * lane_stride + pixel * pixel_stride], `lanes` by `pixels`, other lanes zero. Pixels past
// the last are written too (all N rows of `to` must exist).
template <class S, class A>
FASTNN_INLINE void transpose_block(const S* from, int64_t lane_stride, int64_t pixel_stride, int lanes, int pixels,
                                   A* to) {
  constexpr int N = Vec<A>::N;
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float))
    if (pixel_stride == 1) {
      __m512 r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = i < lanes ? Vec<A>::load_n(from + i * lane_stride, pixels).v : _mm512_setzero_ps();
      transpose_registers(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * 16, r[i]);
      return;
    }
#elif defined(__AVX2__)
  if constexpr (__is_same(S, float))
    if (pixel_stride == 1) {
      __m256 r[8];
      const __m256i mask = first_lanes(pixels);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        r[i] = i < lanes ? _mm256_maskload_ps(from + i * lane_stride, mask) : _mm256_setzero_ps();
      transpose_registers(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * 8, r[i]);
      return;
    }
#endif
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < N; ++l)
      to[i * N + l] = i < pixels && l < lanes ? to_acc(from[l * lane_stride + i * pixel_stride]) : A(0);
}

// to[lane * lane_stride + pixel * pixel_stride] = from[pixel][lane], `lanes` by `pixels`; nothing else is written.
template <class S, class A>
FASTNN_INLINE void untranspose_block(const A* from, S* to, int64_t lane_stride, int64_t pixel_stride, int lanes,
                                     int pixels) {
  constexpr int N = Vec<A>::N;
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float))
    if (pixel_stride == 1) {
      __m512 r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * 16);
      transpose_registers(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < lanes) Vec<A>{r[i]}.store_n(to + i * lane_stride, pixels);
      return;
    }
  if constexpr (__is_same(S, float))
    if (pixel_stride == 2) {
      __m512 r[16];
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
#elif defined(__AVX2__)
  if constexpr (__is_same(S, float))
    if (pixel_stride == 1) {
      __m256 r[8];
      const __m256i mask = first_lanes(pixels);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * 8);
      transpose_registers(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        if (i < lanes) _mm256_maskstore_ps(to + i * lane_stride, mask, r[i]);
      return;
    }
#endif
  for (int i = 0; i < pixels; ++i)
    for (int l = 0; l < lanes && l < N; ++l) to[l * lane_stride + i * pixel_stride] = from_acc<S>(from[i * N + l]);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
