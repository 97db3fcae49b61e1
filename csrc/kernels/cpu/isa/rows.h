// Sweeps over rows of contiguous classes, shared by softmax and the losses.
#pragma once
#include "exp_below.h"
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Rows that take turns: element i of memory belongs to row i % period. Swept by vectors of as many whole turns as fit,
// a row keeps its lanes; then every lane becomes the reduction of its row.
template <class A>
FASTNN_INLINE int turns(int64_t period) {
  return int(Vec<A>::N / period * period);
}

template <class A, class Op>
FASTNN_INLINE Vec<A> spread(Vec<A> v, int64_t period, const Op& op) {
  using V = Vec<A>;
  typename V::Int iota;
  for (int l = 0; l < V::N; ++l) iota[l] = l;
  if ((period & (period - 1)) == 0) {
#pragma GCC unroll 4
    for (int d = V::N / 2; d >= period; d /= 2) v = op(v, V{__builtin_shuffle(v.v, iota ^ d)});
    return v;
  }
  const int64_t lanes = turns<A>(period);
  auto next = iota + every_lane<A>(period), first = iota;
  next = next < every_lane<A>(lanes) ? next : next - every_lane<A>(lanes);
  V turned = v;
  for (int64_t i = period; i < lanes; i += period) {
    turned = V{__builtin_shuffle(turned.v, next)};
    v = op(v, turned);
    first = iota < every_lane<A>(i) ? first : iota - every_lane<A>(i);
  }
  return V{__builtin_shuffle(v.v, first)};
}

// Several rows of n classes in one vector, one behind another: every lane becomes the reduction of its row.
template <class A>
struct RowsInVector {
  using V = Vec<A>;
  typename V::Int iota, first, next;  // lanes: this one, the row's first class, the class behind (cyclic)
  int64_t classes;

  FASTNN_VEC_FN explicit RowsInVector(int64_t n) : classes(n) {
    for (int l = 0; l < V::N; ++l) {
      const int64_t begin = l / n * n;
      iota[l] = l;
      first[l] = begin;
      next[l] = min64(V::N - 1, begin + (l - begin + 1) % n);
    }
  }
  FASTNN_VEC_FN int lanes() const { return int(V::N / classes * classes); }
  template <class Op>
  FASTNN_VEC_FN V reduce(V v, const Op& op) const {
    if ((classes & (classes - 1)) == 0) {
      for (int d = 1; d < classes; d *= 2) v = op(v, V{__builtin_shuffle(v.v, iota ^ d)});
      return v;
    }
    V turned = v;
    for (int64_t i = 1; i < classes; ++i) {
      turned = V{__builtin_shuffle(turned.v, next)};
      v = op(v, turned);
    }
    return V{__builtin_shuffle(v.v, first)};
  }
};

// ---- one row -------------------------------------------------------------------------------------------------------

// The largest value lane by lane; NaNs are forgotten (they come back through exp(NaN - max)).
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> row_max(const S* x, int64_t n, int step = Vec<A>::N) {
  using V = Vec<A>;
  V m[kUnroll];
  for (V& v : m) v = V::set1(kNegInf<A>);
  for_vectors<V::N>(
      n, [&](int64_t i, int lanes, int k) { m[k] = max(load_some(x + i, lanes, kNegInf<A>), m[k]); }, step);
  return fold(m, [](V a, V b) { return max(a, b); });
}

// Calls f(offset, lanes, e) for the exponentials of the row and returns their sums lane by lane. Meanwhile the caches
// fetch the n elements at x + ahead, which are read next (128x1000: 0.9 of the time).
template <class S, class A = acc_t<S>, class F>
FASTNN_INLINE Vec<A> row_sum_exp(const S* x, int64_t n, int64_t ahead, const ExpBelow<A>& below, const F& f,
                                 int step = Vec<A>::N) {
  using V = Vec<A>;
  V sum[kUnroll] = {};
  for_exps_below<A>(
      below, n, [&](int64_t i, int lanes) { return load_some(x + i, lanes, kNegInf<A>); },
      [&](int64_t i, int lanes, int k, V e) {
        f(i, lanes, e);
        sum[k] = sum[k] + e;
        __builtin_prefetch(x + ahead + i);
      },
      step);
  return fold(sum, [](V a, V b) { return a + b; });
}

// Whether a row's sweep also looks for the next row's maximum (AVX-512, 128x1000: 0.9 of the time). AVX2 has too few
// registers: 1.15.
constexpr bool kMaxAhead = kVecBytes == 64;

// The same in one number. With `more`, `maximum` becomes that of the next row, at x + n.
template <class S, class F, class A = acc_t<S>>
FASTNN_INLINE A row_sum_exp_ahead(const S* x, int64_t n, const ExpBelow<A>& below, bool more, A& maximum, const F& f) {
  using V = Vec<A>;
  if (!more) return reduce_add(row_sum_exp(x, n, n, below, f));
  V sum[kUnroll] = {}, top[kUnroll];
  for (V& v : top) v = V::set1(kNegInf<A>);
  for_exps_below<A>(
      below, n, [&](int64_t i, int lanes) { return load_some(x + i, lanes, kNegInf<A>); },
      [&](int64_t i, int lanes, int k, V e) {
        f(i, lanes, e);
        sum[k] = sum[k] + e;
        top[k] = max(load_some(x + n + i, lanes, kNegInf<A>), top[k]);
      });
  maximum = reduce_max(fold(top, [](V a, V b) { return max(a, b); }));
  return reduce_add(fold(sum, [](V a, V b) { return a + b; }));
}

// ---- N rows at once ------------------------------------------------------------------------------------------------

// Rows up to this long are worth reducing N at a time: the group stays in L1.
constexpr int64_t kGroupClasses = 128;

// The row a lane of a group of `count` rows stands for: the last one again where there are fewer than N.
FASTNN_INLINE int64_t group_row(int r, int count) { return r < count ? r : count - 1; }

// Maximum and sum of exp(x - maximum) of `count` <= N rows of n <= N classes, one row per lane.
template <class S, class A = acc_t<S>>
FASTNN_INLINE void group_max_and_sum(const S* x, int64_t n, int count, Vec<A>& m, Vec<A>& sum) {
  using V = Vec<A>;
  V v[V::N];
#pragma GCC unroll 16
  for (int r = 0; r < V::N; ++r) v[r] = load_first(x + group_row(r, count) * n, n, kNegInf<A>);
  m = max_rows(v);
  const ExpBelowRows<A> below(m);
#pragma GCC unroll 16
  for (int r = 0; r < V::N; ++r) {
    v[r] = load_first(x + group_row(r, count) * n, n, kNegInf<A>);
    below.row(r).template exps<1>(v + r);
  }
  sum = below.all.whole(sum_rows(v));
}

// Exponentials of N rows that wait for their sums, a row's in whole vectors (a load waits for a masked store before
// it).
template <class A>
struct GroupExps {
  int64_t stride;
  alignas(kVecBytes) A of_row[Vec<A>::N * kGroupClasses];
};

// f reduced over v[0] ... v[K - 1], which it overwrites.
template <int K, class V, class Op>
FASTNN_INLINE V join(V* v, const Op& op) {
  each<K / 2>([&](int k) { v[k] = op(v[k], v[K - 1 - k]); });
  if constexpr (K == 1) return v[0];
  else return join<(K + 1) / 2>(v, op);
}

// Rows of n classes, R vectors after whole groups of kUnroll: see for_short_rows.
template <int R, bool kWhole, bool kKeep, class S, class A, class Sums, class Finish>
FASTNN_INLINE void for_rows_of(const S* x, int64_t n, int64_t rows, GroupExps<A>& exps, const Sums& sums,
                               const Finish& finish) {
  using V = Vec<A>;
  constexpr int64_t N = V::N, kGroup = kUnroll * N;
  const int64_t whole = kWhole ? (ceil_div(n, N) - R) * N : 0;
  const int last = int(n - whole - (R - 1) * N);
  const auto for_row = [&](const auto& f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < whole; i += kGroup) f(Vectors<kUnroll>{}, i, int(N));
    f(Vectors<R>{}, whole, last);
  };
  const auto max_of = [&](const S* p) __attribute__((always_inline)) {
    V m = V::set1(kNegInf<A>);
    for_row([&](auto vectors, int64_t i, int lanes) __attribute__((always_inline)) {
      constexpr int K = vectors.count;
      V v[K];
      each<K>([&](int k) { v[k] = load_some(p + i + k * N, k + 1 < K ? int(N) : lanes, kNegInf<A>); });
      m = max(join<K>(v, [](V a, V b) { return max(a, b); }), m);
    });
    return m;
  };
  // Other lanes than the row's are exp(0), then 0: exp(-inf) underflows, which AVX2's multiplications are slow at.
  const auto sum_of = [&](const S* p, const ExpBelow<A>& below, A m, A* to) __attribute__((always_inline)) {
    V sum = V::zero();
    for_row([&](auto vectors, int64_t i, int lanes) __attribute__((always_inline)) {
      constexpr int K = vectors.count;
      V e[K];
      each<K>([&](int k) { e[k] = load_some(p + i + k * N, k + 1 < K ? int(N) : lanes, m); });
      below.template exps<K>(e);
      if (lanes < N) e[K - 1] = first_lanes(e[K - 1], lanes);
      if (kKeep) each<K>([&](int k) { e[k].store(to + i + k * N); });
      sum = sum + join<K>(e, [](V a, V b) { return a + b; });
    });
    return sum;
  };
  const auto finish_row = [&](int64_t row, int r) __attribute__((always_inline)) {
    for_row([&](auto vectors, int64_t i, int lanes) __attribute__((always_inline)) {
      constexpr int K = vectors.count;
      each<K>([&](int k) __attribute__((always_inline)) { finish(row + r, r, i + k * N, k + 1 < K ? int(N) : lanes); });
    });
  };
  V m[N], total[N];
  exps.stride = round_up(n, N);
  for (int r = 0; r < N; ++r) m[r] = max_of(x + min64(r, rows - 1) * n);
  for (int64_t row = 0; row < rows; row += N) {
    const ExpBelowRows<A> below(max_rows(m));
    for (int r = 0; r < N; ++r) {
      if (row > 0) finish_row(row - N, r);
      total[r] = sum_of(x + min64(row + r, rows - 1) * n, below.row(r), below.m[r], exps.of_row + r * exps.stride);
      if (row + N < rows) m[r] = max_of(x + min64(row + N + r, rows - 1) * n);
    }
    sums(row, int(min64(N, rows - row)), below.all, sum_rows(total));
  }
  for (int64_t row = (rows - 1) / N * N, r = 0; row + r < rows; ++r) finish_row(row, int(r));
}

// Rows of N < n <= kGroupClasses classes, N at a time. sums(first row, how many, ExpBelow, sums of its exponentials)
// takes one row per lane; finish(row, number in its group, offset, lanes) then comes for every vector of the group's
// rows, their exponentials in `exps` if kKeep. Three groups are under way at once, where a single one would wait for
// its maxima and then for its sums: 1024x64 in 0.75 of the time.
template <bool kKeep, class S, class A, class Sums, class Finish>
FASTNN_INLINE void for_short_rows(const S* x, int64_t n, int64_t rows, GroupExps<A>& exps, const Sums& sums,
                                  const Finish& finish) {
  const auto run = [&](auto rest) __attribute__((always_inline)) {
    constexpr int R = rest.count;
    if (n <= kUnroll * Vec<A>::N) for_rows_of<R, false, kKeep>(x, n, rows, exps, sums, finish);
    else for_rows_of<R, true, kKeep>(x, n, rows, exps, sums, finish);
  };
  switch (ceil_div(n, Vec<A>::N) % kUnroll) {
    case 1: return run(Vectors<1>{});
    case 2: return run(Vectors<2>{});
    case 3: return run(Vectors<3>{});
    default: return run(Vectors<4>{});
  }
}

// ---- exp(x - maximum), scaled --------------------------------------------------------------------------------------

// Whether y, of `elements` in rows of n, is written past the caches: so large it leaves them anyway.
template <class S>
FASTNN_INLINE bool streams_rows(const S* y, int64_t n, int64_t elements) {
  return kVecBytes == 64 && __is_same(S, float) && n % 16 == 0 && uintptr_t(y) % 64 == 0 && elements > 8 << 20;
}

// y = e factor(below, sum of e) along one row, e being its exponentials below `maximum`; for `more` see
// row_sum_exp_ahead.
// y holds the exponentials in between: not for 16-bit types, which would round them. When it is streamed they are
// computed again: 0.8 of the time for 512x32000.
template <class S, class F>
FASTNN_INLINE void row_scaled_exp(const S* x, S* y, int64_t n, bool streamed, bool more, S& maximum, const F& factor) {
  using V = Vec<S>;
  const ExpBelow<S> below(V::set1(maximum));
  if (streamed) {
    const S sum = reduce_add(row_sum_exp(x, n, n, below, [](int64_t, int, V) {}));
    const V scale = V::set1(factor(below, sum));
    return for_exps_below<S>(
        below, n, [&](int64_t i, int) { return V::load(x + i); },
        [&](int64_t i, int, int, V e) {
          stream(e * scale, y + i);
          __builtin_prefetch(x + n + i);
        });
  }
  const S sum =
      row_sum_exp_ahead(x, n, below, more, maximum, [&](int64_t i, int lanes, V e) { store_some(e, y + i, lanes); });
  const V scale = V::set1(factor(below, sum));
  for_vectors<V::N>(
      n, [&](int64_t i, int lanes, int) { store_some(load_some(y + i, lanes, S(0)) * scale, y + i, lanes); });
}

// The same for `count` <= N rows of n <= N classes, one vector each, in registers throughout; factor takes and returns
// one row per lane, and finish(number of the row, its exponentials times its factor) is what is written.
template <class S, class F, class Finish, class A = acc_t<S>>
FASTNN_INLINE void group_scaled_exp(const S* x, S* y, int64_t n, int count, const F& factor, const Finish& finish) {
  using V = Vec<A>;
  V v[V::N], e[V::N];
  A of_row[V::N];
#pragma GCC unroll 16
  for (int r = 0; r < V::N; ++r) v[r] = e[r] = load_first(x + group_row(r, count) * n, n, kNegInf<A>);
  const ExpBelowRows<A> below(max_rows(v));
#pragma GCC unroll 16
  for (int r = 0; r < V::N; ++r) {  // registers for one at a time
    below.row(r).template exps<1>(e + r);
    v[r] = e[r];
  }
  factor(below.all, sum_rows(v)).store(of_row);
#pragma GCC unroll 16
  for (int r = 0; r < V::N; ++r) {
    const int64_t at = group_row(r, count);
    store_first(finish(at, e[r] * V::set1(of_row[at])), y + at * n, n);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
