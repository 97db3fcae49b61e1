// Products with one to four rows or a k of one to four and a B that runs along n (both gradients at batch 1): rows of B
// or of C streamed whole.
#pragma once
#include "gemm_store.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

constexpr int64_t kAxpyMaxM = 4;
constexpr int kAxpyRows = 4;          // rows of B per pass over the sums
constexpr int64_t kAxpySums = 4096;   // sums kept on the stack, in L1

// sums[i][0, n) += a[i, 0..R) * b[0..R, n) for i < M.
template <class S, int M, int R, class A = acc_t<S>>
void axpy_rows(const S* a, int64_t a_m, int64_t a_k, const S* b, int64_t ldb, int64_t n, A* sums, int64_t ld) {
  using V = Vec<A>;
  V x[M][R];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[i][r] = V::set1(to_acc(a[i * a_m + r * a_k]));
  for (int64_t j = 0; j < n; j += V::N) {
    V y[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) y[r] = load_lanes(b + r * ldb + j, n - j);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      V c = V::load(sums + i * ld + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c = fma(x[i][r], y[r], c);
      c.store(sums + i * ld + j);
    }
  }
}

// m <= kAxpyMaxM; b: k rows ldb apart.
template <class S, int M>
FASTNN_INLINE void gemm_axpy_rows(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_m, int64_t a_k, const S* b,
                                  int64_t ldb, const GemmStore<S>& store) {
  if (m != M) {
    if constexpr (M > 1) gemm_axpy_rows<S, M - 1>(m, n, k, a, a_m, a_k, b, ldb, store);
    return;
  }
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t threads = max64(1, min64(num_threads(), n * k * M / kGemmThreadFma));
  const int64_t chunk = min64(kAxpySums / M / 64 * 64, round_up(ceil_div(n, threads), 64));
  parallel_for(0, ceil_div(n, chunk), ceil_div(ceil_div(n, chunk), threads), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t n0 = g * chunk, nb = min64(chunk, n - n0);
      A sums[kAxpySums];
      for (int i = 0; i < M; ++i)
        for (int64_t j = 0; j < nb; j += V::N) V::zero().store(sums + i * chunk + j);
      int64_t p = 0;
      for (; p + kAxpyRows <= k; p += kAxpyRows)
        axpy_rows<S, M, kAxpyRows>(a + p * a_k, a_m, a_k, b + p * ldb + n0, ldb, nb, sums, chunk);
      for (; p < k; ++p) axpy_rows<S, M, 1>(a + p * a_k, a_m, a_k, b + p * ldb + n0, ldb, nb, sums, chunk);
      for (int i = 0; i < M; ++i)
        for (int64_t j = 0; j < nb; j += V::N) {
          GemmTile<A, 1, 1> t;
          t.v[0][0] = V::load(sums + i * chunk + j);
          store.tile(t, i, 1, n0 + j, int(min64(V::N, nb - j)), true, true);
        }
    }
  });
}

template <class S>
void gemm_axpy(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_m, int64_t a_k, const S* b, int64_t ldb,
               const GemmStore<S>& store) {
  gemm_axpy_rows<S, int(kAxpyMaxM)>(m, n, k, a, a_m, a_k, b, ldb, store);
}

// k of one or two: sums of outer products, C written row by row.
template <class S>
void gemm_outer(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_m, int64_t a_k, const S* b, int64_t ldb,
                const GemmStore<S>& store) {
  using A = acc_t<S>;
  using V = Vec<A>;
  parallel_for(0, m, max64(1, (1 << 16) / max64(1, n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      V x[kAxpyMaxM];
      for (int64_t p = 0; p < k; ++p) x[p] = V::set1(to_acc(a[i * a_m + p * a_k]));
      int64_t j0 = 0;
      if (k == 1 && store.plain()) {  // the weight gradient at batch 1 is all stores
        S* const c = store.c + i * store.c_m;
        for (; j0 + V::N <= n; j0 += V::N) (x[0] * V::load(b + j0)).store(c + j0);
      }
      for (int64_t j = j0; j < n; j += 2 * V::N) {
        GemmTile<A, 1, 2> t;
        const bool wide = j + V::N < n;
        t.v[0][0] = x[0] * load_lanes(b + j, n - j);
        t.v[0][1] = wide ? x[0] * load_lanes(b + j + V::N, n - j - V::N) : V::zero();
        for (int64_t p = 1; p < k; ++p) {
          const S* row = b + p * ldb + j;
          t.v[0][0] = fma(x[p], load_lanes(row, n - j), t.v[0][0]);
          if (wide) t.v[0][1] = fma(x[p], load_lanes(row + V::N, n - j - V::N), t.v[0][1]);
        }
        store.tile(t, i, 1, j, int(min64(2 * V::N, n - j)), true, true);
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
