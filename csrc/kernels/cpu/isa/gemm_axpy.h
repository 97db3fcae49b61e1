// Products with one to four rows and a B that runs along n, or with a short k (both gradients at batch 1): rows
// of B or of C streamed whole.
#pragma once
#include "gemm_store.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

constexpr int64_t kAxpyMaxM = 4;
constexpr int kAxpyRows = 4;         // rows of B per pass over the sums
constexpr int64_t kAxpySums = 4096;  // sums kept on the stack, in L1

// sums[i][0, n) += a[i, 0..R) * b[0..R, n) for i < M. `far`: b is not in L2, and the next R rows are fetched there: out
// of memory 1x1024->1024 x1.3 of the speed, 4x1000->512 x1.7.
template <class S, int M, int R, class A = acc_t<S>>
void axpy_rows(const S* a, int64_t a_m, int64_t a_k, const S* b, int64_t ldb, int64_t n, A* sums, int64_t ld,
               bool far) {
  using V = Vec<A>;
  V x[M][R];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[i][r] = V::set1(to_acc(a[i * a_m + r * a_k]));
  for (int64_t j = 0; j < n; j += V::N) {
    V y[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      y[r] = load_lanes(b + r * ldb + j, n - j);
      if (far) __builtin_prefetch(b + (r + R) * ldb + j, 0, 2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      V c = V::load(sums + i * ld + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c = fma(x[i][r], y[r], c);
      c.store(sums + i * ld + j);
    }
  }
}

// The same for all of k and n <= NV vectors, whose sums stay in registers.
template <class S, int M, int NV, class A = acc_t<S>>
void axpy_columns(int64_t k, const S* a, int64_t a_m, int64_t a_k, const S* b, int64_t ldb, int64_t n, A* sums,
                  int64_t ld) {
  using V = Vec<A>;
  constexpr int U = M * NV < 4 ? 4 / (M * NV) : 1;  // chains of sums enough to hide the latency of one
  V c[U][M][NV];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) c[u][i][j] = V::zero();
  const auto step = [&](int64_t p, int u) __attribute__((always_inline)) {
    V y[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) y[j] = load_lanes(b + p * ldb + j * V::N, n - j * V::N);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const V x = V::set1(to_acc(a[i * a_m + p * a_k]));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) c[u][i][j] = fma(x, y[j], c[u][i][j]);
    }
  };
  int64_t p = 0;
  for (; p + U <= k; p += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) step(p + u, u);
  for (; p < k; ++p) step(p, 0);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) c[0][i][j] = c[0][i][j] + c[u][i][j];
      c[0][i][j].store(sums + i * ld + j * V::N);
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
  const bool far = n * k * int64_t(sizeof(S)) >= 512 << 10;
  const int64_t threads = max64(1, min64(num_threads(), n * k * M / kGemmThreadFma));
  const int64_t chunk = min64(kAxpySums / M / 64 * 64, round_up(ceil_div(n, threads), 64));
  parallel_for(0, ceil_div(n, chunk), ceil_div(ceil_div(n, chunk), threads), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t n0 = g * chunk, nb = min64(chunk, n - n0);
      A sums[kAxpySums];
      if (nb <= V::N) {
        axpy_columns<S, M, 1>(k, a, a_m, a_k, b + n0, ldb, nb, sums, chunk);
      } else if (nb <= 2 * V::N) {
        axpy_columns<S, M, 2>(k, a, a_m, a_k, b + n0, ldb, nb, sums, chunk);
      } else {
        for (int i = 0; i < M; ++i)
          for (int64_t j = 0; j < nb; j += V::N) V::zero().store(sums + i * chunk + j);
        int64_t p = 0;
        for (; p + kAxpyRows <= k; p += kAxpyRows)
          axpy_rows<S, M, kAxpyRows>(a + p * a_k, a_m, a_k, b + p * ldb + n0, ldb, nb, sums, chunk, far);
        for (; p < k; ++p) axpy_rows<S, M, 1>(a + p * a_k, a_m, a_k, b + p * ldb + n0, ldb, nb, sums, chunk, far);
      }
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

// ---- few terms -----------------------------------------------------------------------------------------------------

// Terms, at most: for an n of one or two vectors, for few rows, for many.
constexpr int64_t kOuterMaxK = 8, kOuterMaxKFew = 4, kOuterMaxKWide = 2;
constexpr int64_t kOuterColumns = 1024;  // columns at a time: a b that does not run along n is copied to the stack

// R rows from i on and columns [n0, n0 + n) of a sum of K outer
// products. NV > 0: n <= NV vectors of b, kept in registers.
template <class S, int K, int R, int NV>
FASTNN_INLINE void outer_rows(int64_t i, int64_t n0, int64_t n, const S* a, int64_t a_m, int64_t a_k, const S* b,
                              int64_t ldb, const Vec<acc_t<S>> (*kept)[NV > 0 ? NV : 1], const GemmStore<S>& store,
                              bool plain, bool biased) {
  using V = Vec<acc_t<S>>;
  V x[R][K];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < K; ++p) x[r][p] = V::set1(to_acc(a[(i + r) * a_m + p * a_k]));
  const auto sum = [&](int64_t j, int lanes, auto load) __attribute__((always_inline)) {
    V y[K], bias = biased ? load(store.d + n0 + j) : V::zero();
#pragma GCC unroll 8
    for (int p = 0; p < K; ++p) {
      if constexpr (NV > 0) y[p] = kept[p][j / V::N];
      else y[p] = load(b + p * ldb + j);
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      V v = V::zero();  // not x * y: with one term the compiler would merge that with a bias, but not for every R
#pragma GCC unroll 8
      for (int p = 0; p < K; ++p) v = fma(x[r][p], y[p], v);
      if (plain) {
        S* const to = store.c + (i + r) * store.c_m + n0 + j;
        if (store.streams && lanes == V::N) stream(v, to);
        else store.store(biased ? v + bias : v, to, lanes);
      } else {
        GemmTile<acc_t<S>, 1, 1> t;
        t.v[0][0] = v;
        store.tile(t, i + r, 1, n0 + j, lanes, true, true);
      }
    }
  };
  const auto whole = [](const S* p) __attribute__((always_inline)) { return V::load(p); };
  const auto part = [&](const S* p) __attribute__((always_inline)) { return V::load_n(p, n % V::N); };
  if constexpr (NV > 0) {  // known columns: what is kept stays in registers
    constexpr int kLast = (NV - 1) * V::N;
    if constexpr (NV > 1) sum(0, V::N, whole);
    if (n == NV * V::N) sum(kLast, V::N, whole);
    else sum(kLast, int(n - kLast), part);
  } else {
    int64_t j = 0;
    for (; j + V::N <= n; j += V::N) sum(j, V::N, whole);
    if (j < n) sum(j, int(n - j), part);
  }
}

// Rows [begin, end) of the same columns, R at a time.
template <class S, int K, int NV, int R>
void outer_block(int64_t begin, int64_t end, int64_t n0, int64_t n, const S* a, int64_t a_m, int64_t a_k, const S* b,
                 int64_t ldb, const GemmStore<S>& store) {
  using V = Vec<acc_t<S>>;
  const bool biased = store.has_row_bias(), plain = biased || store.plain();
  V kept[K][NV > 0 ? NV : 1];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j)
#pragma GCC unroll 8
    for (int p = 0; p < K; ++p) kept[p][j] = load_lanes(b + p * ldb + j * V::N, n - j * V::N);
  int64_t i = begin;
  for (; i + R <= end; i += R) outer_rows<S, K, R, NV>(i, n0, n, a, a_m, a_k, b, ldb, kept, store, plain, biased);
  for (; i < end; ++i) outer_rows<S, K, 1, NV>(i, n0, n, a, a_m, a_k, b, ldb, kept, store, plain, biased);
}

template <class S, int K>
void outer_columns(int64_t begin, int64_t end, int64_t n0, int64_t n, int64_t k, const S* a, int64_t a_m, int64_t a_k,
                   const S* b, int64_t ldb, const GemmStore<S>& store) {
  constexpr int N = Vec<acc_t<S>>::N;
  if constexpr (K > 1) {
    if (k < K) return outer_columns<S, K - 1>(begin, end, n0, n, k, a, a_m, a_k, b, ldb, store);
  }
  if (n <= N) return outer_block<S, K, 1, 1>(begin, end, n0, n, a, a_m, a_k, b, ldb, store);
  if (n <= 2 * N) return outer_block<S, K, 2, 1>(begin, end, n0, n, a, a_m, a_k, b, ldb, store);
  // What is not kept is loaded once for two rows. One term is all stores: those of one row at a time take 0.7-0.85 of
  // the time where a vector is less than a cache line (1000x2048: 235 -> 173 us), else where C comes from memory
  // (1024x1024 313 -> 195 us, but 98 -> 133 where L3 has it).
  if constexpr (K == 1) {
    if (kVecBytes < 64 || (end - begin) * n >= 1 << 19)
      return outer_block<S, K, 0, 1>(begin, end, n0, n, a, a_m, a_k, b, ldb, store);
  }
  if constexpr (K <= kOuterMaxKFew) outer_block<S, K, 0, 2>(begin, end, n0, n, a, a_m, a_k, b, ldb, store);
}

// Whether so few terms are best summed row by row of C.
template <class S>
bool takes_outer(int64_t m, int64_t n, int64_t k) {
  if (m <= kAxpyMaxM) return k > 0 && k <= kOuterMaxKFew;
  return k > 0 && k <= (n <= 2 * Vec<acc_t<S>>::N ? kOuterMaxK : kOuterMaxKWide);
}

// A sum of outer products, C written row by row; takes_outer(m, n, k).
template <class S>
void gemm_outer(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_m, int64_t a_k, const S* b, int64_t b_k,
                int64_t b_n, const GemmStore<S>& store) {
  const auto columns = outer_columns<S, kOuterMaxK>;
  parallel_for(0, m, max64(1, (1 << 16) / max64(1, n)), [&](int64_t begin, int64_t end) {
    if (b_n == 1) {
      columns(begin, end, 0, n, k, a, a_m, a_k, b, b_k, store);
      return store.end();
    }
    // Up to kOuterMaxKFew rows of kOuterColumns, or the kOuterMaxK rows of at most two vectors that need less.
    S block[kOuterMaxKFew * kOuterColumns];
    const int64_t step = min64(round_up(n, Vec<acc_t<S>>::N), kOuterColumns);
    for (int64_t n0 = 0; n0 < n; n0 += kOuterColumns) {
      const int64_t nb = min64(kOuterColumns, n - n0);
      for (int64_t p = 0; p < k; ++p)
        for (int64_t j = 0; j < nb; ++j) block[p * step + j] = b[p * b_k + (n0 + j) * b_n];
      columns(begin, end, n0, nb, k, a, a_m, a_k, block, step, store);
    }
    store.end();
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
