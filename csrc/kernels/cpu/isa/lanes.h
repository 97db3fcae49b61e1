// Parts of a vector: the lanes at the end of a row, even and odd lanes.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// ---- lanes at the end of a row ---------------------------------------------------------------------------------------

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

// ---- even and odd lanes ----------------------------------------------------------------------------------------------

// Even (odd) lanes of a, then of b; and back: a0 b0 a1 b1 ... from the lower (upper) halves.
template <class A>
FASTNN_INLINE Vec<A> evens(Vec<A> a, Vec<A> b) {
  if constexpr (Vec<A>::N == 2) return {__builtin_shufflevector(a.v, b.v, 0, 2)};
  else if constexpr (Vec<A>::N == 4) return {__builtin_shufflevector(a.v, b.v, 0, 2, 4, 6)};
  else if constexpr (Vec<A>::N == 8) return {__builtin_shufflevector(a.v, b.v, 0, 2, 4, 6, 8, 10, 12, 14)};
  else return {__builtin_shufflevector(a.v, b.v, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)};
}
template <class A>
FASTNN_INLINE Vec<A> odds(Vec<A> a, Vec<A> b) {
  if constexpr (Vec<A>::N == 2) return {__builtin_shufflevector(a.v, b.v, 1, 3)};
  else if constexpr (Vec<A>::N == 4) return {__builtin_shufflevector(a.v, b.v, 1, 3, 5, 7)};
  else if constexpr (Vec<A>::N == 8) return {__builtin_shufflevector(a.v, b.v, 1, 3, 5, 7, 9, 11, 13, 15)};
  else return {__builtin_shufflevector(a.v, b.v, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}
template <class A>
FASTNN_INLINE Vec<A> interleave_low(Vec<A> a, Vec<A> b) {
  if constexpr (Vec<A>::N == 2) return {__builtin_shufflevector(a.v, b.v, 0, 2)};
  else if constexpr (Vec<A>::N == 4) return {__builtin_shufflevector(a.v, b.v, 0, 4, 1, 5)};
  else if constexpr (Vec<A>::N == 8) return {__builtin_shufflevector(a.v, b.v, 0, 8, 1, 9, 2, 10, 3, 11)};
  else return {__builtin_shufflevector(a.v, b.v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)};
}
template <class A>
FASTNN_INLINE Vec<A> interleave_high(Vec<A> a, Vec<A> b) {
  if constexpr (Vec<A>::N == 2) return {__builtin_shufflevector(a.v, b.v, 1, 3)};
  else if constexpr (Vec<A>::N == 4) return {__builtin_shufflevector(a.v, b.v, 2, 6, 3, 7)};
  else if constexpr (Vec<A>::N == 8) return {__builtin_shufflevector(a.v, b.v, 4, 12, 5, 13, 6, 14, 7, 15)};
  else return {__builtin_shufflevector(a.v, b.v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
