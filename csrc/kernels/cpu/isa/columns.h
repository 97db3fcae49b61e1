// Sweeps over neighbouring columns, each a row whose classes lie apart, shared by softmax and the losses.
#pragma once
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

constexpr int64_t kMaxStrip = 512;

// Neighbouring columns swept together: whole cache lines, and classes x columns that stay in L2. With more classes than
// that allows, wide strips that stream: narrow ones of 4096 x 1024 logits, all of them in a few sets of every cache,
// took eight times as long.
FASTNN_INLINE constexpr int64_t strip_width(int64_t classes) {
  constexpr int64_t kElements = 1 << 15;
  return classes > kElements / 64 ? kMaxStrip : min64(kMaxStrip, kElements / max64(1, classes) / 64 * 64);
}

// Columns copied before they are worked on, as many as L1 holds with the copy: where they lie, classes a power of two
// apart share a few sets of it. None with many classes.
constexpr int64_t kTileBytes = 1 << 15;
template <class A>
constexpr int64_t kTileColumns = kUnroll * Vec<A>::N;  // at least
template <class A>
FASTNN_INLINE constexpr int64_t tile_width(int64_t classes) {
  const int64_t column = max64(1, classes) * sizeof(A);
  int64_t width = kTileColumns<A> * column > kTileBytes ? 0 : kTileColumns<A>;
  while (0 < width && width < kMaxStrip && 2 * width * column <= kTileBytes / 4 * 3) width *= 2;
  return width;
}

// How many of neighbouring columns are swept together.
template <class A>
FASTNN_INLINE constexpr int64_t columns_together(int64_t classes) {
  return tile_width<A>(classes) > 0 ? tile_width<A>(classes) : strip_width(classes);
}

// `width` columns of n classes, `inner` apart, as many vectors of them at a time as keep their maxima in registers:
// they are copied to `tile`, and their exponentials replace them there with `keep`. take(Vectors<K>, column, class,
// values) sees the copy of every class, done(Vectors<K>, column, maxima, sums of exp(x - maximum)) follows, and
// write(first column, columns, tile, elements between its classes) comes last: after every group, or after all of them
// where classes share cache sets, to write longer runs. Meanwhile the caches fetch what is read next (4x21x4000: 0.8 of
// the time; further ahead L1 has lost it again) and what is written.
template <class S, class A, class Take, class Done, class Write>
FASTNN_INLINE void for_tile(const S* x, int64_t n, int64_t inner, int64_t width, A* tile, bool keep, const S* written,
                            const Take& take, const Done& done, const Write& write) {
  using V = Vec<A>;
  const bool wide = inner * int64_t(sizeof(S)) % 4096 == 0;
  const int64_t stride = wide ? round_up(width, V::N) : kTileColumns<A>;
  for_groups<V::N>(width, [&](auto vectors, int64_t i, int last) __attribute__((always_inline)) {
    constexpr int K = vectors.count;
    A* const copy = wide ? tile + i : tile;
    V top[K], total[K] = {};
    each<K>([&](int k) { top[k] = V::set1(kNegInf<A>); });
    for (int64_t c = 0; c < n; ++c) {
      V v[K];
      each<K>([&](int k) __attribute__((always_inline)) {
        v[k] = V{in_register(load_some(x + c * inner + i + k * V::N, k + 1 < K ? int(V::N) : last, A(0)).v)};
        v[k].store(copy + c * stride + k * V::N);
        top[k] = max(v[k], top[k]);
      });
      take(vectors, i, c, v);
    }
    for (int64_t c = 0; c < n; ++c) {
      A* const at = copy + c * stride;
      V e[K];
      each<K>([&](int k) { e[k] = V::load(at + k * V::N) - top[k]; });
      exp_each<K, false>(e);
      each<K>([&](int k) {
        if (keep) e[k].store(at + k * V::N);
        total[k] = total[k] + e[k];
        __builtin_prefetch(x + c * inner + i + kTileColumns<A> + k * V::N);
        if (written) __builtin_prefetch(written + c * inner + i + k * V::N, 1);
      });
    }
    done(vectors, i, top, total);
    if (!wide) write(i, (K - 1) * V::N + last, copy, stride);
  });
  if (wide) write(0, width, tile, stride);
}

// The same of `width` neighbouring columns where they lie, classes `inner` apart; calls keep(offset, lanes, e) with
// every exponential. Swept class by class: contiguous runs, where one vector walking down the classes would meet the
// same few cache sets again and again.
template <class S, class A = acc_t<S>, class F>
FASTNN_INLINE void strip_max_and_sum(const S* x, int64_t n, int64_t inner, int64_t width, A* m, A* sum, const F& keep) {
  using V = Vec<A>;
  for (int64_t i = 0; i < round_up(width, V::N); ++i) m[i] = kNegInf<A>, sum[i] = 0;
  for (int64_t c = 0; c < n; ++c) {
    for_vectors<V::N>(width, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      max(load_some(x + c * inner + i, lanes, A(0)), V::load(m + i)).store(m + i);
    });
  }
  for (int64_t c = 0; c < n; ++c) {
    for_exps<A>(
        width, [&](int64_t i, int lanes) { return load_some(x + c * inner + i, lanes, A(0)) - V::load(m + i); },
        [&](int64_t i, int lanes, int, V e) __attribute__((always_inline)) {
          keep(c * inner + i, lanes, e);
          (V::load(sum + i) + e).store(sum + i);
        });
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
