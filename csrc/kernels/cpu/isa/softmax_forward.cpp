// Softmax and log-softmax over the middle dimension of [outer, classes, inner].
#include "isa.h"
#include "softmax.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// exp(x - max) may wait in y for its scale where y does not round it.
template <class S>
constexpr bool kKeepsExp = sizeof(S) > 2;

// ---- rows: the classes of a row are contiguous ----------------------------------------------------------------------

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
  const ExpBelow<A> below(m);
  if (kKeepsExp<S> && !log_form && step == V::N) {  // a load waits for a masked store before it
    const V sum = row_sum_exp(x, n, n, below, [&](int64_t i, int lanes, V e) { store_some(e, y + i, lanes); }, step);
    const V scale = V::set1(A(1)) / spread(sum, period, add);
    return write([&](int64_t i, int lanes) { return load_some(y + i, lanes, A(0)) * scale; });
  }
  const auto fetch = [&](int64_t i, int, V) { __builtin_prefetch(y + i, 1); };
  const V sum = below.whole(spread(row_sum_exp(x, n, n, below, fetch, step), period, add));
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
        row_scaled_exp(x, y, n, false, known, maximum, [](const auto&, A sum) { return A(1) / sum; });
        continue;
      }
    }
    const V m = V::set1(maximum);
    const ExpBelow<A> below(m);
    const auto fetch = [&](int64_t i, int, V) { __builtin_prefetch(y + i, 1); };
    const V sum = below.whole(V::set1(row_sum_exp_ahead(x, n, below, known, maximum, fetch)));
    const V of_row = log_form ? log(sum) : V::set1(A(1)) / sum;
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
  const auto write_log = [&](int64_t row, int r, int64_t i, int lanes) __attribute__((always_inline)) {
    const V z = load_some(x + row * n + i, lanes, A(0)) - V::set1(maxima[r]);
    store_some(z - V::set1(of_row[r]), y + row * n + i, lanes);
  };
  if (n <= V::N) {
    for (int64_t row = 0; row < rows; row += V::N) {
      const int count = int(min64(V::N, rows - row));
      if (!log_form) {
        group_scaled_exp(
            x + row * n, y + row * n, n, count, [](const auto&, V sum) { return V::set1(A(1)) / sum; },
            [](int64_t, V e) { return e; });
        continue;
      }
      V m, sum;
      group_max_and_sum(x + row * n, n, count, m, sum);
      m.store(maxima);
      log(sum).store(of_row);
      for (int r = 0; r < count; ++r) write_log(row + r, r, 0, int(n));
    }
    return;
  }
  GroupExps<A> exps;
  const auto sums = [&](int64_t, int, const auto& below, V sum) __attribute__((always_inline)) {
    below.m.store(maxima);
    (log_form ? log(below.whole(sum)) : V::set1(A(1)) / sum).store(of_row);
  };
  if (log_form) return for_short_rows<false>(x, n, rows, exps, sums, write_log);
  for_short_rows<true>(x, n, rows, exps, sums,
                       [&](int64_t row, int r, int64_t i, int lanes) __attribute__((always_inline)) {
                         const V e = V::load(exps.of_row + r * exps.stride + i);
                         store_some(e * V::set1(of_row[r]), y + row * n + i, lanes);
                       });
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

// ---- launcher -------------------------------------------------------------------------------------------------------

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

}  // namespace fastnn::cpu::FASTNN_ISA_NS
