// Matrix products: chooses between the packed driver, the same
// with B read in place, dot products and whole rows for small m.
#include "../../gemm.h"

#include <type_traits>

#include "gemm_axpy.h"
#include "gemm_bf16.h"
#include "gemm_dot.h"
#include "gemm_store.h"
#include "isa.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

enum class Algorithm { dot, axpy, outer, in_place, by_columns, packed };

// The transposed problem, C^T = B^T A^T.
GemmParams transposed(const GemmParams& p) {
  GemmParams t = p;
  t.a = p.b, t.b = p.a, t.m = p.n, t.n = p.m;
  t.a_stride_batch = p.b_stride_batch, t.a_stride_m = p.b_stride_n, t.a_stride_k = p.b_stride_k;
  t.b_stride_batch = p.a_stride_batch, t.b_stride_k = p.a_stride_k, t.b_stride_n = p.a_stride_m;
  t.c_stride_m = p.c_stride_n, t.c_stride_n = p.c_stride_m;
  t.d_stride_m = p.d_stride_n, t.d_stride_n = p.d_stride_m;
  return t;
}

// Dot products with every row of A instead of packing it: for a layer of few outputs (a classifier's ten) they are
// x1.1 to x3 as fast as half-empty tiles, from k of 10 n on.
bool few_dots(const GemmParams& p) {
  if (p.a_stride_k != 1 || p.b_stride_k != 1 || p.m < 16 || p.k < 16) return false;
  if (p.n <= kDotRows) return true;
  return p.m > kDotMaxM && p.n <= kDotNarrowN && p.k >= 10 * p.n && (p.dtype == DType::f32 || p.dtype == DType::f64);
}

// A product whose operands both run along k (a layer's forward) by columns of C: rows of B are read in place and A is
// packed, which costs less the fewer rows it has; they are the lanes then, and those that stay empty cost as much as
// others. Against dot products, which lose time with a short k, and packing B (one thread, AVX-512): 64x784->512 x1.07,
// 64x64->64 x1.4, 32x512->256 x1.1, 128x784->512 x1.07; 40x256->64 would be x0.86, 64x1024->64 x0.93, 512x784->512
// x1.02. Of 2250 random layers the choice took 1.02 of the better one's time (Zen 4, one thread).
bool takes_columns(int64_t m, int64_t n, int64_t k, int64_t vector) {
  constexpr int64_t kMinM = 14, kMaxM = 256, kMinN = 25, kMinK = 192, kMaxB = 1 << 26;
  const bool narrow = kVecBytes == 64 && m > kDotMaxM && n < kMinN;
  if (m < kMinM || m > kMaxM || (n < kMinN && !narrow) || n * k > kMaxB) return false;
  const int64_t rest = m % (2 * vector);
  const int64_t lanes = m - rest + (rest == 0 ? 0 : rest <= vector ? 9 * vector / 8 : 2 * vector);
#if defined(__AVX512F__)
  // Weights out of L2 are read once, where dot products read them for every six rows (16x1024->4096 x1.5).
  const int64_t least = n * k >= 1 << 21 ? 770 : 885;
  if (m <= kDotMaxM) return k > 16 && 1000 * m * (k + 14) * n >= least * k * lanes * (n + 10);
  if (100 * m < 97 * lanes) return false;
  if (narrow) return n >= 18 ? k >= 48 && k <= 320 : n >= 8 && n <= 12 && k >= 32 && k <= 128;
  return k >= kMinK;
#elif defined(__AVX2__)
  // Half as many sums in registers as in AVX-512: 32x784->512 is x0.97 of dot products, 64x1024->64 x0.86, 64x4096->512
  // x1.1.
  const int64_t least_k = m > 2 * vector ? 256 * vector : kMinK / 2 * vector;
  return m <= kDotMaxM && k >= least_k && n * k >= 1 << 18 && 100 * m >= 97 * lanes;
#else
  return m <= kDotMaxM && k >= 2 * kMinK && 100 * m >= 97 * lanes;
#endif
}
bool by_columns(const GemmParams& p) {
  if (p.dtype != DType::f32 && p.dtype != DType::f64) return false;
  // One or two terms would write C down its columns: a layer of 2 to 512 and 64 rows
  // took 66 us so, by rows 6.
  if (p.dtype == DType::f32 ? takes_outer<float>(p.m, p.n, p.k) : takes_outer<double>(p.m, p.n, p.k)) return false;
  return p.a_stride_k == 1 && p.b_stride_k == 1 && p.c_stride_n == 1 && p.alpha == 1 &&
         (!p.d || (p.d_stride_n == 1 && p.beta == 1)) &&
         takes_columns(p.m, p.n, p.k, p.dtype == DType::f32 ? Vec<float>::N : Vec<double>::N);
}

// Few columns are rather few rows, of a B that is read in place: a vector times a matrix, dot
// products, few rows of sums. Else rows of C run along n, unless only m is dense in memory.
bool wants_transposing(const GemmParams& p) {
  if (p.n == 1 && p.m > 1) return p.a_stride_m == 1 || (p.a_stride_k == 1 && p.b_stride_k == 1);
  if (p.n <= kAxpyMaxM && p.a_stride_m == 1 && p.a_stride_k != 1 && p.b_stride_k == 1 && p.b_stride_n != 1) return true;
  return few_dots(p) || by_columns(p) || (p.c_stride_n != 1 && p.c_stride_m == 1);
}

template <class S>
Algorithm choose(const GemmParams& p) {
  if (p.c_stride_m == 1 && by_columns(transposed(p))) return Algorithm::by_columns;
  if (takes_outer<S>(p.m, p.n, p.k)) return Algorithm::outer;
  // A product by pairs is twice as fast as dot products in float32: worth copying B from one tile of rows on.
  const int64_t dot_m = p.dtype == DType::bf16 && has_bf16_products() ? kGemmMaxMr : kDotMaxM;
  // Dot products of few elements are all sums over lanes: 64x3->256 took 12.6 us that way, torch 3.5.
  // Many rows of 64 are x1.12 as fast packed where a vector is eight lanes (48x64->64), of 128 x0.97.
  const bool many = kDotRows == 3 && p.m >= 40 && p.n >= 32;
  const int64_t dot_k = many ? 96 : p.m > 4 ? 32 : p.m > 1 && p.n > 16 ? 16 : 1;
  if (p.a_stride_k == 1 && p.b_stride_k == 1 && p.m <= dot_m && p.k >= dot_k) return Algorithm::dot;
  if (p.b_stride_n == 1 && p.m <= kAxpyMaxM) return Algorithm::axpy;
  // One or two tiles of rows do not repay copying B, unless it is fetched for them (fresh panels).
  if (p.b_stride_n == 1 && p.m <= 2 * kGemmMaxMr) return Algorithm::in_place;
  return Algorithm::packed;
}

// bfloat16 in pairs along k.
template <class S>
bool in_pairs() {
  if constexpr (__is_same(S, bf16)) return has_bf16_products();
  return false;
}

// As many threads as the bound on the workspace has room for.
template <class S>
GemmPlan plan_for(const GemmParams& p, int threads, int64_t beside = 1) {
  // A short k makes writing C the work: few rows at a time, so that their pages stay in the TLB.
  const int64_t max_tm = p.k <= 64 ? 4 * kGemmMaxMr : p.m;
  const int64_t k = in_pairs<S>() ? ceil_div(p.k, 2) : p.k;
  const bool by_columns = choose<S>(p) == Algorithm::by_columns;
  for (;; --threads) {
    const GemmPlan plan = gemm_plan<acc_t<S>>(p.m, p.n, k, threads, GemmStore<S>::kAccumulates, max_tm, beside,
                                              by_columns ? kGemmL2Bytes : kGemmL1Bytes,
                                              by_columns ? gemm_rows_in_place<S>(p.a_stride_m) : kGemmMaxMr);
    if (plan.workspace_bytes <= kGemmMaxWorkspace || threads <= 1) return plan;
  }
}

// Many small products: one worker per matrix. Few or large ones: all workers on one matrix after the other.
bool parallel_over_batch(const GemmParams& p) {
  return p.batch >= 2 * num_threads() || (p.batch > 1 && p.m * p.n <= 64 * 64);
}

// One worker per matrix: a plan of one thread, and how many of them have room.
struct Side {
  GemmPlan plan;
  int64_t workers, bytes;  // of a worker
};
template <class S>
Side side_by_side(const GemmParams& p) {
  const int64_t workers = min64(num_threads(), p.batch);
  const GemmPlan plan = plan_for<S>(p, 1, workers);
  const int64_t bytes = round_up(plan.workspace_bytes, 64);
  return {plan, max64(1, min64(workers, kGemmMaxWorkspace / max64(1, bytes))), bytes};
}

constexpr int64_t kNeverStreamed = int64_t(1) << 62;

template <class S>
struct Matrices {
  const S *a, *b;
  GemmStore<S> store;
  // `streamed`: elements of C from which on it is written past the caches.
  Matrices(const GemmParams& p, int64_t i, int64_t streamed = kNeverStreamed)
      : a(static_cast<const S*>(p.a) + i * p.a_stride_batch),
        b(static_cast<const S*>(p.b) + i * p.b_stride_batch),
        store{static_cast<S*>(p.c) + i * p.c_stride_batch,
              p.c_stride_m,
              p.c_stride_n,
              p.d ? static_cast<const S*>(p.d) + i * p.d_stride_batch : nullptr,
              p.d_stride_m,
              p.d_stride_n,
              acc_t<S>(p.alpha),
              acc_t<S>(p.beta),
              p.relu} {
    store.streams = p.m * p.n >= streamed && store.streams_lines();
  }
};

template <class S>
struct RowPacker {
  using A = acc_t<S>;
  const S* a;
  int64_t m, stride_m, stride_k;
  void operator()(A* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) const {
    gemm_pack_panel<S>(dst, mr, a + m0 * stride_m + k0 * stride_k, stride_m, stride_k, mb, kb, m0 + 2 * mr <= m);
  }
  bool whole(A* dst, int mr, int64_t m0, int64_t m1, int64_t k0, int64_t kb) const {
    if (stride_m != 1 || mr > Vec<A>::N) return false;
    gemm_pack_side_by_side<S>(dst, mr, a + m0 + k0 * stride_k, stride_k, m1 - m0, kb);
    return true;
  }
};

template <class S>
void multiply(const GemmParams& p, const GemmPlan& plan, Algorithm algorithm, int64_t i, void* workspace) {
  using A = acc_t<S>;
  // AVX2's tiles, one line wide, gain nothing and lose a tenth.
  const bool once = kVecBytes >= 64 && p.k <= plan.kc && plan.splits == 1;
  const Matrices<S> x(p, i, once ? kStreamedResult : kNeverStreamed);
  constexpr bool fresh = std::is_same_v<S, float>;
  using Panel = std::conditional_t<fresh, GemmFreshPanel<A>, GemmPanel<A>>;
  const auto pack_b = [&](A* dst, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) -> Panel {
    const S* from = x.b + k0 * p.b_stride_k + n0 * p.b_stride_n;
    if constexpr (fresh) {
      // What is in L2 is read in place without more ado: 5x512->256 x0.85 otherwise.
      if (p.b_stride_n == 1 && nb == 2 * Vec<A>::N && (algorithm == Algorithm::packed || p.n * p.k >= 1 << 17))
        return {{from, p.b_stride_k}, p.m > plan.mr ? dst : nullptr, true};
    }
    if constexpr (sizeof(S) == sizeof(A)) {
      if (algorithm == Algorithm::in_place && nb == nr) return Panel{GemmPanel<A>{from, p.b_stride_k}};
    }
    gemm_pack_panel<S>(dst, nr, from, p.b_stride_n, p.b_stride_k, nb, kb, n0 + 2 * nr <= p.n);
    return Panel{GemmPanel<A>{dst, nr}};
  };
  if constexpr (sizeof(S) == sizeof(A)) {
    if (algorithm == Algorithm::by_columns) {
      const auto rows = [&](int64_t m0, int64_t k0) { return GemmRows<A>{x.a + m0 * p.a_stride_m + k0, p.a_stride_m}; };
      const ColumnStore<S> store{x.store.c, p.c_stride_n, x.store.d, p.d_stride_n, p.relu};
      return gemm_blocked<A>(plan, workspace, rows, pack_b, store);
    }
  }
#if defined(__AVX512F__)
  if constexpr (__is_same(S, bf16)) {
    if (in_pairs<S>())
      return gemm_blocked<float>(
          plan, workspace,
          [&](float* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) -> Bf16Pairs {
            pack_bf16_pairs(dst, mr, x.a + m0 * p.a_stride_m + 2 * k0 * p.a_stride_k, p.a_stride_m, p.a_stride_k, mb,
                            min64(2 * kb, p.k - 2 * k0));
            return {dst};
          },
          [&](float* dst, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) -> GemmPanel<float> {
            pack_bf16_pairs(dst, nr, x.b + 2 * k0 * p.b_stride_k + n0 * p.b_stride_n, p.b_stride_n, p.b_stride_k, nb,
                            min64(2 * kb, p.k - 2 * k0));
            return {dst, nr};
          },
          x.store);
  }
#endif
  gemm_blocked<A>(plan, workspace, RowPacker<S>{x.a, p.m, p.a_stride_m, p.a_stride_k}, pack_b, x.store);
}

template <class S>
void run(const GemmParams& p) {
  const Algorithm algorithm = choose<S>(p);
  if (algorithm == Algorithm::dot) {
    for (int64_t i = 0; i < p.batch; ++i) {
      const Matrices<S> x(p, i);
      gemm_dot<S>(p.m, p.n, p.k, x.a, p.a_stride_m, x.b, p.b_stride_n, x.store);
    }
    return;
  }
  if (algorithm == Algorithm::axpy) {
    for (int64_t i = 0; i < p.batch; ++i) {
      const Matrices<S> x(p, i);
      gemm_axpy<S>(p.m, p.n, p.k, x.a, p.a_stride_m, p.a_stride_k, x.b, p.b_stride_k, x.store);
    }
    return;
  }
  if (algorithm == Algorithm::outer) {
    for (int64_t i = 0; i < p.batch; ++i) {
      const Matrices<S> x(p, i, 2 * kStreamedResult);  // less is faster in L3: nothing but stores
      gemm_outer<S>(p.m, p.n, p.k, x.a, p.a_stride_m, p.a_stride_k, x.b, p.b_stride_k, p.b_stride_n, x.store);
    }
    return;
  }
  if (!parallel_over_batch(p)) {
    const GemmPlan plan = plan_for<S>(p, num_threads());
    for (int64_t i = 0; i < p.batch; ++i) multiply<S>(p, plan, algorithm, i, p.workspace);
    return;
  }
  const Side side = side_by_side<S>(p);
  parallel_for(0, side.workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t i = p.batch * w / side.workers; i < p.batch * (w + 1) / side.workers; ++i)
        multiply<S>(p, side.plan, algorithm, i, static_cast<char*>(p.workspace) + w * side.bytes);
  });
}

}  // namespace

int64_t gemm_workspace(const GemmParams& params) {
  const GemmParams p = wants_transposing(params) ? transposed(params) : params;
  int64_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Algorithm algorithm = choose<S>(p);
    if (algorithm == Algorithm::dot || algorithm == Algorithm::axpy || algorithm == Algorithm::outer) return Status::ok;
    if (!parallel_over_batch(p)) {
      bytes = plan_for<S>(p, num_threads()).workspace_bytes;
    } else {
      const Side side = side_by_side<S>(p);
      bytes = side.bytes * side.workers;
    }
    return Status::ok;
  });
  return bytes;
}

Status gemm(const GemmParams& params) {
  const GemmParams p = wants_transposing(params) ? transposed(params) : params;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    run<typename decltype(tag)::type>(p);
    return Status::ok;
  });
}

const char* gemm_algorithm(const GemmParams& params) {
  const GemmParams p = wants_transposing(params) ? transposed(params) : params;
  Algorithm algorithm = Algorithm::packed;
  dispatch_dtype(p.dtype, [&](auto tag) {
    algorithm = choose<typename decltype(tag)::type>(p);
    return Status::ok;
  });
  switch (algorithm) {
    case Algorithm::dot: return "dot";
    case Algorithm::axpy: return "rows";
    case Algorithm::outer: return "outer";
    case Algorithm::in_place: return "in place";
    case Algorithm::by_columns: return "by columns";
    case Algorithm::packed: return "packed";
  }
  return "";
}

// ---- column sums ---------------------------------------------------------------------------------------------------

namespace {

constexpr int kSumVectors = 8;  // sums side by side: enough to hide the latency of an addition
constexpr int kSumRows = 32;    // rows that one sum takes before it goes into a cascade

// Sums of 16 sums of 16 sums ...: the rounding error of a long column grows with its logarithm.
template <class V, int NV>
struct Cascade {
  static constexpr int kLevels = 6, kBits = 4;
  V level[kLevels][NV] = {};
  int64_t taken = 0;

  void take(const V (&part)[NV]) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) level[0][j] = level[0][j] + part[j];
    ++taken;
    for (int l = 0; l + 1 < kLevels && taken % (int64_t(1) << kBits * (l + 1)) == 0; ++l) {
      for (int j = 0; j < NV; ++j) {
        level[l + 1][j] = level[l + 1][j] + level[l][j];
        level[l][j] = V{};
      }
    }
  }
  V total(int j) const {
    V sum = level[0][j];
    for (int l = 1; l < kLevels; ++l) sum = sum + level[l][j];
    return sum;
  }
};

// y[0, columns) = the sums of the rows of x, for columns <= NV vectors that lie side by side.
template <class S, int NV>
void sum_columns(const S* x, int64_t rows, int64_t stride, int64_t columns, S* y) {
  using V = Vec<acc_t<S>>;
  constexpr int U = kSumVectors / NV;
  Cascade<V, NV> sums;
  for (int64_t r0 = 0; r0 < rows; r0 += kSumRows * U) {
    const int64_t r1 = min64(r0 + kSumRows * U, rows);
    V part[U][NV];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) part[u][j] = V::zero();
    const auto add = [&](int64_t r, int u) __attribute__((always_inline)) {
      const S* const row = x + r * stride;
#pragma GCC unroll 8
      for (int j = 0; j < NV - 1; ++j) part[u][j] = part[u][j] + V::load(row + j * V::N);
      part[u][NV - 1] = part[u][NV - 1] + load_lanes(row + (NV - 1) * V::N, columns - (NV - 1) * V::N);
    };
    int64_t r = r0;
    for (; r + U <= r1; r += U)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) add(r + u, u);
    for (; r < r1; ++r) add(r, 0);
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) part[0][j] = part[0][j] + part[u][j];
    sums.take(part[0]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) sums.total(j).store_n(y + j * V::N, min64(V::N, columns - j * V::N));
}

template <class S, int NV = kSumVectors>
void sum_columns_by(int vectors, const S* x, int64_t rows, int64_t stride, int64_t columns, S* y) {
  if constexpr (NV > 1) {
    if (vectors < NV) return sum_columns_by<S, NV - 1>(vectors, x, rows, stride, columns, y);
  }
  sum_columns<S, NV>(x, rows, stride, columns, y);
}

}  // namespace

Status column_sum(const ColumnSumParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    constexpr int64_t kColumns = kSumVectors * Vec<A>::N;
    const S* const x = static_cast<const S*>(p.x);
    S* const y = static_cast<S*>(p.y);
    parallel_for(0, ceil_div(p.columns, kColumns), max64(1, (1 << 12) / max64(1, p.rows)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t c = begin * kColumns; c < min64(end * kColumns, p.columns); c += kColumns) {
                     const int64_t columns = min64(kColumns, p.columns - c);
                     if (p.x_stride_column == 1 || columns == 1) {
                       sum_columns_by<S>(int(ceil_div(columns, Vec<A>::N)), x + c * p.x_stride_column, p.rows,
                                         p.x_stride_row, columns, y + c);
                       continue;
                     }
                     for (int64_t j = 0; j < columns; ++j) {
                       const S* const column = x + (c + j) * p.x_stride_column;
                       Cascade<A, 1> sums;
                       for (int64_t r0 = 0; r0 < p.rows; r0 += kSumRows) {
                         A part[1] = {};
                         for (int64_t r = r0; r < min64(r0 + kSumRows, p.rows); ++r)
                           part[0] += to_acc(column[r * p.x_stride_row]);
                         sums.take(part);
                       }
                       y[c + j] = from_acc<S>(sums.total(0));
                     }
                   }
                 });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
