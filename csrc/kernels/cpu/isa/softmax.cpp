// Softmax and log-softmax over the middle dimension of [outer, classes, inner].
#include "../../softmax.h"

#include "../../parallel.h"
#include "isa.h"
#include "rows.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// exp(x - max) may wait in y for its scale where y does not round it.
template <class S>
constexpr bool kKeepsExp = sizeof(S) > 2;

// ---- rows: the classes of a row are contiguous ---------------------------------------------------------------------

// `period` rows that take turns: max; sum of exp; scale. They stay in L1/L2 in between.
template <class S>
FASTNN_INLINE void softmax_row(const S* x, S* y, int64_t n, int64_t period, int step, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const auto add = [](V a, V b) { return a + b; };
  const auto write = [&](const auto& f) __attribute__((always_inline)) {
    for_vectors<V::N>(n, [&](int64_t i, int lanes, int) { store_some(f(i, lanes), y + i, lanes); }, step);
  };
  const V m = spread(row_max(x, n, step), period, [](V a, V b) { return max(a, b); });
  if (kKeepsExp<S> && !log_form && step == V::N) {  // a load waits for a masked store before it
    const V sum = row_sum_exp(x, n, n, m, [&](int64_t i, int lanes, V e) { store_some(e, y + i, lanes); }, step);
    const V scale = V::set1(A(1)) / spread(sum, period, add);
    return write([&](int64_t i, int lanes) { return load_some(y + i, lanes, A(0)) * scale; });
  }
  const auto fetch = [&](int64_t i, int, V) { __builtin_prefetch(y + i, 1); };
  const V sum = spread(row_sum_exp(x, n, n, m, fetch, step), period, add);
  if (log_form) {
    const V log_sum = log(sum);
    return write([&](int64_t i, int lanes) { return (load_some(x + i, lanes, A(0)) - m) - log_sum; });
  }
  const V scale = V::set1(A(1)) / sum;
  write([&](int64_t i, int lanes) { return exp(load_some(x + i, lanes, A(0)) - m) * scale; });
}

// `rows` long rows, one behind another.
template <class S>
FASTNN_INLINE void softmax_long(const S* x, S* y, int64_t n, int64_t rows, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  bool known = false;  // the next row's maximum
  A maximum;
  for (int64_t r = 0; r < rows; ++r, x += n, y += n) {
    if (!known) maximum = reduce_max(row_max(x, n));
    known = kMaxAhead && r + 1 < rows;
    if constexpr (kKeepsExp<S>) {
      if (!log_form) {
        row_scaled_exp(x, y, n, false, known, maximum, [](A sum) { return A(1) / sum; });
        continue;
      }
    }
    const V m = V::set1(maximum);
    const A sum = row_sum_exp_ahead(x, n, known, maximum, [&](int64_t i, int, V) { __builtin_prefetch(y + i, 1); });
    const V of_row = V::set1(log_form ? log(sum) : A(1) / sum);
    for_vectors<V::N>(n, [&](int64_t i, int lanes, int) {
      const V z = load_some(x + i, lanes, A(0)) - m;
      store_some(log_form ? z - of_row : exp(z) * of_row, y + i, lanes);
    });
  }
}

// Rows of which several fit a vector; n elements in all.
template <class S>
FASTNN_INLINE void softmax_short(const S* x, S* y, int64_t n, int64_t classes, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const RowsInVector<A> rows(classes);
  const auto z = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V v = load_some(x + i, lanes, kNegInf<A>);
    return v - rows.reduce(v, [](V a, V b) { return max(a, b); });
  };
  for_exps<A>(
      n, z,
      [&](int64_t i, int lanes, int, V e) __attribute__((always_inline)) {
        const V sum = rows.reduce(e, [](V a, V b) { return a + b; });
        store_some(log_form ? z(i, lanes) - log(sum) : e / sum, y + i, lanes);
      },
      rows.lanes());
}

// `rows` short rows, N at once: their maxima and sums are reduced together, one row per lane.
template <class S>
FASTNN_INLINE void softmax_groups(const S* x, S* y, int64_t n, int64_t rows, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  A maxima[V::N], of_row[V::N];
  const auto take = [&](V m, V sum) __attribute__((always_inline)) {
    m.store(maxima);
    (log_form ? log(sum) : V::set1(A(1)) / sum).store(of_row);
  };
  const auto write_log = [&](int64_t row, int r, int64_t i, int lanes) __attribute__((always_inline)) {
    const V z = load_some(x + row * n + i, lanes, A(0)) - V::set1(maxima[r]);
    store_some(z - V::set1(of_row[r]), y + row * n + i, lanes);
  };
  if (n <= V::N) {
    for (int64_t row = 0; row < rows; row += V::N) {
      const int count = int(min64(V::N, rows - row));
      if (!log_form) {
        group_scaled_exp(
            x + row * n, y + row * n, n, count, [](V, V sum) { return V::set1(A(1)) / sum; },
            [](int64_t, V e) { return e; });
        continue;
      }
      V m, sum;
      group_max_and_sum(x + row * n, n, count, m, sum);
      take(m, sum);
      for (int r = 0; r < count; ++r) write_log(row + r, r, 0, int(n));
    }
    return;
  }
  GroupExps<A> exps;
  const auto sums = [&](int64_t, int, V m, V sum) __attribute__((always_inline)) { take(m, sum); };
  if (log_form) return for_short_rows<false>(x, n, rows, exps, sums, write_log);
  for_short_rows<true>(x, n, rows, exps, sums,
                       [&](int64_t row, int r, int64_t i, int lanes) __attribute__((always_inline)) {
                         const V e = V::load(exps.of_row + r * exps.stride + i);
                         store_some(e * V::set1(of_row[r]), y + row * n + i, lanes);
                       });
}

// softmax: dx = y (g - sum(g y));  log_softmax: dx = g - exp(y) sum(g).
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> row_backward_sum(const S* g, const S* y, int64_t n, bool log_form, int step = Vec<A>::N) {
  using V = Vec<A>;
  V sum[kUnroll] = {};
  for_vectors<V::N>(
      n,
      [&](int64_t i, int lanes, int k) {
        const V gi = load_some(g + i, lanes, A(0));
        sum[k] = log_form ? sum[k] + gi : fma(gi, load_some(y + i, lanes, A(0)), sum[k]);
      },
      step);
  return fold(sum, [](V a, V b) { return a + b; });
}

template <class S, class A = acc_t<S>>
FASTNN_INLINE void row_backward_write(const S* g, const S* y, S* dx, int64_t n, Vec<A> sum, bool log_form,
                                      int step = Vec<A>::N) {
  using V = Vec<A>;
  const auto at = [](const S* p, int64_t i, int lanes)
                      __attribute__((always_inline)) { return load_some(p + i, lanes, A(0)); };
  if (log_form) {
    for_exps<A, true>(
        n, [&](int64_t i, int lanes) { return at(y, i, lanes); },
        [&](int64_t i, int lanes, int, V e) { store_some(at(g, i, lanes) - e * sum, dx + i, lanes); }, step);
  } else {
    for_vectors<V::N>(
        n,
        [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
          const V gi = at(g, i, lanes);
          store_some(at(y, i, lanes) * (gi - sum), dx + i, lanes);
        },
        step);
  }
}

template <class S>
FASTNN_INLINE void backward_row(const S* g, const S* y, S* dx, int64_t n, int64_t period, int step, bool log_form) {
  using V = Vec<acc_t<S>>;
  const V sum = row_backward_sum(g, y, n, log_form, step);
  row_backward_write(g, y, dx, n, spread(sum, period, [](V a, V b) { return a + b; }), log_form, step);
}

template <class S>
FASTNN_INLINE void backward_short(const S* g, const S* y, S* dx, int64_t n, int64_t classes, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const RowsInVector<A> rows(classes);
  const auto at = [](const S* p, int64_t i, int lanes)
                      __attribute__((always_inline)) { return load_some(p + i, lanes, A(0)); };
  const auto sum = [&](V v) __attribute__((always_inline)) { return rows.reduce(v, [](V a, V b) { return a + b; }); };
  if (log_form) {
    for_exps<A, true>(
        n, [&](int64_t i, int lanes) { return at(y, i, lanes); },
        [&](int64_t i, int lanes, int, V e) __attribute__((always_inline)) {
          const V gi = at(g, i, lanes);
          store_some(gi - e * sum(gi), dx + i, lanes);
        },
        rows.lanes());
  } else {
    for_vectors<V::N>(
        n,
        [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
          const V gi = at(g, i, lanes), yi = at(y, i, lanes);
          store_some(yi * (gi - sum(gi * yi)), dx + i, lanes);
        },
        rows.lanes());
  }
}

template <class S>
FASTNN_INLINE void backward_group(const S* g, const S* y, S* dx, int64_t n, int count, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V v[V::N];
  A of_row[V::N];
  for (int r = 0; r < V::N; ++r) {
    const int64_t at = group_row(r, count) * n;
    v[r] = row_backward_sum(g + at, y + at, n, log_form);
  }
  sum_rows(v).store(of_row);
  for (int r = 0; r < count; ++r) row_backward_write(g + r * n, y + r * n, dx + r * n, n, V::set1(of_row[r]), log_form);
}

// ---- columns: every lane is a row, its classes `inner` apart --------------------------------------------------------

// `width` <= kMaxStrip neighbouring columns, through a tile or where they lie.
template <class S>
FASTNN_INLINE void softmax_columns(const S* x, S* y, int64_t n, int64_t inner, int64_t width, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  alignas(kVecBytes) A m[kMaxStrip], of_row[kMaxStrip];
  if (tile_width<A>(n) > 0) {
    alignas(kVecBytes) A tile[kTileBytes / sizeof(A)];
    return for_tile(
        x, n, inner, width, tile, !log_form, y, [](auto, int64_t, int64_t, const V*) {},
        [&](auto vectors, int64_t i, const V* top, const V* total) __attribute__((always_inline)) {
          each<vectors.count>([&](int k) {
            top[k].store(m + i + k * V::N);
            (log_form ? log(total[k]) : V::set1(A(1)) / total[k]).store(of_row + i + k * V::N);
          });
        },
        [&](int64_t first, int64_t count, const A* tile, int64_t stride) __attribute__((always_inline)) {
          for (int64_t c = 0; c < n; ++c) {
            for_vectors<V::N>(count, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
              const V from = V::load(tile + c * stride + i), scale = V::load(of_row + first + i);
              store_some(log_form ? (from - V::load(m + first + i)) - scale : from * scale, y + c * inner + first + i,
                         lanes);
            });
          }
        });
  }
  strip_max_and_sum(x, n, inner, width, m, of_row, [&](int64_t at, int lanes, V e) __attribute__((always_inline)) {
    if (kKeepsExp<S> && !log_form) store_some(e, y + at, lanes);
  });
  for_vectors<V::N>(width, [&](int64_t i, int, int) {
    const V sum = V::load(of_row + i);
    (log_form ? log(sum) : V::set1(A(1)) / sum).store(of_row + i);
  });
  for (int64_t c = 0; c < n; ++c) {
    for_vectors<V::N>(width, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      const int64_t at = c * inner + i;
      const V scale = V::load(of_row + i);
      if (kKeepsExp<S> && !log_form) return store_some(load_some(y + at, lanes, A(0)) * scale, y + at, lanes);
      const V z = load_some(x + at, lanes, A(0)) - V::load(m + i);
      store_some(log_form ? z - scale : exp(z) * scale, y + at, lanes);
    });
  }
}

template <class S>
FASTNN_INLINE void backward_columns(const S* g, const S* y, S* dx, int64_t n, int64_t inner, int64_t width,
                                    bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  A sum[kMaxStrip];
  for (int64_t i = 0; i < round_up(width, V::N); ++i) sum[i] = 0;
  for (int64_t c = 0; c < n; ++c) {
    for_vectors<V::N>(width, [&](int64_t i, int lanes, int) {
      const V gi = load_some(g + c * inner + i, lanes, A(0)), so_far = V::load(sum + i);
      (log_form ? so_far + gi : fma(gi, load_some(y + c * inner + i, lanes, A(0)), so_far)).store(sum + i);
    });
  }
  const auto at = [](const S* p, int64_t i, int lanes)
                      __attribute__((always_inline)) { return load_some(p + i, lanes, A(0)); };
  for (int64_t c = 0; c < n; ++c, g += inner, y += inner, dx += inner) {
    if (log_form) {
      for_exps<A, true>(
          width, [&](int64_t i, int lanes) { return at(y, i, lanes); },
          [&](int64_t i, int lanes, int, V e) { store_some(at(g, i, lanes) - e * V::load(sum + i), dx + i, lanes); });
    } else {
      for_vectors<V::N>(width, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
        const V gi = at(g, i, lanes);
        store_some(at(y, i, lanes) * (gi - V::load(sum + i)), dx + i, lanes);
      });
    }
  }
}

// ---- a few columns, classes side by side --------------------------------------------------------------------------

// Columns that fill no whole vectors: so many classes are taken for one row of columns that it does, 16 classes of 17
// columns for 17 vectors, which class by class are 32. 1: not worth it where they nearly fill them, in tiles.
constexpr int64_t kFewColumns = 64;
template <class A>
FASTNN_INLINE int64_t classes_abreast(const SoftmaxParams& p) {
  constexpr int64_t N = Vec<A>::N;
  const int64_t count = N / min64(N, p.inner & -p.inner), idle = round_up(p.inner, N) - p.inner;
  const bool worth = 4 * idle >= N || (idle > 0 && tile_width<A>(p.classes) == 0);
  return worth && N < p.inner && p.inner <= kFewColumns && 2 * count <= p.classes ? count : 1;
}

// One value per column and class abreast; a vector more may be touched.
template <class A>
struct Abreast {
  using V = Vec<A>;
  A lane[(kFewColumns + 1) * V::N];
  int64_t inner, count, width;

  FASTNN_VEC_FN Abreast(int64_t inner, int64_t count, A fill) : inner(inner), count(count), width(inner * count) {
    for (int64_t i = 0; i <= width; i += V::N) V::set1(fill).store(lane + i);
  }
  // Every lane becomes the reduction of its column.
  template <class Op>
  FASTNN_VEC_FN void join(const Op& op) {
    A joined[kFewColumns + V::N];
    for (int64_t i = 0; i < inner; i += V::N) {
      V v = V::load(lane + i);
      for (int64_t k = 1; k < count; ++k) v = op(v, V::load(lane + k * inner + i));
      v.store(joined + i);
    }
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < inner; i += V::N) V::load(joined + i).store(lane + k * inner + i);
  }
  // Calls f(offset, length) for every row of the n classes.
  template <class F>
  FASTNN_VEC_FN void for_rows(int64_t n, const F& f) const {
    for (int64_t at = 0; at < n * inner; at += width) f(at, min64(width, n * inner - at));
  }
};

template <class S>
FASTNN_INLINE void softmax_abreast(const S* x, S* y, int64_t n, int64_t inner, int64_t count, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const bool kept = kKeepsExp<S> && !log_form;
  Abreast<A> m(inner, count, kNegInf<A>), sum(inner, count, A(0));
  m.for_rows(n, [&](int64_t at, int64_t length) __attribute__((always_inline)) {
    for_vectors<V::N>(length, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      max(load_some(x + at + i, lanes, kNegInf<A>), V::load(m.lane + i)).store(m.lane + i);
    });
  });
  m.join([](V a, V b) { return max(a, b); });
  m.for_rows(n, [&](int64_t at, int64_t length) __attribute__((always_inline)) {
    for_exps<A>(
        length, [&](int64_t i, int lanes) { return load_some(x + at + i, lanes, kNegInf<A>) - V::load(m.lane + i); },
        [&](int64_t i, int lanes, int, V e) __attribute__((always_inline)) {
          if (kept) store_some(e, y + at + i, lanes);
          (V::load(sum.lane + i) + e).store(sum.lane + i);
        });
  });
  sum.join([](V a, V b) { return a + b; });
  for (int64_t i = 0; i < sum.width; i += V::N) {
    const V v = V::load(sum.lane + i);
    (log_form ? log(v) : V::set1(A(1)) / v).store(sum.lane + i);
  }
  m.for_rows(n, [&](int64_t at, int64_t length) __attribute__((always_inline)) {
    for_vectors<V::N>(length, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      const V of_column = V::load(sum.lane + i);
      if (kept) return store_some(load_some(y + at + i, lanes, A(0)) * of_column, y + at + i, lanes);
      const V z = load_some(x + at + i, lanes, A(0)) - V::load(m.lane + i);
      store_some(log_form ? z - of_column : exp(z) * of_column, y + at + i, lanes);
    });
  });
}

template <class S>
FASTNN_INLINE void backward_abreast(const S* g, const S* y, S* dx, int64_t n, int64_t inner, int64_t count,
                                    bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  Abreast<A> sum(inner, count, A(0));
  const auto at = [](const S* p, int64_t i, int lanes)
                      __attribute__((always_inline)) { return load_some(p + i, lanes, A(0)); };
  sum.for_rows(n, [&](int64_t row, int64_t length) __attribute__((always_inline)) {
    for_vectors<V::N>(length, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      const V gi = at(g, row + i, lanes), so_far = V::load(sum.lane + i);
      (log_form ? so_far + gi : fma(gi, at(y, row + i, lanes), so_far)).store(sum.lane + i);
    });
  });
  sum.join([](V a, V b) { return a + b; });
  sum.for_rows(n, [&](int64_t row, int64_t length) __attribute__((always_inline)) {
    if (log_form) {
      for_exps<A, true>(
          length, [&](int64_t i, int lanes) { return at(y, row + i, lanes); },
          [&](int64_t i, int lanes, int, V e) __attribute__((always_inline)) {
            store_some(at(g, row + i, lanes) - e * V::load(sum.lane + i), dx + row + i, lanes);
          });
    } else {
      for_vectors<V::N>(length, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
        const V gi = at(g, row + i, lanes);
        store_some(at(y, row + i, lanes) * (gi - V::load(sum.lane + i)), dx + row + i, lanes);
      });
    }
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Covers the input with calls of several(offset, n) for n elements of rows that share vectors, groups(offset, rows) for
// short rows, N at once, rows(offset, rows) for long ones, row(offset, n, step) for a few that take turns,
// abreast(offset, count) for a few columns with `count` classes side by side, or columns(offset, width) for a strip of
// `width` neighbouring columns.
template <class A, class Several, class Groups, class Rows, class Row, class Abreast, class Columns>
void for_rows(const SoftmaxParams& p, int64_t width, const Several& several, const Groups& groups, const Rows& rows,
              const Row& row, const Abreast& abreast, const Columns& columns) {
  constexpr int N = Vec<A>::N;
  constexpr int64_t kGrainElements = 1 << 13, kFewRows = 4;
  const int64_t grain = max64(1, kGrainElements / max64(1, p.classes));
  if (p.inner == 1 && 2 * p.classes <= N) {
    parallel_for(0, p.outer, grain,
                 [&](int64_t begin, int64_t end) { several(begin * p.classes, (end - begin) * p.classes); });
  } else if (p.inner == 1 && p.classes <= kGroupClasses && (p.classes <= N || p.outer > kFewRows)) {
    parallel_for(0, ceil_div(p.outer, N), ceil_div(grain, N), [&](int64_t begin, int64_t end) {
      groups(begin * N * p.classes, min64(end * N, p.outer) - begin * N);
    });
  } else if (kMaxAhead && p.inner == 1) {
    parallel_for(0, p.outer, grain, [&](int64_t begin, int64_t end) { rows(begin * p.classes, end - begin); });
  } else if (p.inner <= N) {
    const int64_t n = p.classes * p.inner;
    const int step = turns<A>(p.inner);
    parallel_for(0, p.outer, ceil_div(grain, p.inner), [&](int64_t begin, int64_t end) {
      if (step == N) {
        for (int64_t r = begin; r < end; ++r) row(r * n, n, N);
      } else {
        for (int64_t r = begin; r < end; ++r) row(r * n, n, step);
      }
    });
  } else if (const int64_t count = classes_abreast<A>(p); count > 1) {
    parallel_for(0, p.outer, ceil_div(grain, p.inner), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) abreast(i * p.classes * p.inner, count);
    });
  } else {
    const int64_t strips = ceil_div(p.inner, width);
    parallel_for(0, p.outer * strips, max64(1, grain / width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % strips * width;
        columns(i / strips * p.classes * p.inner + column, min64(width, p.inner - column));
      }
    });
  }
}

}  // namespace

Status softmax_forward(const SoftmaxParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    for_rows<acc_t<S>>(
        p, columns_together<acc_t<S>>(p.classes),
        [&](int64_t at, int64_t n) { softmax_short(x + at, y + at, n, p.classes, p.log); },
        [&](int64_t at, int64_t rows) { softmax_groups(x + at, y + at, p.classes, rows, p.log); },
        [&](int64_t at, int64_t rows) { softmax_long(x + at, y + at, p.classes, rows, p.log); },
        [&](int64_t at, int64_t n, int step)
            __attribute__((always_inline)) { softmax_row(x + at, y + at, n, p.inner, step, p.log); },
        [&](int64_t at, int64_t count) { softmax_abreast(x + at, y + at, p.classes, p.inner, count, p.log); },
        [&](int64_t at, int64_t width) { softmax_columns(x + at, y + at, p.classes, p.inner, width, p.log); });
    return Status::ok;
  });
}

Status softmax_backward(const SoftmaxParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* g = static_cast<const S*>(p.grad_output);
    const S* y = static_cast<const S*>(p.result);
    S* dx = static_cast<S*>(p.grad_input);
    for_rows<acc_t<S>>(
        p, strip_width(p.classes),
        [&](int64_t at, int64_t n) { backward_short(g + at, y + at, dx + at, n, p.classes, p.log); },
        [&](int64_t at, int64_t rows) {
          constexpr int64_t N = Vec<acc_t<S>>::N;
          for (int64_t r = 0, n = p.classes; r < rows; r += N, at += N * n)
            backward_group(g + at, y + at, dx + at, n, int(min64(N, rows - r)), p.log);
        },
        [&](int64_t at, int64_t rows) {
          for (int64_t r = 0, n = p.classes; r < rows; ++r, at += n)
            backward_row(g + at, y + at, dx + at, n, 1, Vec<acc_t<S>>::N, p.log);
        },
        [&](int64_t at, int64_t n, int step)
            __attribute__((always_inline)) { backward_row(g + at, y + at, dx + at, n, p.inner, step, p.log); },
        [&](int64_t at, int64_t count) { backward_abreast(g + at, y + at, dx + at, p.classes, p.inner, count, p.log); },
        [&](int64_t at, int64_t width) {
          backward_columns(g + at, y + at, dx + at, p.classes, p.inner, width, p.log);
        });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
