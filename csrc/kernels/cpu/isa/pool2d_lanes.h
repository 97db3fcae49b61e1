// Lanes for pooling: the comparison that keeps the first maximum and the last NaN, and window taps in vectors of bytes.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Calls f(offset, lanes) for each vector along [0, count): lanes == N but for the tail.
template <int N, class F>
FASTNN_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + N <= count; i += N) f(i, N);
  if (i < count) f(i, int(count - i));
}
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_some(const S* p, int lanes) {
  return lanes == Vec<A>::N ? Vec<A>::load(p) : Vec<A>::load_n(p, lanes);
}
template <class S, class A>
FASTNN_INLINE void store_some(Vec<A> v, S* p, int lanes) {
  if (lanes == Vec<A>::N) v.store(p);
  else v.store_n(p, lanes);
}

// torch's rule for a new maximum: larger than the best so far, or NaN.
template <class A>
FASTNN_INLINE typename Vec<A>::Int beats(Vec<A> v, Vec<A> best) {
  return (v.v > best.v) | (v.v != v.v);
}

// One vector of window taps as stored: uint8 or int32.
template <class A, class O>
struct TapVector {
  typedef O type __attribute__((vector_size(sizeof(O) * Vec<A>::N)));
};
template <class A, class O>
using TapBytes = typename TapVector<A, O>::type;
template <class A>
struct IntLane;
template <>
struct IntLane<float> {
  using type = int32_t;
};
template <>
struct IntLane<double> {
  using type = int64_t;
};

template <class A, class O>
FASTNN_INLINE TapBytes<A, O> load_taps_raw(const O* p, int lanes) {
  TapBytes<A, O> raw{};
  if (lanes == Vec<A>::N) __builtin_memcpy(&raw, p, sizeof(raw));
  else
    for (int i = 0; i < lanes; ++i) raw[i] = p[i];
  return raw;
}
template <class A, class O>
FASTNN_INLINE typename Vec<A>::Int load_taps(const O* p, int lanes) {
  return __builtin_convertvector((load_taps_raw<A, O>(p, lanes)), typename Vec<A>::Int);
}

// sum + (tap == code ? v : 0): a NaN in v stays in its lane.
template <class A>
FASTNN_INLINE Vec<A> add_where(Vec<A> sum, typename Vec<A>::Int taps, int64_t code, Vec<A> v) {
  using Raw = typename Vec<A>::Raw;
  using Lane = typename IntLane<A>::type;
  return {sum.v + (taps == Lane(code) ? v.v : Raw{})};
}

// The window tap each lane's best value came from.
template <class A>
struct Taps {
  using Int = typename Vec<A>::Int;
  using Lane = typename IntLane<A>::type;
  Int taps;

  FASTNN_VEC_FN explicit Taps(int64_t tap) : taps(Lane(tap) - Int{}) {}
  FASTNN_VEC_FN void update(Vec<A>& best, Vec<A> v, int64_t tap) {
    const Int take = beats(v, best);
    best.v = take ? v.v : best.v;
    taps = take ? Lane(tap) - Int{} : taps;
  }
  template <class O>
  FASTNN_VEC_FN void store(O* p, int lanes) const {
    const auto raw = __builtin_convertvector(taps, TapBytes<A, O>);
    if (lanes == Vec<A>::N) __builtin_memcpy(p, &raw, sizeof(raw));
    else
      for (int i = 0; i < lanes; ++i) p[i] = raw[i];
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA_NS
