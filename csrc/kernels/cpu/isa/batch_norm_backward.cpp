// Batch norm backward: the sums of g and g (x - mean) of every channel, then one sweep that writes the gradient. That
// of a residual is g itself: the sums' pass writes it, and the sweep reads it in place of grad_output and result.
#include "batch_norm.h"
#include "isa.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// grad_input = g * scale - (x - mean) * slope - offset, g being the gradient
// behind the ReLU. Evaluation: slope, offset 0. One element per channel.
template <class A>
struct Coefficients {
  A *scale, *slope, *offset;
};

// The parameters' gradients and the coefficients of `count` channels from `first` on. P: the parameters' type.
template <class P, class A>
FASTNN_INLINE void finish_channels_of(const BatchNormParams& p, int64_t first, int64_t count, const double* sum,
                                      const double* dot, Coefficients<A> out) {
  const A* invstds = static_cast<const A*>(p.invstd) + first;
  const P* weight = p.weight ? static_cast<const P*>(p.weight) + first : nullptr;
  P* grad_weight = p.grad_weight ? static_cast<P*>(p.grad_weight) + first : nullptr;
  P* grad_bias = p.grad_bias ? static_cast<P*>(p.grad_bias) + first : nullptr;
  const double share = p.training ? 1 / (double(p.batch) * double(p.inner)) : 0;
  const auto finish = [&](int64_t c, auto one) __attribute__((always_inline)) {
    using D = decltype(one);
    const D sums = load_doubles<D>(sum + c), invstd = load_doubles<D>(invstds + c);
    const D scale = weight ? invstd * load_doubles<D>(weight + c) : invstd;
    const D normalised = invstd * load_doubles<D>(dot + c);
    if (grad_weight) store_doubles(normalised, grad_weight + c);
    if (grad_bias) store_doubles(sums, grad_bias + c);
    store_doubles(scale, out.scale + c);
    store_doubles(scale * share * invstd * normalised, out.slope + c);
    store_doubles(scale * share * sums, out.offset + c);
  };
  int64_t c = 0;
  for (; c + kDoubles <= count; c += kDoubles) finish(c, f64v{});
  for (; c < count; ++c) finish(c, 0.0);
}
template <class S, class A = acc_t<S>>
FASTNN_INLINE void finish_channels(const BatchNormParams& p, int64_t first, int64_t count, const double* sum,
                                   const double* dot, Coefficients<A> out) {
  if (p.param_dtype == p.dtype) finish_channels_of<S>(p, first, count, sum, dot, out);
  else finish_channels_of<A>(p, first, count, sum, dot, out);
}

bool needs_sums(const BatchNormParams& p) {
  return p.grad_weight || p.grad_bias || p.grad_residual || (p.training && p.grad_input);
}

// What the sweep reads once the sums' pass has written the residual's gradient.
BatchNormParams behind_residual(const BatchNormParams& p) {
  BatchNormParams rest = p;
  if (p.grad_residual) rest.grad_output = p.grad_residual, rest.result = nullptr;
  return rest;
}

// ---- one vector ----------------------------------------------------------------------------------------------------

// What the ReLU let pass: no ReLU, y is read, or y is computed again, as forward did. Not in rows of channels, where
// that takes two more vectors of coefficients for every one of x.
enum class Mask { none, read, computed };
template <bool kPlanes, class F>
FASTNN_INLINE void with_mask(const BatchNormParams& p, const F& f) {
  if (!p.result) return f(Mask::none);
  if constexpr (kPlanes)
    if (p.affine) return f(Mask::computed);
  f(Mask::read);
}

// Calls f(mask, keep) for the sums' pass: whether it writes the residual's gradient, where there is a ReLU behind it.
template <bool kPlanes, class F>
FASTNN_INLINE void with_sums(const BatchNormParams& p, const F& f) {
  if (p.grad_residual) f(Mask::read, true);
  else with_mask<kPlanes>(p, [&](Mask mask) __attribute__((always_inline)) { f(mask, false); });
}

// y = (x - mean) * scale + offset.
template <class V>
struct Affine {
  V mean, scale, offset;
};

template <class V>
FASTNN_INLINE Affine<V> only_mean(V mean) {
  return {mean, V::zero(), V::zero()};
}
template <class A, class V = Vec<A>>
FASTNN_INLINE Affine<V> affine_of(const BatchNormParams& p, Mask mask, int64_t c) {
  const V mean = V::set1(static_cast<const A*>(p.mean)[c]);
  if (mask != Mask::computed) return only_mean(mean);
  const A* affine = static_cast<const A*>(p.affine) + c;
  return {mean, V::set1(affine[0]), V::set1(affine[p.channels])};
}

// The one or the other, lane by lane.
template <class V>
FASTNN_INLINE V pick(typename V::Int mask, V a, V b) {
  return {mask ? a.v : b.v};
}
template <class V>
FASTNN_INLINE Affine<V> pick(typename V::Int mask, const Affine<V>& a, const Affine<V>& b) {
  return {pick(mask, a.mean, b.mean), pick(mask, a.scale, b.scale), pick(mask, a.offset, b.offset)};
}

// The gradient that arrives behind the ReLU; y <= 0 stops it.
template <class S, class V>
FASTNN_INLINE V load_gradient(Mask mask, const S* g, const S* x, const S* y, int lanes, const Affine<V>& k) {
  const V v{in_register(load_lanes(g, lanes).v)};
  if (mask == Mask::none) return v;
  const V result = mask == Mask::read ? load_lanes(y, lanes) : fma(load_lanes(x, lanes) - k.mean, k.scale, k.offset);
  return {result.v <= 0 ? V::zero().v : v.v};
}

// The same in the sums' pass, which keeps it where it is the residual's gradient.
template <class S, class V>
FASTNN_INLINE V take_gradient(Mask mask, const S* g, const S* x, const S* y, S* residual, int lanes,
                              const Affine<V>& k) {
  const V v = load_gradient(mask, g, x, y, lanes, k);
  if (residual) store_lanes(v, residual, lanes);
  return v;
}

// Calls f(mask, statistics): whether the gradient goes through the statistics too, as constants inside the loops.
template <bool kPlanes, class F>
FASTNN_INLINE void with_terms(const BatchNormParams& p, const F& f) {
  with_mask<kPlanes>(
      p, [&](Mask mask) __attribute__((always_inline)) { return p.training ? f(mask, true) : f(mask, false); });
}

template <bool kStream, class S, class V>
FASTNN_INLINE void write_lanes(Mask mask, bool statistics, const S* g, const S* x, const S* y, S* dx, int lanes,
                               const Affine<V>& forward, V scale, V slope, V offset) {
  const V v = load_gradient(mask, g, x, y, lanes, forward);
  if (!statistics) return store_lanes<kStream>(v * scale, dx, lanes);
  store_lanes<kStream>(V{v.v * scale.v - offset.v - (load_lanes(x, lanes) - forward.mean).v * slope.v}, dx, lanes);
}

// ---- [batch, channels, inner] --------------------------------------------------------------------------------------

// Adds a row of each of `count` neighbouring channels from `first` on to their sums: short rows, the first one `begin`
// elements into the tensors.
template <class S, class V = Vec<acc_t<S>>>
FASTNN_INLINE void add_short_rows(const BatchNormParams& p, Mask mask, bool keep, int64_t begin, int64_t length,
                                  int64_t first, int64_t count, V* totals, V* dots) {
  const S *g = static_cast<const S*>(p.grad_output), *x = static_cast<const S*>(p.input);
  const S* y = static_cast<const S*>(p.result);
  S* const dr = static_cast<S*>(p.grad_residual);
  const int64_t inner = p.inner;
  for (int64_t c = 0; c < count; ++c, begin += inner) {
    V s = totals[c], d = dots[c];
    const auto k = affine_of<acc_t<S>>(p, mask, first + c);
    for_short<V::N>(begin, length, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const int64_t at = begin + i;
      const V v = take_gradient(mask, g + at, x + at, y + at, keep ? dr + at : nullptr, lanes, k);
      s = s + v;
      d = fma(v, load_lanes(x + at, lanes) - k.mean, d);
    });
    totals[c] = s, dots[c] = d;
  }
}

// The first n lanes where they lie in memory behind those of another row: the same sums wherever a group begins.
template <class V>
FASTNN_INLINE V to_end(V v, int n) {
  typename V::Int lane;
  for (int l = 0; l < V::N; ++l) lane[l] = (l + n) % V::N;
  return {__builtin_shuffle(v.v, lane)};
}

// The same where is_joined().
template <class S, class V = Vec<acc_t<S>>>
FASTNN_INLINE void add_joined_rows(const BatchNormParams& p, Mask mask, bool keep, int64_t begin, int64_t first,
                                   int64_t count, V* totals, V* dots) {
  using A = acc_t<S>;
  const S *g = static_cast<const S*>(p.grad_output) + begin, *x = static_cast<const S*>(p.input) + begin;
  const S* y = static_cast<const S*>(p.result) + (mask == Mask::read ? begin : 0);
  S* const dr = static_cast<S*>(p.grad_residual) + (keep ? begin : 0);
  for_joined<V::N>(begin, p.inner, count, [&](int64_t c, const auto& vectors) __attribute__((always_inline)) {
    V s = totals[c], d = dots[c];
    const auto k = affine_of<A>(p, mask, first + c);
    vectors(
        [&](int64_t i, int lanes) __attribute__((always_inline)) {
          V v = take_gradient(mask, g + i, x + i, y + i, keep ? dr + i : nullptr, lanes, k);
          V z = load_lanes(x + i, lanes) - k.mean;
          if (i == 0 && lanes < V::N) v = to_end(v, lanes), z = to_end(z, lanes);
          s = s + v;
          d = fma(v, z, d);
        },
        [&](int64_t i, int64_t left) __attribute__((always_inline)) {
          // The other row's lanes are left out, not multiplied by zero: they may be infinite.
          const auto ends = lanes_below<A>(left);
          const auto next = affine_of<A>(p, mask, first + c + 1);
          const auto both = pick(ends, k, next);
          const V v = take_gradient(mask, g + i, x + i, y + i, keep ? dr + i : nullptr, V::N, both);
          const V z = load_lanes(x + i, V::N);
          // In registers, for whole stores: the loads of the next row would wait for masked ones.
          totals[c + 1] = V{in_register(pick(ends, totals[c + 1], totals[c + 1] + v).v)};
          dots[c + 1] = V{in_register(pick(ends, dots[c + 1], fma(v, z - next.mean, dots[c + 1])).v)};
          s = pick(ends, s + v, s);
          d = pick(ends, fma(v, z - k.mean, d), d);
        });
    totals[c] = s, dots[c] = d;
  });
}

// Adds the sums of `count` neighbouring channels from `first` on.
template <class S>
void channel_sums(const BatchNormParams& p, int64_t first, int64_t count, double (&sum)[kGroup],
                  double (&dot)[kGroup]) {
  using A = acc_t<S>;
  using V = Vec<A>;
  // Copies: the compiler must take every store for one to p.
  const int64_t inner = p.inner, stride = p.channels * inner, start = first * inner;
  const S *x = static_cast<const S*>(p.input), *g = static_cast<const S*>(p.grad_output);
  const S* y = static_cast<const S*>(p.result);
  S* const dr = static_cast<S*>(p.grad_residual);
  with_sums<true>(p, [&](Mask mask, bool keep) __attribute__((always_inline)) {
    for_blocks(p.batch, inner, stride, [&](int64_t at, int64_t rows, int64_t length) __attribute__((always_inline)) {
      V totals[kGroup], dots[kGroup];
      for (int64_t c = 0; c < count; ++c) totals[c] = dots[c] = V::zero();
      const bool brief = is_short<V::N>(length);
      const bool joined = length == inner && is_joined<V::N>(length);  // the rest of a plane cut into blocks is not
      for (int64_t r = 0; r < rows; ++r) {
        int64_t row = start + at + r * stride;
        if (joined) {
          add_joined_rows<S>(p, mask, keep, row, first, count, totals, dots);
          continue;
        }
        if (brief) {
          add_short_rows<S>(p, mask, keep, row, length, first, count, totals, dots);
          continue;
        }
        for (int64_t c = 0; c < count; ++c, row += inner) {
          const auto k = affine_of<A>(p, mask, first + c);
          V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()}, d[4] = {s[0], s[0], s[0], s[0]};
          for_lanes<V::N>(row, length, [&](int64_t i, int lanes, int a) __attribute__((always_inline)) {
            const int64_t j = row + i;
            const V v = take_gradient(mask, g + j, x + j, y + j, keep ? dr + j : nullptr, lanes, k);
            s[a] = s[a] + v;
            d[a] = fma(v, load_lanes(x + j, lanes) - k.mean, d[a]);
          });
          totals[c] = totals[c] + join_four(s);
          dots[c] = dots[c] + join_four(d);
        }
      }
      add_lanes(p, totals, count, sum);
      add_lanes(p, dots, count, dot);
    });
  });
}

// The gradients of one image's planes of `count` channels from `first` on.
template <bool kStream, class S>
FASTNN_INLINE void write_planes(Mask mask, bool statistics, const BatchNormParams& p, int64_t image, int64_t first,
                                int64_t count, Coefficients<acc_t<S>> k) {
  using V = Vec<acc_t<S>>;
  const bool read = mask == Mask::read;
  int64_t at = (image * p.channels + first) * p.inner;
  const S *g = static_cast<const S*>(p.grad_output) + at, *x = static_cast<const S*>(p.input) + at;
  const S* y = static_cast<const S*>(p.result) + (read ? at : 0);
  S* dx = static_cast<S*>(p.grad_input) + at;
  const int64_t inner = p.inner, ahead = fetched_ahead(p);
  if (is_joined<V::N>(inner)) {
    return for_joined<V::N>(at, inner, count, [&](int64_t c, const auto& vectors) __attribute__((always_inline)) {
      const auto forward = affine_of<acc_t<S>>(p, mask, first + c);
      const V scale = V::set1(k.scale[c]), slope = V::set1(k.slope[c]), offset = V::set1(k.offset[c]);
      vectors(
          [&](int64_t i, int lanes) __attribute__((always_inline)) {
            write_lanes<kStream>(mask, statistics, g + i, x + i, y + i, dx + i, lanes, forward, scale, slope, offset);
          },
          [&](int64_t i, int64_t left) __attribute__((always_inline)) {
            const auto ends = lanes_below<acc_t<S>>(left);
            const auto next = affine_of<acc_t<S>>(p, mask, first + c + 1);
            write_lanes<kStream>(mask, statistics, g + i, x + i, y + i, dx + i, V::N, pick(ends, forward, next),
                                 pick(ends, scale, V::set1(k.scale[c + 1])), pick(ends, slope, V::set1(k.slope[c + 1])),
                                 pick(ends, offset, V::set1(k.offset[c + 1])));
          });
    });
  }
  for (int64_t c = 0; c < count; ++c) {
    const auto forward = affine_of<acc_t<S>>(p, mask, first + c);
    const V scale = V::set1(k.scale[c]), slope = V::set1(k.slope[c]), offset = V::set1(k.offset[c]);
    const auto write = [&](int64_t i, int lanes, int = 0) __attribute__((always_inline)) {
      write_lanes<kStream>(mask, statistics, g + i, x + i, y + i, dx + i, lanes, forward, scale, slope, offset);
      if (ahead) {
        __builtin_prefetch(x + i + ahead);
        __builtin_prefetch(g + i + ahead);
        if (!kStream) __builtin_prefetch(dx + i + ahead, 1);
      }
    };
    if (is_short<V::N>(inner)) for_short<V::N>(at, inner, write);
    else for_lanes<V::N>(at, inner, write);
    at += inner, g += inner, x += inner, dx += inner;
    if (read) y += inner;
  }
}

template <class S>
void backward_planes(const BatchNormParams& p) {
  const int64_t grain = ceil_div(kParallelElements, p.batch * p.inner), together = channels_together(p);
  const bool stream = streams(p, p.grad_input, 3 << 19);
  const BatchNormParams rest = behind_residual(p);
  parallel_for(0, p.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += together) {
      const int64_t count = min64(together, end - first);
      double sum[kGroup], dot[kGroup];
      acc_t<S> of_channel[3][kGroup];
      const Coefficients<acc_t<S>> k{of_channel[0], of_channel[1], of_channel[2]};
      for (int64_t c = 0; c < round_up(count, Vec<acc_t<S>>::N); ++c) sum[c] = dot[c] = 0;
      if (needs_sums(p)) channel_sums<S>(p, first, count, sum, dot);
      finish_channels<S>(p, first, count, sum, dot, k);
      if (!p.grad_input) continue;
      with_terms<true>(rest, [&](Mask mask, bool statistics) __attribute__((always_inline)) {
        for (int64_t n = p.batch - 1; n >= 0; --n) {  // the planes read last are still in the cache
          if (stream) write_planes<true, S>(mask, statistics, rest, n, first, count, k);
          else write_planes<false, S>(mask, statistics, rest, n, first, count, k);
        }
      });
    }
    end_streams(stream);
  });
}

// ---- rows of channels ----------------------------------------------------------------------------------------------

// Rows that chunk_sums takes through all tiles of channels before the next ones; 0: all of a chunk. A tile alone reads
// a few cache lines of every row, which the hardware does not fetch ahead. AVX2: always, the next strip being fetched
// (4x96x112x112 0.8 of the time). AVX-512 has tiles of four lines: strips of 4 KB of a tensor, fetched
// kStripsAhead before, for wide rows in tensors beyond L3 (Zen 4, 4x256x56x56 0.76 of the time, 8x128x56x56 0.88; but
// 4x96x112x112 1.04 and those that L3 keeps 1.01-1.09; Emerald Rapids 0.97-1.06 in all).
FASTNN_INLINE int64_t strip_of_rows(const BatchNormParams& p) {
  if (kVecBytes < 64) return max64(8, kBlock / 2 / p.channels);
  return p.channels >= 128 && p.batch * p.channels > 5 << 19 ? max64(4, kBlock / 4 / p.channels) : 0;
}
constexpr int64_t kStripsAhead = kVecBytes < 64 ? 1 : 8;

// Sums of g and g (x - mean) over one chunk of rows, for every channel.
template <class S>
void chunk_sums(const BatchNormParams& p, int64_t begin, int64_t rows, acc_t<S>* out) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t channels = p.channels;
  const S* g = static_cast<const S*>(p.grad_output) + begin * channels;
  const S* x = static_cast<const S*>(p.input) + begin * channels;
  const S* y = p.result ? static_cast<const S*>(p.result) + begin * channels : nullptr;
  S* const dr = p.grad_residual ? static_cast<S*>(p.grad_residual) + begin * channels : nullptr;
  const A* means = static_cast<const A*>(p.mean);
  constexpr int kLine = 64 / sizeof(S), kLevel = kVecBytes < 64 ? 3 : 2;  // of the cache: L1, L2
  const int64_t wanted = strip_of_rows(p), strip = wanted ? wanted : rows, ahead = kStripsAhead * wanted * channels;
  const auto sum_strip = [&](Mask mask, bool keep, int64_t first, int64_t last) __attribute__((always_inline)) {
    for_tiles<V::N>(channels, [&]<int T, int U>(int64_t c, int lanes) __attribute__((always_inline)) {
      V both[2][T], mean[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) mean[t] = load_lanes(means + c + t * V::N, lanes);
      accumulate_rows<2, T, U>(
          last - first, both, [&](int64_t r, int t, const auto& add) __attribute__((always_inline)) {
            const int64_t at = (first + r) * channels + c + t * V::N;
            if (ahead && t * V::N % kLine == 0) {
              __builtin_prefetch(g + at + ahead, 0, kLevel);
              __builtin_prefetch(x + at + ahead, 0, kLevel);
            }
            const V v =
                take_gradient(mask, g + at, x + at, y + at, keep ? dr + at : nullptr, lanes, only_mean(mean[t]));
            add(0, v);
            add(1, v * (load_lanes(x + at, lanes) - mean[t]));
          });
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        A *const sum = out + c + t * V::N, *const dot = sum + channels;
        if (first > 0)
          both[0][t] = both[0][t] + load_lanes(sum, lanes), both[1][t] = both[1][t] + load_lanes(dot, lanes);
        store_lanes(both[0][t], sum, lanes);
        store_lanes(both[1][t], dot, lanes);
      }
    });
  };
  with_sums<false>(p, [&](Mask mask, bool keep) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; r += strip) sum_strip(mask, keep, r, min64(rows, r + strip));
  });
}

template <bool kStream, class S>
void write_rows(const BatchNormParams& p, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const A* const scales = static_cast<const A*>(p.workspace);
  with_terms<false>(p, [&](Mask mask, bool statistics) __attribute__((always_inline)) {
    const S *const gradients = static_cast<const S*>(p.grad_output), *const inputs = static_cast<const S*>(p.input);
    const S* const results = static_cast<const S*>(p.result);
    S* const outputs = static_cast<S*>(p.grad_input);
    const A* const sources[] = {scales, statistics ? static_cast<const A*>(p.mean) : nullptr,
                                statistics ? scales + p.channels : nullptr,
                                statistics ? scales + 2 * p.channels : nullptr};
    for_rows_together(p.channels, begin, end, sources,
                      [&](int64_t at, int64_t length, const auto& coefficients) __attribute__((always_inline)) {
                        const S *g = gradients + at, *x = inputs + at, *y = mask == Mask::read ? results + at : results;
                        const A *scale = coefficients[0], *mean = coefficients[1], *slope = coefficients[2],
                                *offset = coefficients[3];
                        S* dx = outputs + at;
                        for_lanes<V::N>(0, length, [=](int64_t c, int lanes, int) __attribute__((always_inline)) {
                          const V none = V::zero();
                          write_lanes<kStream>(mask, statistics, g + c, x + c, y + c, dx + c, lanes,
                                               only_mean(statistics ? load_lanes(mean + c, lanes) : none),
                                               load_lanes(scale + c, lanes),
                                               statistics ? load_lanes(slope + c, lanes) : none,
                                               statistics ? load_lanes(offset + c, lanes) : none);
                        });
                      });
  });
}

template <class S>
void backward_rows(const BatchNormParams& p) {
  using A = acc_t<S>;
  const int64_t channels = p.channels, rows = batch_norm_chunk_rows(p.batch, channels);
  const int64_t chunks = ceil_div(p.batch, rows);
  A *coefficients = static_cast<A*>(p.workspace), *partial = coefficients + 3 * channels;
  if (needs_sums(p)) {
    parallel_for(0, chunks, ceil_div(kParallelElements, rows * channels), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        chunk_sums<S>(p, k * rows, min64(rows, p.batch - k * rows), partial + 2 * k * channels);
    });
  }
  for_channel_groups(p, chunks, [&](int64_t first, int64_t width) {
    double sum[kJoined] = {}, dot[kJoined] = {};
    for (int64_t k = 0; k < (needs_sums(p) ? chunks : 0); ++k) {
      const A *sums = partial + 2 * k * channels + first, *dots = sums + channels;
      for (int64_t i = 0; i < width; ++i) sum[i] += double(sums[i]), dot[i] += double(dots[i]);
    }
    A* const scale = coefficients + first;
    finish_channels<S>(p, first, width, sum, dot, Coefficients<A>{scale, scale + channels, scale + 2 * channels});
  });
  if (!p.grad_input) return;
  const BatchNormParams rest = behind_residual(p);
  parallel_rows(p, streams(p, p.grad_input, 3 << 19), [&](int64_t begin, int64_t end, bool stream) {
    if (stream) write_rows<true, S>(rest, begin, end);
    else write_rows<false, S>(rest, begin, end);
    end_streams(stream);
  });
}

}  // namespace

Status batch_norm_backward(const BatchNormParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.inner == 1) backward_rows<S>(p);
    else backward_planes<S>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
