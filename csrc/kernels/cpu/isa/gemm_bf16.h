// bfloat16 products by vdpbf16ps where the CPU has it: a "column" of the packed panels is a pair of neighbours in k, 32
// bits wide, so the driver works as for float32 with half the k.
#pragma once
#include "gemm_core.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)

FASTNN_INLINE bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16"); }

// A packed block of pairs.
struct Bf16Pairs {
  const float* p;
};
FASTNN_INLINE Bf16Pairs next_rows(Bf16Pairs a, int64_t mr, int64_t kb) { return {a.p + mr * kb}; }

// sum + a b over each lane's pair. By name, because the rest of this ISA must run on CPUs without the instruction.
FASTNN_INLINE __m512 dot_bf16(__m512 sum, __m512 a, __m512 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

template <class A, int MR, int NV>
FASTNN_INLINE void gemm_micro(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, Bf16Pairs a, const A* b,
                              int64_t ldb) {
  using V = Vec<A>;
  const float* row = a.p;
  gemm_sums(tile, k, sum_k, [&](GemmTile<A, MR, NV>& c, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < n; ++p) {
      __m512 x[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) x[j] = _mm512_loadu_ps(b + j * 16);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const __m512 y = _mm512_set1_ps(row[i]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) c.v[i][j].v = (typename V::Raw)dot_bf16((__m512)c.v[i][j].v, x[j], y);
      }
      row += MR;
      b += ldb;
    }
  });
}

// Rows of pairs that begin anywhere, 16 at a time: loaded as they lie and transposed. Written as by gemm_pack_panel.
inline void pack_rows_of_pairs(float* dst, int width, const bf16* src, int64_t lane_stride, int lanes, int64_t pairs) {
  using V = Vec<float>;
  for (int l = 0; l < width; l += V::N) {
    const int64_t room = l == 0 ? V::N : min64(V::N, width - l);
    for (int64_t p = 0; p < pairs; p += V::N) {
      const int64_t count = min64(V::N, pairs - p);
      V r[V::N];
#pragma GCC unroll 16
      for (int i = 0; i < V::N; ++i)
        r[i] = l + i < lanes ? load_lanes(reinterpret_cast<const float*>(src + (l + i) * lane_stride + 2 * p), count)
                             : V::zero();
      transpose_square<float>(r);
      float* const to = dst + p * width + l;
#pragma GCC unroll 16
      for (int i = 0; i < V::N; ++i)
        if (i < count) r[i].store_n(to + i * width, room < width ? room : width);
    }
  }
}

// dst[p * width + l] = the pair (src[l * lane_stride + 2 p * k_stride], the next in k) for l < lanes, zeros elsewhere;
// the second of the last pair is zero where `k` elements are odd. May write up to one vector past the panel.
inline void pack_bf16_pairs(float* dst, int width, const bf16* src, int64_t lane_stride, int64_t k_stride, int lanes,
                            int64_t k) {
  const int64_t whole = k / 2;
  if (k_stride == 1 && lane_stride % 2 == 0) {  // pairs lie side by side already
    gemm_pack_panel<float>(dst, width, reinterpret_cast<const float*>(src), lane_stride / 2, 1, lanes, whole);
  } else if (k_stride == 1) {
    pack_rows_of_pairs(dst, width, src, lane_stride, lanes, whole);
  } else if (lane_stride == 1) {  // two rows interleaved
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (int64_t p = 0; p < whole; ++p)
      for (int l = 0; l < width; l += 16) {
        const int n = lanes - l < 0 ? 0 : lanes - l < 16 ? lanes - l : 16;
        const __mmask16 mask = __mmask16((1u << n) - 1);
        const bf16* at = src + 2 * p * k_stride + l;
        const __m256i one = _mm256_maskz_loadu_epi16(mask, at), two = _mm256_maskz_loadu_epi16(mask, at + k_stride);
        const __m512i pairs = _mm512_permutex2var_epi16(_mm512_castsi256_si512(one), low, _mm512_castsi256_si512(two));
        // In ascending order: what a narrow panel's vector writes too far is overwritten by the next row.
        _mm512_storeu_si512(dst + p * width + l, pairs);
      }
  } else {
    uint32_t* to = reinterpret_cast<uint32_t*>(dst);
    for (int64_t p = 0; p < whole; ++p)
      for (int l = 0; l < width; ++l) {
        const bf16* at = src + l * lane_stride + 2 * p * k_stride;
        const uint32_t pair = l < lanes ? uint32_t(at[0].bits) | uint32_t(at[k_stride].bits) << 16 : 0;
        __builtin_memcpy(to + p * width + l, &pair, 4);
      }
  }
  if (k % 2)
    for (int l = 0; l < width; ++l) {
      const uint32_t pair = l < lanes ? src[l * lane_stride + (k - 1) * k_stride].bits : 0;
      __builtin_memcpy(dst + whole * width + l, &pair, 4);
    }
}

#else

FASTNN_INLINE bool has_bf16_products() { return false; }

#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
