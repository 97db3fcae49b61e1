// Forward pooling of contiguous planes: maxima and means by rows then columns, maxima with their taps tap by tap.
#include "pool2d_rows.h"

#include "../../parallel.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least

// ---- reductions ----------------------------------------------------------------------------------------------------

template <class A>
struct MaxOp {
  static constexpr bool kWatchNan = true;
  static constexpr A kStart = kLowest<A>;
  FASTNN_VEC_FN Vec<A> operator()(Vec<A> best, Vec<A> v) const { return max(v, best); }
};
template <class A>
struct ExactMaxOp {
  static constexpr bool kWatchNan = false;
  static constexpr A kStart = kLowest<A>;
  FASTNN_VEC_FN Vec<A> operator()(Vec<A> best, Vec<A> v) const { return {beats(v, best) ? v.v : best.v}; }
};
template <class A>
struct SumOp {
  static constexpr bool kWatchNan = false;
  static constexpr A kStart = 0;
  FASTNN_VEC_FN Vec<A> operator()(Vec<A> sum, Vec<A> v) const { return sum + v; }
};

// Reduces rows x, x + step, ... over the tile's columns into one buffer row; false when a NaN was met and the op cares.
template <class Op, class S, class A = acc_t<S>>
bool reduce_rows(const Op& op, const S* x, int64_t step, int64_t rows, const S* input_end, const Tile& t, A* to) {
  using V = Vec<A>;
  NanWatch<A> nan;
  const int64_t n = t.to - t.from;
  A* const valid = to + t.left;
  for (int64_t c = 0; c < n; c += V::N) {
    const S* from = x + t.from + c;
    V r = V::set1(Op::kStart);
    int64_t i = 0;
    if (rows > 0) r = load_upto(from, input_end - from), ++i;
    if (Op::kWatchNan && rows > 0) nan.see(r, r);
    for (; i < rows; ++i) {
      from += step;
      const V v = load_upto(from, input_end - from);
      if (Op::kWatchNan) nan.see(v, v);
      r = op(r, v);
    }
    r.store(valid + c);
  }
  fill(to, t.left, Op::kStart);
  fill(valid + n, t.pitch - t.left - n, Op::kStart);
  return !nan.any();
}

// Reduces windows of a buffer row to outputs: store(offset, lanes, value).
template <int kStride, int kKernel, class Op, class A, class Store>
FASTNN_INLINE void reduce_columns(const Op& op, const A* row, const PoolAxis& w, int64_t n, const Store& store) {
  using V = Vec<A>;
  for_vectors<V::N>(n, [&](int64_t q, int lanes) {
    const A* at = row + q * w.stride;
    V r;
    if constexpr (kStride == 2 && kKernel == 3) {
      const V a = V::load(at), b = V::load(at + V::N);
      r = op(op(evens(a, b), odds(a, b)), load_strided<2>(at + 2, 2, lanes));
    } else if constexpr (kKernel == 3) {
      r = op(op(V::load(at), V::load(at + 1)), V::load(at + 2));
    } else {
      r = load_strided<kStride>(at, w.stride, lanes);
      for (int64_t j = 1; j < w.kernel; ++j) r = op(r, load_strided<kStride>(at + j * w.dilation, w.stride, lanes));
    }
    store(q, lanes, r);
  });
}

// One block of output rows [begin, end), counted over all planes, of one tile.
template <int kStride, int kKernel, class S, class Finish>
void max_block(const Pool2dParams& p, const Axis& h, const Tile& t, int64_t begin, int64_t end, acc_t<S>* buffer,
               const Finish& finish) {
  using A = acc_t<S>;
  const S* const x = static_cast<const S*>(p.input);
  const S* const input_end = end_of_input<S>(p);
  bool clean[kBuffer];
  const int64_t ahead = outside_caches(p) ? h.stride * p.w.in : 0;
  int64_t plane = begin / h.out, oh = begin % h.out;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i0 = h.begin(oh), rows = h.end(oh) - i0;
    const S* from = x + (plane * h.in + h.first(oh) + i0 * h.dilation) * p.w.in;
    prefetch_behind(from, ahead);
    if (++oh == h.out) oh = 0, ++plane;
    A* to = buffer + (r - begin) * t.pitch;
    clean[r - begin] = reduce_rows(MaxOp<A>(), from, h.dilation * p.w.in, rows, input_end, t, to);
    if (__builtin_expect(!clean[r - begin], 0))
      reduce_rows(ExactMaxOp<A>(), from, h.dilation * p.w.in, rows, input_end, t, to);
  }
  for (int64_t r = begin; r < end; ++r) {
    const A* row = buffer + (r - begin) * t.pitch;
    const auto store = [&](int64_t q, int lanes, Vec<A> v) { finish(r, q, lanes, v); };
    if (__builtin_expect(clean[r - begin], 1))
      reduce_columns<kStride, kKernel>(MaxOp<A>(), row, p.w, t.end - t.begin, store);
    else reduce_columns<kStride, kKernel>(ExactMaxOp<A>(), row, p.w, t.end - t.begin, store);
  }
}

template <int kStride, int kKernel, class S, class Finish>
void sum_block(const Pool2dParams& p, const Axis& h, const Tile& t, int64_t begin, int64_t end, acc_t<S>* buffer,
               const Finish& finish) {
  using A = acc_t<S>;
  const S* const x = static_cast<const S*>(p.input);
  const S* const input_end = end_of_input<S>(p);
  const int64_t ahead = outside_caches(p) ? h.stride * p.w.in : 0;
  int64_t plane = begin / h.out, oh = begin % h.out;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i0 = h.begin(oh);
    const S* from = x + (plane * h.in + h.first(oh) + i0) * p.w.in;
    prefetch_behind(from, ahead);
    reduce_rows(SumOp<A>(), from, p.w.in, h.end(oh) - i0, input_end, t, buffer + (r - begin) * t.pitch);
    if (++oh == h.out) oh = 0, ++plane;
  }
  for (int64_t r = begin; r < end; ++r)
    reduce_columns<kStride, kKernel>(SumOp<A>(), buffer + (r - begin) * t.pitch, p.w, t.end - t.begin,
                                     [&](int64_t q, int lanes, Vec<A> v) { finish(r, q, lanes, v); });
}

// ---- maxima with their taps ----------------------------------------------------------------------------------------

// Output rows [begin, end) of one plane. The buffer holds the input rows they read, from row `top` on.
template <int kStride, int kKernel, class S, class O>
void taps_block(const Pool2dParams& p, const Axis& h, const Tile& t, const S* x, S* y, O* taps, int64_t begin,
                int64_t end, const typename IntLane<acc_t<S>>::type* first_tap, acc_t<S>* buffer) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t top = max64(0, h.first(begin)), bottom = min64(h.in, h.first(end - 1) + reach_of(h));
  const S* const input_end = end_of_input<S>(p);
  const int64_t ahead = outside_caches(p) ? p.w.in : 0;
  for (int64_t row = top; row < bottom; ++row) {
    prefetch_behind(x + row * p.w.in, ahead);
    reduce_rows(ExactMaxOp<A>(), x + row * p.w.in, 0, 1, input_end, t, buffer + (row - top) * t.pitch);
  }
  for (int64_t oh = begin; oh < end; ++oh) {
    const int64_t i0 = h.begin(oh), i1 = h.end(oh);
    const A* corner = buffer + (h.first(oh) - top) * t.pitch;
    const int64_t out = oh * p.w.out + t.begin;
    for_vectors<V::N>(t.end - t.begin, [&](int64_t q, int lanes) {
      V best = V::set1(kLowest<A>);
      Taps<A> tap(i0 * p.w.kernel);
      typename V::Int shift;
      __builtin_memcpy(&shift, first_tap + q, sizeof(shift));
      tap.taps += shift;
      for (int64_t i = i0; i < i1; ++i) {
        const A* at = corner + i * h.dilation * t.pitch + q * p.w.stride;
        const int64_t code = i * p.w.kernel;
        if constexpr (kStride == 2 && kKernel == 3) {
          const V a = V::load(at), b = V::load(at + V::N);
          tap.update(best, evens(a, b), code);
          tap.update(best, odds(a, b), code + 1);
          tap.update(best, load_strided<2>(at + 2, 2, lanes), code + 2);
        } else if constexpr (kKernel == 3) {
          tap.update(best, V::load(at), code);
          tap.update(best, V::load(at + 1), code + 1);
          tap.update(best, V::load(at + 2), code + 2);
        } else {
          for (int64_t j = 0; j < p.w.kernel; ++j)
            tap.update(best, load_strided<kStride>(at + j * p.w.dilation, p.w.stride, lanes), code + j);
        }
      }
      store_some(best, y + out + q, lanes);
      tap.store(taps + out + q, lanes);
    });
  }
}

template <int kStride, int kKernel, class S, class O>
void taps_forward(const Pool2dParams& p) {
  using A = acc_t<S>;
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t outputs = tile_outputs(p, reach_of(h));
  const S* x = static_cast<const S*>(p.input);
  S* y = static_cast<S*>(p.output);
  O* taps = static_cast<O*>(p.offsets);
  const int64_t grain = max64(1, kGrain / (h.stride * w.in));
  parallel_for(0, p.batch * p.channels * h.out, grain, [&](int64_t range_begin, int64_t range_end) {
    A buffer[kBuffer + kSlack];
    typename IntLane<A>::type first_tap[kTileOut + Vec<A>::N];
    for (int64_t column = 0; column < w.out; column += outputs) {
      const Tile t = tile_at(w, column, outputs);
      for (int64_t q = 0; q < t.end - t.begin; ++q) first_tap[q] = w.begin(t.begin + q);
      fill(first_tap + (t.end - t.begin), Vec<A>::N, typename IntLane<A>::type(0));
      const int64_t rows = (kBuffer / t.pitch - reach_of(h)) / h.stride + 1;
      for (int64_t r = range_begin, end; r < range_end; r = end) {
        const int64_t plane = r / h.out, first = plane * h.out;
        end = min64(min64(r + rows, range_end), first + h.out);
        const int64_t at = plane * h.out * w.out;
        taps_block<kStride, kKernel>(p, h, t, x + plane * h.in * w.in, y + at, taps + at, r - first, end - first,
                                     first_tap, buffer);
      }
    }
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls block(tile, begin, end, buffer) for blocks of output rows over all planes; tile(t) first, for each tile.
template <class A, class MakeBlock>
void for_blocks(const Pool2dParams& p, const MakeBlock& make_block) {
  const Axis w = axis_w(p);
  const int64_t outputs = tile_outputs(p, 1);
  const int64_t grain = max64(1, kGrain / (p.h.stride * p.w.in));
  parallel_for(0, p.batch * p.channels * p.h.out, grain, [&](int64_t begin, int64_t end) {
    A buffer[kBuffer + kSlack];
    for (int64_t column = 0; column < p.w.out; column += outputs) {
      const Tile t = tile_at(w, column, outputs);
      const int64_t rows = kBuffer / t.pitch;
      make_block(t, [&](const auto& block) {
        for (int64_t r = begin; r < end; r += rows) block(r, min64(end, r + rows), buffer);
      });
    }
  });
}

}  // namespace

bool fits_rows(const Pool2dParams& p) {
  return !p.adaptive && tile_outputs(p, p.offsets ? reach_of(p.h) : 1) >= min64(p.w.out, 32);
}

Status max_pool2d_forward_rows(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    dispatch_windows(p.w, [&](auto stride, auto kernel) {
      constexpr int kStride = decltype(stride)::value, kKernel = decltype(kernel)::value;
      if (p.offsets)
        return p.wide ? taps_forward<kStride, kKernel, S, int32_t>(p) : taps_forward<kStride, kKernel, S, uint8_t>(p);
      const Axis h = axis_h(p);
      for_blocks<A>(p, [&](const Tile& t, const auto& run) {
        S* y = static_cast<S*>(p.output) + t.begin;
        run([&](int64_t begin, int64_t end, A* buffer) {
          max_block<kStride, kKernel, S>(p, h, t, begin, end, buffer, [&](int64_t r, int64_t q, int lanes, Vec<A> v) {
            store_some(v, y + r * p.w.out + q, lanes);
          });
        });
      });
    });
    return Status::ok;
  });
}

Status avg_pool2d_forward_rows(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    dispatch_windows(p.w, [&](auto stride, auto kernel) {
      constexpr int kStride = decltype(stride)::value, kKernel = decltype(kernel)::value;
      const Axis h = axis_h(p), w = axis_w(p);
      for_blocks<A>(p, [&](const Tile& t, const auto& run) {
        S* y = static_cast<S*>(p.output) + t.begin;
        // What a window counts along its row, the same for every row of the tile.
        A counts[kTileOut + Vec<A>::N];
        bool uniform = true;
        for (int64_t q = 0; q < t.end - t.begin; ++q) {
          counts[q] = A(p.divisor ? 1 : w.count(t.begin + q, p.count_include_pad));
          uniform = uniform && counts[q] == counts[0];
        }
        fill(counts + (t.end - t.begin), Vec<A>::N, A(1));
        const int64_t usual_rows = p.divisor ? p.divisor : h.kernel;
        const Divide<A> usual(usual_rows * int64_t(counts[0]));
        run([&](int64_t begin, int64_t end, A* buffer) {
          sum_block<kStride, kKernel, S>(p, h, t, begin, end, buffer, [&](int64_t r, int64_t q, int lanes, Vec<A> v) {
            const int64_t rows = p.divisor ? p.divisor : h.count(r % h.out, p.count_include_pad);
            if (uniform && rows == usual_rows) v = usual(v);
            else v = v / (Vec<A>::load(counts + q) * Vec<A>::set1(A(rows)));
            store_some(v, y + r * p.w.out + q, lanes);
          });
        });
      });
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
