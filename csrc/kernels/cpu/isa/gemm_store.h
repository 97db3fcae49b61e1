// The store policy of plain matrix products: C = act(alpha * sum + beta * D), 16-bit types rounded once at the end.
#pragma once
#include "gemm_core.h"
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

template <class S>
struct GemmStore {
  using A = acc_t<S>;
  using V = Vec<A>;
  static constexpr bool kAccumulates = sizeof(S) == sizeof(A);

  S* c;
  int64_t c_m, c_n;  // strides
  const S* d;        // null: no second term
  int64_t d_m, d_n;
  A alpha, beta;
  bool relu;
  bool streams = false;  // whole tiles past the caches: streams_lines(), and no sum is added to

  void end() const { end_streams(streams); }

  // Nothing is scaled, added or clipped, and rows of C are dense.
  bool plain() const { return c_n == 1 && alpha == A(1) && !d && !relu; }

  // The same, with one row added to all rows of C (a layer's bias).
  bool has_row_bias() const { return c_n == 1 && alpha == A(1) && d && d_m == 0 && d_n == 1 && beta == A(1) && !relu; }

  // Vectors of a tile are whole lines, to be written past the caches.
  bool streams_lines() const {
    return __is_same(S, float) && kVecBytes >= 32 && plain() && c_m % 16 == 0 && uintptr_t(c) % 64 == 0;
  }

  static FASTNN_VEC_FN V load(const S* p, int lanes) { return lanes == V::N ? V::load(p) : V::load_n(p, lanes); }
  static FASTNN_VEC_FN void store(V v, S* p, int lanes) {
    if (lanes == V::N) v.store(p);
    else v.store_n(p, lanes);
  }

  // A tile to be written; of a strided C it is the first elements of its rows, for nothing but a few fetches. 1024^3 95
  // -> 102 GFLOP/s, 1000^3 94 -> 101.
  template <int NV>
  FASTNN_VEC_FN void prefetch(int64_t m0, int mb, int64_t n0, bool) const {
    if (!streams) fetch_rows<NV>(c + m0 * c_m + n0 * c_n, c_m, mb);
  }

  template <int MR, int NV>
  FASTNN_VEC_FN void tile(const GemmTile<A, MR, NV>& t, int64_t m0, int mb, int64_t n0, int nb, bool first,
                          bool last) const {
    S* const at = c + m0 * c_m + n0 * c_n;
    if (c_n == 1 && alpha == A(1) && !(relu && last)) {
      const bool whole = nb == NV * V::N;
      if (!first) {
        if (whole)
          for_whole_tile(t, mb, at, c_m,
                         [](V v, S* to, int, int) __attribute__((always_inline)) { (V::load(to) + v).store(to); });
        else
          for_tile(t, mb, nb, [&](V v, int i, int j, int lanes) {
            S* const to = at + i * c_m + j;
            store(load(to, lanes) + v, to, lanes);
          });
        return;
      }
      if (!d) {
        if (whole && streams)
          for_whole_tile(t, mb, at, c_m, [](V v, S* to, int, int) __attribute__((always_inline)) { stream(v, to); });
        else if (whole)
          for_whole_tile(t, mb, at, c_m, [](V v, S* to, int, int) __attribute__((always_inline)) { v.store(to); });
        else for_tile(t, mb, nb, [&](V v, int i, int j, int lanes) { store(v, at + i * c_m + j, lanes); });
        return;
      }
      if (d_n == 1 && beta == A(1)) {
        const S* const from = d + m0 * d_m + n0;
        if (whole)
          for_whole_tile(t, mb, at, c_m, [&](V v, S* to, int i, int j) __attribute__((always_inline)) {
            (v + V::load(from + i * d_m + j)).store(to);
          });
        else
          for_tile(t, mb, nb, [&](V v, int i, int j, int lanes) {
            store(v + load(from + i * d_m + j, lanes), at + i * c_m + j, lanes);
          });
        return;
      }
    }
    general(t, at, m0, mb, n0, nb, first, last);
  }

  // Any factors, by vectors where rows of C are dense; any strides, a row at a time through memory.
  template <int MR, int NV>
  __attribute__((noinline)) void general(GemmTile<A, MR, NV> t, S* at, int64_t m0, int mb, int64_t n0, int nb,
                                         bool first, bool last) const {
    if (c_n == 1 && (!d || d_n == 0 || d_n == 1)) {
      for_tile(t, mb, nb, [&](V v, int i, int j, int lanes) __attribute__((always_inline)) {
        S* const to = at + i * c_m + j;
        V x = V::set1(alpha) * v;
        if (!first) {
          x = x + load(to, lanes);
        } else if (d) {
          const S* const from = d + (m0 + i) * d_m + (n0 + j) * d_n;
          x = fma(V::set1(beta), d_n == 1 ? load(from, lanes) : V::set1(to_acc(*from)), x);
        }
        if (relu && last) x = max(V::zero(), x);  // NaN stays
        store(x, to, lanes);
      });
      return;
    }
    for (int i = 0; i < mb; ++i) {
      A row[NV * V::N];
      for (int j = 0; j < NV; ++j) t.v[i][j].store(row + j * V::N);
      for (int j = 0; j < nb; ++j) {
        S& out = at[i * c_m + j * c_n];
        A x = alpha * row[j];
        if (!first) x += to_acc(out);
        else if (d) x += beta * to_acc(d[(m0 + i) * d_m + (n0 + j) * d_n]);
        if (relu && last) x = x < A(0) ? A(0) : x;  // NaN stays
        out = from_acc<S>(x);
      }
    }
  }
};

// C = act(sum + D) of a C whose columns are dense: tiles are transposed in registers.
template <class S>
struct ColumnStore {
  using V = Vec<S>;
  static constexpr bool kAccumulates = true;

  S* c;
  int64_t c_n;  // from column to column
  const S* d;   // null, or dense columns too
  int64_t d_n;
  bool relu;

  template <int MR, int NV>
  FASTNN_VEC_FN void tile(const GemmTile<S, MR, NV>& t, int64_t m0, int mb, int64_t n0, int nb, bool first,
                          bool last) const {
    S* const to = c + m0 + n0 * c_n;
    const S* const from = d && first ? d + m0 + n0 * d_n : nullptr;
#pragma GCC unroll 4
    for (int g = 0; g < MR; g += V::N) {
      const int lanes = int(min64(V::N, mb - g));
      if (lanes <= 0) break;
#pragma GCC unroll 2
      for (int j = 0; j < NV * V::N; j += V::N) {
        V r[V::N];
#pragma GCC unroll 16
        for (int i = 0; i < V::N; ++i) r[i] = g + i < MR ? t.v[g + i < MR ? g + i : 0][j / V::N] : V::zero();
        transpose_square<S>(r);
#pragma GCC unroll 16
        for (int i = 0; i < V::N; ++i) {
          if (j + i >= nb) break;
          S* const at = to + g + (j + i) * c_n;
          V x = r[i];
          if (!first) x = x + V::load_n(at, lanes);
          else if (from) x = x + V::load_n(from + g + (j + i) * d_n, lanes);
          if (relu && last) x = max(V::zero(), x);  // NaN stays
          x.store_n(at, lanes);
        }
      }
    }
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
