// Gradients of softmax and log-softmax over the middle dimension of [outer, classes, inner].
// softmax: dx = y (g - sum(g y));  log_softmax: dx = g - exp(y) sum(g).
#include "isa.h"
#include "softmax.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// dx from y, g and what sum(offset) says of the rows of a vector.
template <class S, class Sum>
FASTNN_INLINE void write_gradient(const S* g, const S* y, S* dx, int64_t n, bool log_form, const Sum& sum,
                                  int step = Vec<acc_t<S>>::N) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const auto at = [](const S* p, int64_t i, int lanes)
                      __attribute__((always_inline)) { return load_some(p + i, lanes, A(0)); };
  if (log_form) {
    for_exps<A, true>(
        n, [&](int64_t i, int lanes) { return at(y, i, lanes); },
        [&](int64_t i, int lanes, int, V e)
            __attribute__((always_inline)) { store_some(at(g, i, lanes) - e * sum(i), dx + i, lanes); },
        step);
  } else {
    for_vectors<V::N>(
        n,
        [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
          const V gi = at(g, i, lanes);
          store_some(at(y, i, lanes) * (gi - sum(i)), dx + i, lanes);
        },
        step);
  }
}

// A row's sum, lane by lane.
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> row_sum(const S* g, const S* y, int64_t n, bool log_form, int step = Vec<A>::N) {
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

// Adds what n neighbouring columns have in one class to their sums.
template <class S, class A>
FASTNN_INLINE void add_to_sums(const S* g, const S* y, int64_t n, bool log_form, A* sum) {
  using V = Vec<A>;
  for_vectors<V::N>(n, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    const V gi = load_some(g + i, lanes, A(0)), so_far = V::load(sum + i);
    (log_form ? so_far + gi : fma(gi, load_some(y + i, lanes, A(0)), so_far)).store(sum + i);
  });
}

// ---- rows: the classes of a row are contiguous ----------------------------------------------------------------------

template <class S>
FASTNN_INLINE void backward_row(const S* g, const S* y, S* dx, int64_t n, int64_t period, int step, bool log_form) {
  using V = Vec<acc_t<S>>;
  const V sum = spread(row_sum(g, y, n, log_form, step), period, [](V a, V b) { return a + b; });
  write_gradient(g, y, dx, n, log_form, [&](int64_t) { return sum; }, step);
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
    v[r] = row_sum(g + at, y + at, n, log_form);
  }
  sum_rows(v).store(of_row);
  for (int r = 0; r < count; ++r)
    write_gradient(g + r * n, y + r * n, dx + r * n, n, log_form, [&](int64_t) { return V::set1(of_row[r]); });
}

// ---- columns: every lane is a row, its classes `inner` apart --------------------------------------------------------

template <class S>
FASTNN_INLINE void backward_columns(const S* g, const S* y, S* dx, int64_t n, int64_t inner, int64_t width,
                                    bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  A sum[kMaxStrip];
  for (int64_t i = 0; i < round_up(width, V::N); ++i) sum[i] = 0;
  for (int64_t at = 0; at < n * inner; at += inner) add_to_sums(g + at, y + at, width, log_form, sum);
  for (int64_t at = 0; at < n * inner; at += inner)
    write_gradient(g + at, y + at, dx + at, width, log_form, [&](int64_t i) { return V::load(sum + i); });
}

template <class S>
FASTNN_INLINE void backward_abreast(const S* g, const S* y, S* dx, int64_t n, int64_t inner, int64_t count,
                                    bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  Abreast<A> sum(inner, count, A(0));
  sum.for_rows(n, [&](int64_t at, int64_t length)
                      __attribute__((always_inline)) { add_to_sums(g + at, y + at, length, log_form, sum.lane); });
  sum.join([](V a, V b) { return a + b; });
  sum.for_rows(n, [&](int64_t at, int64_t length) __attribute__((always_inline)) {
    write_gradient(g + at, y + at, dx + at, length, log_form, [&](int64_t i) { return V::load(sum.lane + i); });
  });
}

// ---- launcher -------------------------------------------------------------------------------------------------------

}  // namespace

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
