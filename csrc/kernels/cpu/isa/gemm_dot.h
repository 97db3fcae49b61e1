// Products of few rows whose operands both run along k (a linear layer at a small batch): dot products, nothing packed.
#pragma once
#include "gemm_store.h"
#include "lanes.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
constexpr int kDotRows = 6;  // 6 x 4 sums, 4 vectors of B, 1-2 of A
constexpr int64_t kDotNarrowN = 24;
#elif defined(__AVX2__)
constexpr int kDotRows = 3;  // 3 x 4 sums, 3 vectors of A, 1 of B; two rows are 8 sums and wait for each other
constexpr int64_t kDotNarrowN = 12;
#else
constexpr int kDotRows = 2;  // a product needs a register too
constexpr int64_t kDotNarrowN = 12;
#endif
constexpr int64_t kDotMaxM = 64;
constexpr int kDotGroup = 16;    // columns per task
constexpr int64_t kDotK = 1024;  // four rows of b this long leave room in L1 for the rows of a that pass
// From rows this long on tiles are 3 x 8 rather than 6 x 4: half as many rows of a per product pass through L1, which
// is the limit then (48x1024->1024: 570 -> 460 us; rows of 512 floats: no gain).
constexpr int64_t kDotWideBytes = 3072;

// Sums over the lanes of four vectors, added to out[0..3].
template <class A>
FASTNN_INLINE void reduce_four(Vec<A> x0, Vec<A> x1, Vec<A> x2, Vec<A> x3, A* out) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) {
    const __m512 a = (__m512)x0.v, b = (__m512)x1.v, c = (__m512)x2.v, d = (__m512)x3.v;
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 s =
        (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    const __m256 h = _mm512_castps512_ps256(s) + (__m256)_mm512_extractf64x4_pd((__m512d)s, 1);
    _mm_storeu_ps(out, _mm_loadu_ps(out) + (_mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1)));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(A, float)) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(x0.v, x1.v), _mm256_hadd_ps(x2.v, x3.v));
    _mm_storeu_ps(out, _mm_loadu_ps(out) + (_mm256_castps256_ps128(s) + _mm256_extractf128_ps(s, 1)));
    return;
  }
#endif
  out[0] += reduce_add(x0), out[1] += reduce_add(x1), out[2] += reduce_add(x2), out[3] += reduce_add(x3);
}

// MR rows of a times NC rows of b, added to sums[i * kDotGroup + j].
template <class S, int MR, int NC, class A = acc_t<S>>
void dot_tile(int64_t k, const S* a, int64_t lda, const S* b, int64_t ldb, A* sums) {
  using V = Vec<A>;
  V c[MR][NC];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NC; ++j) c[i][j] = V::zero();
  const auto step = [&](int64_t p, auto load) __attribute__((always_inline)) {
    if constexpr (NC == 8 || kDotRows == 3) {
      V x[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) x[i] = load(a + i * lda + p);
#pragma GCC unroll 8
      for (int j = 0; j < NC; ++j) {
        V y = load(b + j * ldb + p);
        if constexpr (MR > 1) y.v = in_register(y.v);  // read again by every fma, loads would be the limit
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) c[i][j] = fma(x[i], y, c[i][j]);
      }
    } else {
      V y[NC];
#pragma GCC unroll 8
      for (int j = 0; j < NC; ++j) y[j] = load(b + j * ldb + p);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const V x = load(a + i * lda + p);
#pragma GCC unroll 8
        for (int j = 0; j < NC; ++j) c[i][j] = fma(x, y[j], c[i][j]);
      }
    }
  };
  int64_t p = 0;
  for (; p + V::N <= k; p += V::N) step(p, [](const S* at) __attribute__((always_inline)) { return V::load(at); });
  if (p < k) step(p, [&](const S* at) __attribute__((always_inline)) { return V::load_n(at, k - p); });
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    if constexpr (NC == 1) {
      sums[i * kDotGroup] += reduce_add(c[i][0]);
    } else {
#pragma GCC unroll 2
      for (int j = 0; j < NC; j += 4)
        reduce_four<A>(c[i][j], c[i][j + 1], c[i][j + 2], c[i][j + 3], sums + i * kDotGroup + j);
    }
  }
}

template <class S>
using DotTile = void (*)(int64_t k, const S* a, int64_t lda, const S* b, int64_t ldb, acc_t<S>* sums);

// The tile of `mr` <= MR rows and `nc` columns: 1, 4 or, of few rows, 8.
template <class S, int MR = kDotRows>
FASTNN_INLINE DotTile<S> dot_tile_of(int mr, int nc) {
  if constexpr (MR > 1) {
    if (mr < MR) return dot_tile_of<S, MR - 1>(mr, nc);
  }
  if constexpr (MR == 1 || MR * 8 <= kDotRows * 4) {
    if (nc == 8) return dot_tile<S, MR, 8>;
  }
  return nc == 4 ? dot_tile<S, MR, 4> : dot_tile<S, MR, 1>;
}

// a: m rows lda apart, b: n rows ldb apart, all of k contiguous elements. m <= kDotMaxM.
template <class S>
void gemm_dot(int64_t m, int64_t n, int64_t k, const S* a, int64_t lda, const S* b, int64_t ldb,
              const GemmStore<S>& store) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const bool wide = kDotRows == 6 && m > 2 * kDotRows && k * int64_t(sizeof(S)) >= kDotWideBytes;
  const int mr = int(ceil_div(m, ceil_div(m, wide ? kDotRows / 2 : kDotRows)));
  const int64_t whole = (m - ceil_div(m, mr) * (mr - 1)) * mr;  // rows of full tiles; the others have one row less
  const int64_t max_kc = wide ? kDotK * 4 / int64_t(sizeof(S)) : kDotK;
  const int64_t kc = m <= mr ? k : round_up(ceil_div(k, ceil_div(k, max_kc)), V::N);
  const int64_t grain = max64(1, kGemmThreadFma / max64(1, m * k * kDotGroup));
  parallel_for(0, ceil_div(n, kDotGroup), grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      A sums[kDotMaxM * kDotGroup];
      for (int64_t i = 0; i < m * kDotGroup; ++i) sums[i] = 0;
      const int64_t n0 = g * kDotGroup;
      const int nb = int(min64(kDotGroup, n - n0));
      for (int j = 0; j < nb;) {  // the rows of b stay in L1 while all of a passes
        const int nc = (m == 1 || wide) && nb - j >= 8 ? 8 : nb - j >= 4 ? 4 : 1;
        const DotTile<S> tile = dot_tile_of<S>(mr, nc), less = dot_tile_of<S>(mr - 1, nc);
        for (int64_t k0 = 0; k0 < k; k0 += kc) {
          const int64_t kb = min64(kc, k - k0);
          const S* const rows = b + (n0 + j) * ldb + k0;
          int64_t i = 0;
          for (; i < whole; i += mr) tile(kb, a + i * lda + k0, lda, rows, ldb, sums + i * kDotGroup + j);
          for (; i < m; i += mr - 1) less(kb, a + i * lda + k0, lda, rows, ldb, sums + i * kDotGroup + j);
        }
        j += nc;
      }
      for (int64_t i = 0; i < m; ++i)
        for (int j = 0; j < nb; j += V::N) {
          GemmTile<A, 1, 1> t;
          t.v[0][0] = V::load(sums + i * kDotGroup + j);
          store.tile(t, i, 1, n0 + j, int(min64(V::N, nb - j)), true, true);
        }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
