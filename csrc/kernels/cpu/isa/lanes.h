// Parts of a vector: the lanes at the end of a row, lanes picked from two vectors.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// v, a compiler vector, loaded here and not again at every use: for loads that cross a cache line or miss L1.
template <class Raw>
FASTNN_INLINE Raw in_register(Raw v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

// ---- lanes at the end of a row --------------------------------------------------------------------------------------

// The first `left` lanes when left is below N, all of them when not; none when left <= 0.
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_upto(const S* p, int64_t left) {
  if (left >= Vec<A>::N) return Vec<A>::load(p);
  return left > 0 ? Vec<A>::load_n(p, left) : Vec<A>::zero();
}
template <class S, class A>
FASTNN_INLINE void store_upto(Vec<A> v, S* p, int64_t left) {
  if (left >= Vec<A>::N) v.store(p);
  else if (left > 0) v.store_n(p, left);
}

// ---- lanes of two vectors ------------------------------------------------------------------------------------------

template <int... I>
struct LaneNumbers {};
template <int N, int... I>
struct LaneNumbersTo : LaneNumbersTo<N - 1, N - 1, I...> {};
template <int... I>
struct LaneNumbersTo<0, I...> {
  using type = LaneNumbers<I...>;
};

// Lane i of the result is lane kFrom(i, N) of a and b one behind the other.
template <auto kFrom, class A, int... I>
FASTNN_INLINE Vec<A> pick_lanes(Vec<A> a, Vec<A> b, LaneNumbers<I...>) {
  return {__builtin_shufflevector(a.v, b.v, kFrom(I, Vec<A>::N)...)};
}
template <auto kFrom, class A>
FASTNN_INLINE Vec<A> pick_lanes(Vec<A> a, Vec<A> b) {
  return pick_lanes<kFrom>(a, b, typename LaneNumbersTo<Vec<A>::N>::type{});
}

// Even (odd) lanes of a, then of b; and back: a0 b0 a1 b1 ... from the lower (upper) halves.
template <class A>
FASTNN_INLINE Vec<A> evens(Vec<A> a, Vec<A> b) {
  return pick_lanes<[](int i, int) { return 2 * i; }>(a, b);
}
template <class A>
FASTNN_INLINE Vec<A> odds(Vec<A> a, Vec<A> b) {
  return pick_lanes<[](int i, int) { return 2 * i + 1; }>(a, b);
}
template <class A>
FASTNN_INLINE Vec<A> interleave_low(Vec<A> a, Vec<A> b) {
  return pick_lanes<[](int i, int n) { return i / 2 + i % 2 * n; }>(a, b);
}
template <class A>
FASTNN_INLINE Vec<A> interleave_high(Vec<A> a, Vec<A> b) {
  return pick_lanes<[](int i, int n) { return (n + i) / 2 + i % 2 * n; }>(a, b);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
