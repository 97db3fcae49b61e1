// Sweeps over one row of classes, or over N neighbouring columns of rows, shared by softmax and the losses.
#pragma once
#include "math.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Applies f to each vector of N lanes along [0, count): f(offset, lanes), lanes == N but for the tail.
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

// The first `lanes` lanes, zero in the others.
template <class A>
FASTNN_INLINE Vec<A> first_lanes(Vec<A> v, int lanes) {
  for (int i = 0; i < Vec<A>::N; ++i) v.v[i] = i < lanes ? v.v[i] : A(0);
  return v;
}

// An integer in every lane.
template <class A>
FASTNN_INLINE typename Vec<A>::Int every_lane(int64_t i) {
  using Lane = decltype(typename Vec<A>::Int{}[0] + 0);
  return typename Vec<A>::Int{} + Lane(i);
}

template <class A>
constexpr A kNegInf = -__builtin_inf();

template <class S, class A = acc_t<S>>
FASTNN_INLINE A row_max(const S* x, int64_t n) {
  using V = Vec<A>;
  V vmax = V::set1(kNegInf<A>);
  for_vectors<V::N>(n, [&](int64_t i, int lanes) { vmax = max(load_some(x + i, lanes, kNegInf<A>), vmax); });
  return reduce_max(vmax);
}

template <class S, class A = acc_t<S>>
FASTNN_INLINE A row_sum_exp(const S* x, int64_t n, A m) {
  using V = Vec<A>;
  V vsum = V::zero();
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    vsum = vsum + exp(load_some(x + i, lanes, kNegInf<A>) - V::set1(m));
  });
  return reduce_add(vsum);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
