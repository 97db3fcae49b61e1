// The blocked GEMM driver: C[M, N] = sum over k of A[m, k] * B[k, n], with packers and the store given as policies.
//
// How to use it, for example from an implicit-GEMM convolution:
//
//   GemmPlan plan = gemm_plan<A>(M, N, K, num_threads(), Store::kAccumulates);
//   workspace of plan.workspace_bytes bytes, 64-byte aligned (the ops layer asks through a *_workspace entry point)
//   gemm_blocked<A>(plan, workspace, pack_a, pack_b, store);
//
//   A        accumulator type: float or double; packers convert bf16 and f16 on the way.
//   pack_a(A* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb)
//            writes dst[p * mr + i] = A[m0 + i, k0 + p] for i < mb, zero for mb <= i < mr. May write up to N elements
//            (one vector) past dst[kb * mr].
//            It may return a type of its own, made from {address of the packed block}: its overloads of gemm_micro()
//            and next_rows() then compute the tiles (gemm_bf16.h). Or it takes (m0, k0) alone and returns the GemmRows
//            or GemmLanes of A to be read in place, where packing costs more than it saves (few columns). A pack_a that
//            is a class may have a whole(dst, mr, m0, m1, k0, kb) that packs all rows [m0, m1), panel after panel, and
//            returns true, or returns false to be asked panel by panel.
//   pack_b(A* dst, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) -> GemmPanel<A>
//            either writes dst[p * nr + j] = B[k0 + p, n0 + j] in the same way and returns {dst, nr}, or returns
//            {address of B[k0, n0], row stride} when B can be read in place: rows of at least nr readable elements. A
//            GemmFreshPanel is fetched, and packed to dst, by the tile that reads it first.
//   store.tile(tile, m0, mb, n0, nb, first, last)
//            adds a tile of the product to C: `first` and `last` tell whether it is the first and the last K chunk.
//            Store::kAccumulates says that it can add to C between chunks; if not, the driver sums the chunks in the
//            workspace and calls the store once with first = last = true. for_tile() walks over a tile's vectors.
//   store.prefetch<NV>(m0, mb, n0, first), if it has one, is called before a tile is computed: see fetch_rows().
//   store.end(), if it has one, is called by every thread after its last tile.
//   gemm_pack_panel() (gemm_pack.h) packs any strided matrix and GemmStore writes any strided one.
//
// The bits do not depend on the number of threads: threads share out M and N; K is cut into chunks by plan.kc,
// these into sums by plan.sum_k, and a deep and small problem into plan.splits partial sums, all functions of M, N, K
// and panel_bytes alone.
#pragma once
#include "../../parallel.h"
#include "gemm_pack.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

template <class A, int MR, int NV>
struct GemmTile {
  Vec<A> v[MR][NV];
};

template <class A>
struct GemmPanel {
  const A* p;
  int64_t ld;
};

// A panel of 2 N lanes that the first tile to read it fetches row by row: `fresh`. With `copy` it packs it there, too.
template <class A>
struct GemmFreshPanel : GemmPanel<A> {
  A* copy = nullptr;
  bool fresh = false;
};
template <class A>
GemmPanel<A> packed_panel(GemmPanel<A> b) {
  return b;
}
template <class A>
GemmPanel<A> packed_panel(GemmFreshPanel<A> b) {
  return b.copy ? GemmPanel<A>{b.copy, 2 * Vec<A>::N} : GemmPanel<A>{b};
}

// Rows of A where they lie: element (i, p) at p[i * ld + p].
template <class A>
struct GemmRows {
  const A* p;
  int64_t ld;
};

// The same with lanes side by side: element (i, p) at p[p * ld + i].
template <class A>
struct GemmLanes {
  const A* p;
  int64_t ld;
};

// tile = the sum of k products, by run(c, n): c += the next n products. Of more than sum_k: a sum of sums.
template <class A, int MR, int NV, class Run>
FASTNN_INLINE void gemm_sums(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, const Run& run) {
  GemmTile<A, MR, NV> c, before;
  for (int64_t left = k;; left -= sum_k) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) c.v[i][j] = Vec<A>::zero();
    run(c, min64(left, sum_k));
    if (left < k) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) c.v[i][j] = before.v[i][j] + c.v[i][j];
    }
    if (left <= sum_k) break;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) before.v[i][j] = c.v[i][j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) tile.v[i][j] = c.v[i][j];
}

// c += MR lanes, lane(i), times NV vectors of b.
template <class A, int MR, int NV, class Lane>
FASTNN_INLINE void add_products(GemmTile<A, MR, NV>& c, const A* b, const Lane& lane) {
  using V = Vec<A>;
  V x[NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) x[j] = V::load(b + j * V::N);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const V y = V::set1(lane(i));
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) c.v[i][j] = fma(y, x[j], c.v[i][j]);
  }
}

// MR lanes of a times NV vectors of b, over k.
template <class A, int MR, int NV>
FASTNN_INLINE void gemm_micro(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, GemmLanes<A> lanes, const A* b,
                              int64_t ldb) {
  const A* a = lanes.p;
  gemm_sums(tile, k, sum_k, [&](GemmTile<A, MR, NV>& c, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < n; ++p) {
      add_products(c, b, [&](int i) __attribute__((always_inline)) { return a[i]; });
      a += lanes.ld;
      b += ldb;
    }
  });
}
template <class A, int MR, int NV>
FASTNN_INLINE void gemm_micro(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, const A* a, const A* b,
                              int64_t ldb) {
  gemm_micro<A, MR, NV>(tile, k, sum_k, GemmLanes<A>{a, MR}, b, ldb);
}

// The same with a fresh panel of B: its rows are fetched ahead and arrive while others are multiplied, where packing
// them first, or reading them in place, waits for memory. Into L2: rows a multiple of 4 KB apart share a set of L1. All
// lines of a row, of which one more than lanes fill may hold a part. The gradient of the input of 32x2048->1000 62-78
// -> 96 GFLOP/s, 64x1024->1024 90 -> 103, 28x1000->4096 34 -> 98.
template <class A, int MR, int NV, bool COPIES>
FASTNN_INLINE void gemm_micro_fresh(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, const A* a,
                                    GemmFreshPanel<A> b) {
  using V = Vec<A>;
  constexpr int64_t kAhead = 32, kWidth = NV * V::N, kLine = 64 / sizeof(A);
  const A *from = b.p, *const next = b.p + kWidth;  // the panel to its right
  A* to = b.copy;
  int64_t left = k - kAhead;  // rows of this panel to be fetched
  const A* ahead = left > 0 ? from + kAhead * b.ld : next;
  gemm_sums(tile, k, sum_k, [&](GemmTile<A, MR, NV>& c, int64_t n) __attribute__((always_inline)) {
    for (int64_t p = 0; p < n; ++p) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < kWidth; j += kLine) __builtin_prefetch(ahead + j, 0, 2);
      __builtin_prefetch(ahead + kWidth - 1, 0, 2);
      ahead += b.ld;
      if (--left == 0) ahead = next;
      if constexpr (COPIES) {
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) V::load(from + j * V::N).store(to + j * V::N);
        to += kWidth;
      }
      add_products(c, from, [&](int i) __attribute__((always_inline)) { return a[i]; });
      a += MR;
      from += b.ld;
    }
  });
}

// The same with rows of A read in place. Addresses are a pointer per three rows plus
// 0, 1 or 2 times ld, which x86 has for free; 14 pointers would not fit its registers.
// With every product a line of the rows below is fetched: short rows, MR at a time, are no pattern that the hardware
// follows out of the caches (two threads, NHWC: 8x256x56x56->64 144 -> 199 GFLOP/s, 64x784->512 the same as before).
template <class A, int MR, int NV>
FASTNN_INLINE void gemm_micro(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, GemmRows<A> a, const A* b,
                              int64_t ldb) {
  constexpr int kGroups = (MR + 2) / 3;
  constexpr int64_t kLine = 64 / sizeof(A);
  const A* at[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) at[g] = a.p + 3 * g * a.ld;
  const int64_t ld = a.ld, lines = ceil_div(k, kLine), down = ld - lines * kLine;
  const A* below = a.p + MR * ld;
  int64_t line = lines;
  gemm_sums(tile, k, sum_k, [&](GemmTile<A, MR, NV>& c, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < n; ++p) {
      if constexpr (MR >= 4) {
        __builtin_prefetch(below, 0, 2);
        below += kLine;
        if (--line == 0) below += down, line = lines;
      }
      add_products(c, b, [&](int i) __attribute__((always_inline)) { return at[i / 3][i % 3 * ld]; });
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) ++at[g];
      b += ldb;
    }
  });
}

// f(vector, row, column, lanes) over the part of the tile that exists: mb rows by nb columns.
template <class A, int MR, int NV, class F>
FASTNN_INLINE void for_tile(const GemmTile<A, MR, NV>& tile, int mb, int nb, const F& f) {
  constexpr int N = Vec<A>::N;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    if (i >= mb) break;
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j)
      if (nb > j * N) f(tile.v[i][j], i, j * N, nb - j * N < N ? nb - j * N : N);
  }
}

// f(vector, address, row, column) over the mb rows of a tile that has all its columns, `step` elements apart from
// `to` on. What to do with a vector is better asked once a tile: asked at every vector it costs as much as a K of 16.
template <class A, int MR, int NV, class S, class F>
FASTNN_INLINE void for_whole_tile(const GemmTile<A, MR, NV>& tile, int mb, S* to, int64_t step, const F& f) {
  constexpr int N = Vec<A>::N;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i, to += step) {
    if (i >= mb) break;
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) f(tile.v[i][j], to + j * N, i, j * N);
  }
}

// ---- the plan ------------------------------------------------------------------------------------------------------

struct GemmPlan {
  int64_t m, n, k;
  int mr;           // rows of a register tile, 1..kGemmMaxMr: the one that wastes least on m
  int64_t tm, tn;   // rows and columns of a task
  int64_t step_n;   // columns from task to task: the last of a row takes half a panel more, if n leaves one
  int64_t mc;       // rows of A packed at a time; if fewer than tm, panels of B are packed for the first and kept
  int64_t sum_k;    // products of a sum: K is a sum of sums
  int64_t kc;       // K of one chunk, a multiple of sum_k or all of K
  int64_t splits;   // partial sums a deep and small problem is cut into
  int64_t split_k;  // K of one split (a multiple of kc)
  int64_t workers;
  int64_t a_elements, b_elements, c_elements;  // workspace of one worker
  int64_t workspace_bytes;
  int64_t n_blocks() const { return max64(1, n / step_n + (n % step_n > tn - step_n)); }
};

constexpr int64_t kGemmL1Bytes = 36 << 10;  // a panel of B, most of a 48 KB L1
// A panel of B that is read from L2, as fast as it is wanted: C is read and written less often, which is worth it where
// its tiles are transposed (64x784->512 x1.07; 1024^3 x1.00, and x0.77 on two threads).
constexpr int64_t kGemmL2Bytes = 128 << 10;
constexpr int64_t kGemmSum = 192;               // its sums are cut, or they would round more than torch's
constexpr int64_t kGemmBlockBytes = 544 << 10;  // a block of A, half of a 1 MB L2: 1024 rows of 256 are two
constexpr int64_t kGemmKeptBytes = 4 << 20;     // panels of B kept for the next block of A, by all workers
constexpr int64_t kGemmThreadFma = 1 << 18;     // below this a thread costs more than it brings

// Elements from which on a result written once goes past the caches, which it leaves anyway.
constexpr int64_t kStreamedResult = 3 << 20;

// Rows of a register tile at most where A is read in place, its rows `step` elements apart: at multiples of 2 KB they
// share sets of L1, which have 8 ways (64x1024->1024 by columns 54-76 -> 103-110 GFLOP/s, 32x512->1000 106 -> 111).
template <class A>
constexpr int gemm_rows_in_place(int64_t step) {
  return step * int64_t(sizeof(A)) % 2048 == 0 && kGemmMaxMr > 8 ? 8 : kGemmMaxMr;
}

// `accumulates`: the store's kAccumulates. `max_rows`: rows of a task at most. `beside`: plans that run at a time.
// `panel_bytes`: a panel of B, kGemmL1Bytes or, for a B of few columns, kGemmL2Bytes. `max_mr`: rows of a register
// tile.
template <class A>
inline GemmPlan gemm_plan(int64_t m, int64_t n, int64_t k, int threads, bool accumulates, int64_t max_rows = 1 << 30,
                          int64_t beside = 1, int64_t panel_bytes = kGemmL1Bytes, int max_mr = kGemmMaxMr) {
  constexpr int64_t N = Vec<A>::N, kNr = 2 * N;
  GemmPlan p{};
  p.m = m, p.n = n, p.k = k;
  const bool few_columns = panel_bytes == kGemmL2Bytes;
  p.workers = max64(1, min64(min64(threads, 48), m * n / 64 * k / (kGemmThreadFma / 64)));
  int64_t panels = max64(1, ceil_div(m, max_mr));
  if (few_columns) panels = round_up(panels, p.workers);
  p.mr = int(max64(1, ceil_div(m, panels)));

  const int64_t max_kc = panel_bytes / int64_t(kNr * sizeof(A));
  const int64_t max_sum = few_columns ? min64(kGemmSum, max_kc) : max_kc;
  const int64_t chunk = max64(1, ceil_div(k, max64(1, ceil_div(k, max_kc)))), sums = ceil_div(chunk, max_sum);
  p.sum_k = ceil_div(chunk, sums);
  p.kc = p.sum_k * sums;
  p.splits = 1, p.split_k = max64(k, 1);
  if (m * n <= 128 * 128 && k >= 8 * max_sum) {  // few outputs, long sums
    p.splits = min64(16, k / (4 * max_sum));
    p.split_k = round_up(ceil_div(k, p.splits), p.sum_k);
    p.splits = ceil_div(k, p.split_k);
    p.kc = min64(p.kc, p.split_k);
  }
  const int64_t n_panels = max64(1, ceil_div(n, kNr));
  int64_t max_mc = max64(1, kGemmBlockBytes / int64_t(p.kc * sizeof(A)) / p.mr) * p.mr;
  max_mc = min64(max_mc, ceil_div(max_rows, p.mr) * p.mr);
  const bool buffered = p.splits == 1 && !accumulates && k > p.kc;
  if (buffered) max_mc = min64(max_mc, max64(1, 224 / p.mr) * p.mr);
  int64_t m_blocks = max64(1, ceil_div(m, max_mc)), n_blocks = 1;
  if (p.workers > 1 && m_blocks * p.splits % p.workers) {
    if (n >= m && !few_columns) n_blocks = min64(n_panels, p.workers);
    else m_blocks = min64(panels, round_up(m_blocks, p.workers));
  }
  p.mc = p.tm = ceil_div(ceil_div(max64(m, 1), m_blocks), p.mr) * p.mr;
  m_blocks = ceil_div(m, p.mc);
  const int64_t together = n_blocks > 1 ? m_blocks : ceil_div(m_blocks, p.workers);  // blocks of A of a worker
  const int64_t kept = kGemmKeptBytes / (beside * p.workers * p.kc * kNr * int64_t(sizeof(A)));  // panels
  if (buffered) {
    n_blocks = max64(n_blocks, ceil_div(n, 512));
  } else if (few_columns && p.splits == 1 && kept >= n_panels) {  // the same number of tiles for every worker
    const int64_t tiles = ceil_div(ceil_div(m, p.mr), p.workers);
    p.tm = tiles * p.mr;
    p.mc = ceil_div(tiles, ceil_div(p.tm, max_mc)) * p.mr;
  } else if (together > 1 && p.splits == 1 && kept >= min64(8, n_panels)) {
    n_blocks = ceil_div(n_panels, min64(kept, ceil_div(n_panels, n_blocks)));
    p.tm *= together;
  }
  const int64_t half = n > kNr && n % kNr <= N ? n % kNr : 0, whole = max64(1, ceil_div(n - half, kNr));
  p.step_n = ceil_div(whole, min64(n_blocks, whole)) * kNr;
  p.tn = p.step_n + (half ? kNr : 0);
  p.workers = max64(1, min64(p.workers, ceil_div(m, p.tm) * p.n_blocks() * p.splits));

  constexpr int64_t kLine = 64 / sizeof(A);
  p.a_elements = round_up(min64(p.mc, round_up(m, p.mr)) * p.kc + N, kLine);
  p.b_elements = round_up(kNr * p.kc + N, kLine);
  if (p.tm > p.mc)
    p.b_elements = round_up(p.tn * p.kc + N + p.tn / kNr * int64_t(sizeof(GemmPanel<A>) / sizeof(A)), kLine);
  p.c_elements = buffered ? round_up(p.tm * p.tn, kLine) : 0;
  const int64_t partial = p.splits > 1 ? p.splits * m * round_up(n, N) : 0;
  p.workspace_bytes = ((p.a_elements + p.b_elements + p.c_elements) * p.workers + partial) * int64_t(sizeof(A));
  return p;
}

// ---- the driver ----------------------------------------------------------------------------------------------------

// Writes or adds tiles to a dense buffer of A's.
template <class A>
struct GemmBuffer {
  A* c;
  int64_t ld;
  int64_t m_origin, n_origin;
  template <int MR, int NV>
  FASTNN_VEC_FN void tile(const GemmTile<A, MR, NV>& t, int64_t m0, int mb, int64_t n0, int nb, bool first,
                          bool) const {
    A* at = c + (m0 - m_origin) * ld + n0 - n_origin;
    for_tile(t, mb, nb, [&](Vec<A> v, int i, int j, int) {  // whole vectors: ld is a multiple of one
      A* to = at + i * ld + j;
      if (!first) v = v + Vec<A>::load(to);
      v.store(to);
    });
  }
};

template <class A>
FASTNN_INLINE const A* next_rows(const A* a, int64_t mr, int64_t kb) {
  return a + mr * kb;
}
template <class A>
FASTNN_INLINE GemmRows<A> next_rows(GemmRows<A> a, int64_t mr, int64_t) {
  return {a.p + mr * a.ld, a.ld};
}
template <class A>
FASTNN_INLINE GemmLanes<A> next_rows(GemmLanes<A> a, int64_t mr, int64_t) {
  return {a.p + mr, a.ld};
}

// The lines of `rows` rows of NV vectors, `step` elements apart, into L2: in L1 they would push out the panel of B, and
// each other where rows are a multiple of 4 KB apart. Rows that do not start with a line have one more.
template <int NV, class S>
FASTNN_INLINE void fetch_rows(const S* at, int64_t step, int rows) {
  constexpr int64_t kWidth = NV * Vec<acc_t<S>>::N, kLine = 64 / sizeof(S);
  const bool straddles = ((uintptr_t(at) | uintptr_t(step * int64_t(sizeof(S)))) & 63) != 0;
  for (int i = 0; i < rows; ++i, at += step) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kWidth; j += kLine) __builtin_prefetch(at + j, 1, 2);
    if (straddles) __builtin_prefetch(at + kWidth - 1, 1, 2);
  }
}

// One strip of columns: all panels of A (packed, or rows in place) times one panel of B.
template <class A, int MR, int NV, class Rows, class Panel, class Store>
void gemm_strip(Rows a, Panel panel, int64_t kb, int64_t sum_k, int64_t m0, int64_t m1, int64_t n0, int nb,
                const Store& store, bool first, bool last) {
  const GemmPanel<A> b = packed_panel(panel);
  for (int64_t m = m0; m < m1; m += MR, a = next_rows(a, MR, kb)) {
    // Arrives while the tile is computed, also where it is only written: 1024^3 waited 4 % of its time for it, the
    // gradient of a weight of 4096x1000 from 32 rows a fifth, of 1024x1024 from 8 half.
    if constexpr (requires { store.template prefetch<NV>(m, MR, n0, first); })
      store.template prefetch<NV>(m, int(min64(MR, m1 - m)), n0, first);
    GemmTile<A, MR, NV> tile;
    if constexpr (NV == 2 && __is_same(Rows, const A*) && __is_same(Panel, GemmFreshPanel<A>)) {
      if (m > m0 || !panel.fresh) gemm_micro<A, MR, NV>(tile, kb, sum_k, a, b.p, b.ld);
      else if (panel.copy) gemm_micro_fresh<A, MR, NV, true>(tile, kb, sum_k, a, panel);
      else gemm_micro_fresh<A, MR, NV, false>(tile, kb, sum_k, a, panel);
    } else {
      gemm_micro<A, MR, NV>(tile, kb, sum_k, a, b.p, b.ld);
    }
    store.tile(tile, m, int(min64(MR, m1 - m)), n0, nb, first, last);
  }
}

template <class A, int MR, class Rows, class Panel, class Store>
FASTNN_INLINE void gemm_strip_rows(int mr, Rows a, Panel b, int64_t kb, int64_t sum_k, int64_t m0, int64_t m1,
                                   int64_t n0, int nb, const Store& store, bool first, bool last) {
  if (mr == MR) {
    if (nb > Vec<A>::N) gemm_strip<A, MR, 2>(a, b, kb, sum_k, m0, m1, n0, nb, store, first, last);
    else gemm_strip<A, MR, 1>(a, b, kb, sum_k, m0, m1, n0, nb, store, first, last);
    return;
  }
  if constexpr (MR > 1) gemm_strip_rows<A, MR - 1>(mr, a, b, kb, sum_k, m0, m1, n0, nb, store, first, last);
}

// One task: rows [m0, m1), columns [n0, n1), K range [k0, k1) in chunks of plan.kc.
template <class A, class PackA, class PackB, class Store>
void gemm_task(const GemmPlan& plan, A* a_block, A* b_panels, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
               int64_t k0, int64_t k1, const PackA& pack_a, const PackB& pack_b, const Store& store) {
  constexpr int N = Vec<A>::N;
  constexpr bool in_place = requires { pack_a(m0, k0); };
  int64_t k = k0;
  do {  // once even when K is 0: the store still writes
    const int64_t kb = min64(plan.kc, k1 - k);
    const bool first = k == k0, last = k + kb >= k1;
    const bool several = plan.tm > plan.mc;
    auto* const kept = several ? reinterpret_cast<GemmPanel<A>*>(b_panels + plan.tn * plan.kc + N) : nullptr;
    for (int64_t from = m0; from < m1; from += plan.mc) {
      const int64_t to = min64(from + plan.mc, m1);
      bool packed = false;
      if constexpr (requires { pack_a.whole(a_block, plan.mr, from, to, k, kb); })
        packed = pack_a.whole(a_block, plan.mr, from, to, k, kb);
      if constexpr (!in_place)
        for (int64_t m = from; m < to && !packed; m += plan.mr)
          pack_a(a_block + (m - from) * kb, plan.mr, m, int(min64(plan.mr, to - m)), k, kb);
      A* b_panel = b_panels;
      for (int64_t n = n0; n < n1; n += 2 * N) {
        const int nb = int(min64(2 * N, n1 - n)), nr = nb > N ? 2 * N : N;
        using Panel = decltype(pack_b(b_panel, nr, k, kb, n, nb));
        const Panel b = from == m0 ? pack_b(b_panel, nr, k, kb, n, nb) : Panel{GemmPanel<A>{kept[(n - n0) / (2 * N)]}};
        if constexpr (in_place) {
          // Rows past the last must not be read: the rest has a strip of its own size.
          const int rest = int((to - from) % plan.mr);
          if (to - rest > from)
            gemm_strip_rows<A, kGemmMaxMr>(plan.mr, pack_a(from, k), b, kb, plan.sum_k, from, to - rest, n, nb, store,
                                           first, last);
          if (rest)
            gemm_strip_rows<A, kGemmMaxMr>(rest, pack_a(to - rest, k), b, kb, plan.sum_k, to - rest, to, n, nb, store,
                                           first, last);
        } else {
          using Packed = decltype(pack_a(a_block, 0, int64_t{}, 0, int64_t{}, int64_t{}));
          if constexpr (__is_same(Packed, void))
            gemm_strip_rows<A, kGemmMaxMr>(plan.mr, static_cast<const A*>(a_block), b, kb, plan.sum_k, from, to, n, nb,
                                           store, first, last);
          else
            gemm_strip_rows<A, kGemmMaxMr>(plan.mr, Packed{a_block}, b, kb, plan.sum_k, from, to, n, nb, store, first,
                                           last);
        }
        if (several && from == m0) {
          kept[(n - n0) / (2 * N)] = packed_panel(b);
          b_panel += 2 * N * kb;
        }
      }
    }
    k += plan.kc;
  } while (k < k1);
}

// Hands rows [m0, m1) x [n0, n1), the sum of `count` buffers `step` apart, to the store.
template <class A, class Store>
void gemm_flush(const A* c, int64_t ld, int64_t count, int64_t step, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                const Store& store) {
  constexpr int N = Vec<A>::N;
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t n = n0; n < n1; n += N) {
      const A* at = c + (m - m0) * ld + n - n0;
      GemmTile<A, 1, 1> t;
      t.v[0][0] = Vec<A>::load(at);
      for (int64_t s = 1; s < count; ++s) t.v[0][0] = t.v[0][0] + Vec<A>::load(at + s * step);
      store.tile(t, m, 1, n, int(min64(N, n1 - n)), true, true);
    }
}

template <class A, class PackA, class PackB, class Store>
void gemm_blocked(const GemmPlan& plan, void* workspace, const PackA& pack_a, const PackB& pack_b, const Store& store) {
  if (plan.m == 0 || plan.n == 0) return;
  const int64_t m_blocks = ceil_div(plan.m, plan.tm), n_blocks = plan.n_blocks();
  const int64_t tasks = m_blocks * n_blocks * plan.splits;
  const int64_t per_worker = plan.a_elements + plan.b_elements + plan.c_elements;
  const int64_t ld = round_up(plan.n, Vec<A>::N);
  A* const base = static_cast<A*>(workspace);
  A* const partial = base + per_worker * plan.workers;
  parallel_for(0, plan.workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      A* a_block = base + w * per_worker;
      A* b_panel = a_block + plan.a_elements;
      A* c_block = b_panel + plan.b_elements;
      for (int64_t task = tasks * w / plan.workers; task < tasks * (w + 1) / plan.workers; ++task) {
        const int64_t split = task % plan.splits, block = task / plan.splits;
        const int64_t m0 = block / n_blocks * plan.tm, m1 = min64(m0 + plan.tm, plan.m), column = block % n_blocks;
        const int64_t n0 = column * plan.step_n, n1 = column == n_blocks - 1 ? plan.n : n0 + plan.step_n;
        const int64_t k0 = split * plan.split_k, k1 = min64(k0 + plan.split_k, plan.k);
        if (plan.splits > 1) {
          const GemmBuffer<A> buffer{partial + split * plan.m * ld, ld, 0, 0};
          gemm_task<A>(plan, a_block, b_panel, m0, m1, n0, n1, k0, k1, pack_a, pack_b, buffer);
        } else if (plan.c_elements) {
          const GemmBuffer<A> buffer{c_block, plan.tn, m0, n0};
          gemm_task<A>(plan, a_block, b_panel, m0, m1, n0, n1, k0, k1, pack_a, pack_b, buffer);
          gemm_flush<A>(c_block, plan.tn, 1, 0, m0, m1, n0, n1, store);
        } else {
          gemm_task<A>(plan, a_block, b_panel, m0, m1, n0, n1, k0, k1, pack_a, pack_b, store);
        }
      }
      if constexpr (requires { store.end(); }) store.end();
    }
  });
  if (plan.splits > 1) gemm_flush<A>(partial, ld, plan.splits, plan.m * ld, 0, plan.m, 0, plan.n, store);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
