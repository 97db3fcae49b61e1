// exp(x - m) of numbers x up to a maximum m, as softmax and the losses sum it.
#pragma once
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// exps(x) turns K vectors into exp(x - m) times a factor of their own per lane, the same for all x, which a sum of them
// shares: it cancels in their ratio, and whole(sum) takes it off.
template <class A>
struct ExpBelow {
  using V = Vec<A>;
  V m;

  FASTNN_VEC_FN explicit ExpBelow(V m) : m(m) {}
  template <int K>
  FASTNN_VEC_FN void exps(V* x) const {
    each<K>([&](int k) { x[k] = x[k] - m; });
    exp_each<K, false>(x);
  }
  FASTNN_VEC_FN V whole(V sum) const { return sum; }
};

#if defined(__AVX512F__)
// The bits of 2^(j / 32) less j at the top of the mantissa, looked up by one shuffle.
alignas(64) constexpr int32_t kThirtySeconds[] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

// In float32 2^(x log2(e) - c) with c = m log2(e) to the nearest 32nd: five multiplications and five other operations
// where x - m and its exponential take seven and six, 0.72 of the time on Zen 4. The error is below 1.5 ulp and what
// log2(e) is rounded by, 1.4e-8 (m - x) of it; what is subnormal is not exact.
template <>
struct ExpBelow<float> {
  using V = Vec<float>;
  static constexpr float kLog2e = 0x1.715476p+0f;
  static constexpr float kRounder = 0x1.8p18f;  // adding it rounds to a 32nd
  static constexpr float kFar = 0x1p14f;        // beyond, its sum with c may be rounded
  V m, start, lowest;
  bool far;

  FASTNN_VEC_FN explicit ExpBelow(V m) : m(m) {
    far = _mm512_cmp_ps_mask(abs(m).v, V::set1(kFar).v, _CMP_NLT_UQ) != 0;
    begin(V{abs(m).v < kFar ? m.v : V::zero().v});
  }
  // Of one of the rows that take a lane each, stored in `from`.
  template <class Rows>
  FASTNN_VEC_FN ExpBelow(const Rows& from, int r)
      : m(V::set1(from.m[r])), start(V::set1(from.start[r])), lowest(V::set1(from.lowest[r])), far(from.far) {}

  template <int K>
  FASTNN_VEC_FN void exps(V* x) const {
    if (far) [[unlikely]]
      each<K>([&](int k) { x[k].v = abs(m).v < kFar ? x[k].v : (x[k] - m).v; });
    // (2^f - 1) / f = kSlope + kCurve f where |f| <= 1/64, within 2^-24.
    constexpr float kSlope = 0x1.62e584p-1f, kCurve = 0x1.ebfd0cp-3f;
    const __m512i low = _mm512_load_si512(kThirtySeconds), high = _mm512_load_si512(kThirtySeconds + 16);
    f32v bits[K], f[K], p[K], power[K];
    each<K>([&](int k) { x[k] = max(lowest, x[k]); });  // NaN stays
    each<K>([&](int k) { bits[k] = x[k].v * kLog2e + start.v; });
    each<K>([&](int k) { f[k] = bits[k] - start.v; });
    each<K>([&](int k) { f[k] = x[k].v * kLog2e - f[k]; });
    each<K>([&](int k) { p[k] = f[k] * kCurve + kSlope; });
    each<K>([&](int k) { power[k] = (f32v)_mm512_permutex2var_epi32(low, (__m512i)bits[k], high); });
    each<K>([&](int k) { power[k] = (f32v)((i32v)power[k] + ((i32v)bits[k] << 18)); });
    each<K>([&](int k) { p[k] = p[k] * f[k]; });
    each<K>([&](int k) { x[k] = {power[k] * p[k] + power[k]}; });
  }
  FASTNN_VEC_FN V whole(V sum) const {
    V own = m;
    exps<1>(&own);
    return sum / own;
  }

 private:
  FASTNN_VEC_FN void begin(V top) {
    start = V{V::set1(kRounder).v - top.v * kLog2e};
    // 2^-127, whose bits are those of zero.
    lowest = V{(V::set1(kRounder - 127).v - start.v) * (1 / kLog2e)};
  }
};
#endif

// The maxima of N rows, one per lane, and each row's exponentials.
template <class A>
struct ExpBelowRows {
  using V = Vec<A>;
  ExpBelow<A> all;
  A m[V::N];
  FASTNN_VEC_FN explicit ExpBelowRows(V maxima) : all(maxima) { all.m.store(m); }
  FASTNN_VEC_FN ExpBelow<A> row(int r) const { return ExpBelow<A>(V::set1(m[r])); }
};
#if defined(__AVX512F__)
template <>
struct ExpBelowRows<float> {
  using V = Vec<float>;
  ExpBelow<float> all;
  float m[V::N], start[V::N], lowest[V::N];
  bool far;
  FASTNN_VEC_FN explicit ExpBelowRows(V maxima) : all(maxima), far(all.far) {
    all.m.store(m), all.start.store(start), all.lowest.store(lowest);
  }
  FASTNN_VEC_FN ExpBelow<float> row(int r) const { return ExpBelow<float>(*this, r); }
};
#endif

// Calls f(offset, lanes, k, e) for each vector along [0, count), e being the exponentials of x(offset, lanes); k in
// [0, kUnroll).
template <class A, class X, class F>
FASTNN_INLINE void for_exps_below(const ExpBelow<A>& below, int64_t count, const X& x, const F& f,
                                  int step = Vec<A>::N) {
  for_groups<Vec<A>::N>(
      count,
      [&](auto vectors, int64_t i, int last) __attribute__((always_inline)) {
        constexpr int K = vectors.count;
        Vec<A> e[K];
        each<K>([&](int k) __attribute__((always_inline)) { e[k] = x(i + k * step, k + 1 < K ? step : last); });
        below.template exps<K>(e);
        each<K>([&](int k) __attribute__((always_inline)) { f(i + k * step, k + 1 < K ? step : last, k, e[k]); });
      },
      step);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
