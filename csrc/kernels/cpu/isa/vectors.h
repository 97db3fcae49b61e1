// Loops over neighbouring values in vectors, the last of which may be partial: loads, stores, exponentials, reductions.
#pragma once
#include "lanes.h"
#include "math.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

constexpr int kUnroll = 4;  // independent accumulators that hide the latency of max and +

// Applies f to each vector of `step` <= N lanes along [0, count): f(offset, lanes, k), lanes == step but for the tail,
// k in [0, kUnroll) the accumulator to use.
template <int N, class F>
FASTNN_INLINE void for_vectors(int64_t count, const F& f, int step = N) {
  int64_t i = 0;
  for (; i + kUnroll * step <= count; i += kUnroll * step) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnroll; ++k) f(i + k * step, step, k);
  }
  for (; i + step <= count; i += step) f(i, step, 0);
  if (i < count) f(i, int(count - i), 0);
}

template <int K>
struct Vectors {
  static constexpr int count = K;
};

// An integer in every lane.
template <class A>
FASTNN_INLINE typename Vec<A>::Int every_lane(int64_t i) {
  using Lane = decltype(typename Vec<A>::Int{}[0] + 0);
  return typename Vec<A>::Int{} + Lane(i);
}

// A mask of the first n lanes.
template <class A>
FASTNN_INLINE typename Vec<A>::Int lanes_below(int64_t n) {
  typename Vec<A>::Int iota;
  for (int l = 0; l < Vec<A>::N; ++l) iota[l] = l;
  return iota < every_lane<A>(n);
}

// The first `lanes` lanes, zero in the others.
template <class A>
FASTNN_INLINE Vec<A> first_lanes(Vec<A> v, int lanes) {
  return {lanes_below<A>(lanes) ? v.v : Vec<A>::zero().v};
}

// load_n and store_n by masked instructions wherever the ISA has them.
template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_first(const S* p, int64_t n, A fill) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const auto mask = lanes_below<A>(n);
  if constexpr (__is_same(S, float)) return {mask ? (f32v)_mm256_maskload_ps(p, (__m256i)mask) : Vec<A>::set1(fill).v};
  else if constexpr (__is_same(S, double))
    return {mask ? (f64v)_mm256_maskload_pd(p, (__m256i)mask) : Vec<A>::set1(fill).v};
#endif
  return Vec<A>::load_n(p, n, fill);
}
template <class S, class A>
FASTNN_INLINE void store_first(Vec<A> v, S* p, int64_t n) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (__is_same(S, float)) return _mm256_maskstore_ps(p, (__m256i)lanes_below<A>(n), v.v);
  else if constexpr (__is_same(S, double)) return _mm256_maskstore_pd(p, (__m256i)lanes_below<A>(n), v.v);
#endif
  v.store_n(p, n);
}

template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_some(const S* p, int lanes, A fill) {
  return lanes == Vec<A>::N ? Vec<A>::load(p) : load_first(p, lanes, fill);
}
template <class S, class A>
FASTNN_INLINE void store_some(Vec<A> v, S* p, int lanes) {
  if (lanes == Vec<A>::N) v.store(p);
  else store_first(v, p, lanes);
}

// Past the caches where the ISA can: whole, aligned vectors of float32. A thread ends them before others read.
template <class S, class A>
FASTNN_INLINE void stream(Vec<A> v, S* p) {
#if defined(__AVX512F__)
  if constexpr (__is_same(S, float)) return _mm512_stream_ps(p, v.v);
#elif defined(__AVX2__)
  if constexpr (__is_same(S, float)) return _mm256_stream_ps(p, v.v);
#endif
  v.store(p);
}
FASTNN_INLINE void end_streams([[maybe_unused]] bool streamed) {
#if defined(__AVX2__)
  if (streamed) _mm_sfence();
#endif
}

template <class A>
constexpr A kNegInf = -__builtin_inf();

// Calls f(Vectors<K>, i, last) for groups of K <= kUnroll vectors of `step` lanes along [0, count): vector k begins at
// i + k * step, and the last of the group has `last` lanes.
template <int N, class F>
FASTNN_INLINE void for_groups(int64_t count, const F& f, int step = N) {
  int64_t i = 0;
  for (; i + kUnroll * step <= count; i += kUnroll * step) f(Vectors<kUnroll>{}, i, step);
  const int left = int(count - i);
  if (left > 3 * step) f(Vectors<4>{}, i, left - 3 * step);
  else if (left > 2 * step) f(Vectors<3>{}, i, left - 2 * step);
  else if (left > step) f(Vectors<2>{}, i, left - step);
  else if (left > 0) f(Vectors<1>{}, i, left);
}

// Calls f(offset, lanes, k, e) for each vector along [0, count), e being exp(z(offset, lanes)); k in [0, kUnroll). z is
// negative, 0 but for a rounding or NaN, unless kAnySign.
template <class A, bool kAnySign = false, class Z, class F>
FASTNN_INLINE void for_exps(int64_t count, const Z& z, const F& f, int step = Vec<A>::N) {
  for_groups<Vec<A>::N>(
      count,
      [&](auto vectors, int64_t i, int last) __attribute__((always_inline)) {
        constexpr int K = vectors.count;
        Vec<A> e[K];
        each<K>([&](int k) __attribute__((always_inline)) { e[k] = z(i + k * step, k + 1 < K ? step : last); });
        exp_each<K, kAnySign>(e);
        each<K>([&](int k) __attribute__((always_inline)) { f(i + k * step, k + 1 < K ? step : last, k, e[k]); });
      },
      step);
}

template <class V, class Op>
FASTNN_INLINE V fold(const V (&v)[kUnroll], const Op& op) {
  return op(op(v[0], v[1]), op(v[2], v[3]));
}

// ---- N vectors reduced to one --------------------------------------------------------------------------------------

// One level of the tree: lanes whose index has bit d clear come from a, the others from b, neighbours at distance d
// reduced by op.
template <int d, class V, class Op>
FASTNN_INLINE V pair_lanes(V a, V b, const Op& op) {
  return op(pick_lanes<[](int i, int n) { return i & d ? n + i - d : i; }>(a, b),
            pick_lanes<[](int i, int n) { return i & d ? n + i : i + d; }>(a, b));
}

// Lane r of the result is v[r] reduced over its lanes: N - 1 shuffled operations instead of N log2(N). Overwrites v.
template <int d = 1, class V, class Op>
FASTNN_INLINE V reduce_rows(V* v, const Op& op) {
  if constexpr (d == V::N) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < V::N / (2 * d); ++i) v[i] = pair_lanes<d>(v[2 * i], v[2 * i + 1], op);
    return reduce_rows<2 * d>(v, op);
  }
}
template <class V>
FASTNN_INLINE V sum_rows(V* v) {
  return reduce_rows(v, [](V a, V b) { return a + b; });
}
template <class V>
FASTNN_INLINE V max_rows(V* v) {
  return reduce_rows(v, [](V a, V b) { return max(a, b); });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
