// Softmax and log-softmax over the middle dimension of [outer, classes, inner].
#include "../../softmax.h"

#include "../../parallel.h"
#include "isa.h"
#include "math.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// Applies f to each vector of n lanes along [0, count): f(offset, lanes), lanes == N but for the tail.
template <int N, class F>
FASTNN_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + N <= count; i += N) f(i, N);
  if (i < count) f(i, int(count - i));
}

template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_some(const S* p, int lanes, A fill) {
  return lanes == Vec<A>::N ? Vec<A>::load(p) : Vec<A>::load_n(p, lanes, fill);
}
template <class S, class A>
FASTNN_INLINE void store_some(Vec<A> v, S* p, int lanes) {
  if (lanes == Vec<A>::N) v.store(p);
  else v.store_n(p, lanes);
}

template <class A>
constexpr A kNegInf = -__builtin_inf();

// One contiguous row. Three sweeps over a row that stays in L1/L2: max, sum of exp, write.
template <class S>
void softmax_row(const S* x, S* y, int64_t n, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V vmax = V::set1(kNegInf<A>);
  for_vectors<V::N>(n, [&](int64_t i, int lanes) { vmax = max(load_some(x + i, lanes, kNegInf<A>), vmax); });
  const A m = reduce_max(vmax);
  V vsum = V::zero();
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    vsum = vsum + exp(load_some(x + i, lanes, kNegInf<A>) - V::set1(m));
  });
  const A sum = reduce_add(vsum);
  if (log_form) {
    const V shift = V::set1(log(sum));
    for_vectors<V::N>(n, [&](int64_t i, int lanes) {
      store_some((load_some(x + i, lanes, A(0)) - V::set1(m)) - shift, y + i, lanes);
    });
  } else {
    const V scale = V::set1(A(1) / sum);
    for_vectors<V::N>(n, [&](int64_t i, int lanes) {
      store_some(exp(load_some(x + i, lanes, A(0)) - V::set1(m)) * scale, y + i, lanes);
    });
  }
}

// N neighbouring columns of a [classes, inner] slab, each lane a row of its own.
template <class S>
void softmax_columns(const S* x, S* y, int64_t n, int64_t inner, int lanes, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V m = V::set1(kNegInf<A>);
  for (int64_t c = 0; c < n; ++c) m = max(load_some(x + c * inner, lanes, A(0)), m);
  V sum = V::zero();
  for (int64_t c = 0; c < n; ++c) sum = sum + exp(load_some(x + c * inner, lanes, A(0)) - m);
  if (log_form) {
    V shift = sum;
    for (int i = 0; i < V::N; ++i) shift.v[i] = log(sum.v[i]);
    for (int64_t c = 0; c < n; ++c)
      store_some((load_some(x + c * inner, lanes, A(0)) - m) - shift, y + c * inner, lanes);
  } else {
    const V scale = V::set1(A(1)) / sum;
    for (int64_t c = 0; c < n; ++c)
      store_some(exp(load_some(x + c * inner, lanes, A(0)) - m) * scale, y + c * inner, lanes);
  }
}

// softmax: dx = y (g - sum(g y));  log_softmax: dx = g - exp(y) sum(g).
template <class S>
void softmax_row_backward(const S* g, const S* y, S* dx, int64_t n, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V vsum = V::zero();
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    const V gi = load_some(g + i, lanes, A(0));
    vsum = log_form ? vsum + gi : fma(gi, load_some(y + i, lanes, A(0)), vsum);
  });
  const V sum = V::set1(reduce_add(vsum));
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    const V gi = load_some(g + i, lanes, A(0)), yi = load_some(y + i, lanes, A(0));
    store_some(log_form ? gi - exp(yi) * sum : yi * (gi - sum), dx + i, lanes);
  });
}

template <class S>
void softmax_columns_backward(const S* g, const S* y, S* dx, int64_t n, int64_t inner, int lanes, bool log_form) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V sum = V::zero();
  for (int64_t c = 0; c < n; ++c) {
    const V gi = load_some(g + c * inner, lanes, A(0));
    sum = log_form ? sum + gi : fma(gi, load_some(y + c * inner, lanes, A(0)), sum);
  }
  for (int64_t c = 0; c < n; ++c) {
    const V gi = load_some(g + c * inner, lanes, A(0)), yi = load_some(y + c * inner, lanes, A(0));
    store_some(log_form ? gi - exp(yi) * sum : yi * (gi - sum), dx + c * inner, lanes);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls row(offset) for every row of classes, or columns(offset, lanes) for every group of neighbouring columns.
template <int N, class Row, class Columns>
void for_rows(const SoftmaxParams& p, const Row& row, const Columns& columns) {
  constexpr int64_t kGrainElements = 1 << 14;
  const int64_t grain = max64(1, kGrainElements / max64(1, p.classes));
  if (p.inner == 1) {
    parallel_for(0, p.outer, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(r * p.classes);
    });
    return;
  }
  const int64_t groups = ceil_div(p.inner, N);
  parallel_for(0, p.outer * groups, ceil_div(grain, N), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % groups * N;
      columns(i / groups * p.classes * p.inner + column, int(min64(N, p.inner - column)));
    }
  });
}

}  // namespace

Status softmax_forward(const SoftmaxParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    for_rows<Vec<acc_t<S>>::N>(
        p, [&](int64_t at) { softmax_row(x + at, y + at, p.classes, p.log); },
        [&](int64_t at, int lanes) { softmax_columns(x + at, y + at, p.classes, p.inner, lanes, p.log); });
    return Status::ok;
  });
}

Status softmax_backward(const SoftmaxParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* g = static_cast<const S*>(p.grad_output);
    const S* y = static_cast<const S*>(p.result);
    S* dx = static_cast<S*>(p.grad_input);
    for_rows<Vec<acc_t<S>>::N>(
        p, [&](int64_t at) { softmax_row_backward(g + at, y + at, dx + at, p.classes, p.log); },
        [&](int64_t at, int lanes) {
          softmax_columns_backward(g + at, y + at, dx + at, p.classes, p.inner, lanes, p.log);
        });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
