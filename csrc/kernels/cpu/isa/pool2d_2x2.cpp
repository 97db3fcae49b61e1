// 2x2 windows with stride 2 on contiguous planes: each pair of rows becomes one, straight from and to memory.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least

// ---- one vector of outputs -----------------------------------------------------------------------------------------

// The four elements of each lane's window, row by row.
template <class A>
struct Quad {
  Vec<A> v[4];
};

// The maximum by torch's rule; the general case, for vectors that hold a NaN.
template <class A>
Vec<A> exact_max(const Quad<A>& q, typename Vec<A>::Int& taps) {
  Vec<A> best = q.v[0];
  Taps<A> t(0);
  for (int i = 1; i < 4; ++i) t.update(best, q.v[i], i);
  taps = t.taps;
  return best;
}

// The maximum and its tap, by pairs.
template <class A>
FASTNN_INLINE Vec<A> max_of(const Quad<A>& q, typename Vec<A>::Int& taps) {
  using Int = typename Vec<A>::Int;
  const Vec<A>&a = q.v[0], &b = q.v[1], &c = q.v[2], &d = q.v[3];
  NanWatch<A> nan;
  nan.see(a, b);
  nan.see(c, d);
  if (__builtin_expect(nan.any(), 0)) return exact_max(q, taps);
  const Vec<A> top = max(b, a), bottom = max(d, c);
  const Int one = Int{} + 1;
  const Int upper = b.v > a.v ? one : Int{}, lower = d.v > c.v ? one + 2 : one + 1;
  taps = bottom.v > top.v ? lower : upper;
  return {bottom.v > top.v ? bottom.v : top.v};
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// Two input rows of 2 * n elements (x and x + pitch) to one of n. Max with taps, without taps (null), or mean.
template <class S>
FASTNN_INLINE void max_rows(const S* x, int64_t pitch, S* y, uint8_t* taps, int64_t n) {
  using A = acc_t<S>;
  using V = Vec<A>;
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    const S *top = x + 2 * i, *bottom = top + pitch;
    const V a = load_upto(top, 2 * lanes), b = load_upto(top + V::N, 2 * lanes - V::N);
    const V c = load_upto(bottom, 2 * lanes), d = load_upto(bottom + V::N, 2 * lanes - V::N);
    typename V::Int t;
    if (taps) {
      store_some(max_of(Quad<A>{{evens(a, b), odds(a, b), evens(c, d), odds(c, d)}}, t), y + i, lanes);
      store_taps<A>(t, taps + i, lanes);
      return;
    }
    NanWatch<A> nan;
    nan.see(a, c);
    nan.see(b, d);
    const V left = max(c, a), right = max(d, b);
    V best = max(odds(left, right), evens(left, right));
    if (__builtin_expect(nan.any(), 0))
      best = exact_max(Quad<A>{{evens(a, b), odds(a, b), evens(c, d), odds(c, d)}}, t);
    store_some(best, y + i, lanes);
  });
}

template <class S>
FASTNN_INLINE void avg_rows(const S* x, int64_t pitch, S* y, int64_t n, const Divide<acc_t<S>>& mean) {
  using V = Vec<acc_t<S>>;
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    const S *top = x + 2 * i, *bottom = top + pitch;
    const V left = load_upto(top, 2 * lanes) + load_upto(bottom, 2 * lanes);
    const V right = load_upto(top + V::N, 2 * lanes - V::N) + load_upto(bottom + V::N, 2 * lanes - V::N);
    store_some(mean(evens(left, right) + odds(left, right)), y + i, lanes);
  });
}

// One gradient row of n elements to two of `width`, which is 2 * n or one more. kSpill: a vector more of gradients may
// be read, and two more of inputs written, since they are written later: the end of the rows first.
template <bool kSpill, class S>
FASTNN_INLINE void max_rows_backward(const S* g, const uint8_t* taps, S* dx, int64_t width, int64_t n) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const auto vector = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V grad = load_some(g + i, lanes);
    const auto tap = load_taps<A>(taps + i, lanes);
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      const V left = only_where(tap, 2 * row, grad), right = only_where(tap, 2 * row + 1, grad);
      S* to = dx + row * width + 2 * i;
      store_upto(interleave_low(left, right), to, 2 * lanes);
      store_upto(interleave_high(left, right), to + V::N, 2 * lanes - V::N);
    }
  };
  if constexpr (kSpill) {
    const int64_t whole = n / V::N * V::N;
    if (whole < n) vector(whole, V::N);
    for (int64_t i = 0; i < whole; i += V::N) vector(i, V::N);
  } else {
    for_vectors<V::N>(n, vector);
  }
  if (width > 2 * n) dx[2 * n] = dx[width + 2 * n] = from_acc<S>(A(0));
}

template <class S>
FASTNN_INLINE void avg_rows_backward(const S* g, S* dx, int64_t width, int64_t n, const Divide<acc_t<S>>& mean) {
  using A = acc_t<S>;
  using V = Vec<A>;
  for_vectors<V::N>(n, [&](int64_t i, int lanes) {
    const V share = mean(load_some(g + i, lanes));
    const V low = interleave_low(share, share), high = interleave_high(share, share);
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      S* to = dx + row * width + 2 * i;
      store_upto(low, to, 2 * lanes);
      store_upto(high, to + V::N, 2 * lanes - V::N);
    }
  });
  if (width > 2 * n) dx[2 * n] = dx[width + 2 * n] = from_acc<S>(A(0));
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(offset of the two input rows, offset of the output row) for each output row of all planes.
template <class F>
void for_row_pairs(const Pool2dParams& p, const F& f) {
  const int64_t grain = max64(1, kGrain / (2 * p.w.in));
  parallel_for(0, p.batch * p.channels * p.h.out, grain, [&](int64_t begin, int64_t end) {
    int64_t plane = begin / p.h.out, row = begin % p.h.out;
    for (int64_t r = begin; r < end; ++r) {
      f((plane * p.h.in + 2 * row) * p.w.in, r * p.w.out);
      if (++row == p.h.out) row = 0, ++plane;
    }
  });
}

// Output rows [begin, end). Not inlined: its loop needs the registers.
template <bool kSpill, class S>
__attribute__((noinline)) void max_planes_backward(const Pool2dParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.w.out, width = p.w.in, height = p.h.out, rest = (p.h.in - 2 * height) * width;
  int64_t row = begin % height;
  const S* g = static_cast<const S*>(p.grad_output) + begin * n;
  const uint8_t* taps = static_cast<const uint8_t*>(p.offsets) + begin * n;
  S* dx = static_cast<S*>(p.grad_input) + 2 * begin * width + begin / height * rest;
  for (int64_t r = begin; r < end; ++r, g += n, taps += n, dx += 2 * width) {
    max_rows_backward<kSpill>(g, taps, dx, width, n);
    if (++row == height) row = 0, dx += rest;
  }
}

// The last row of a plane of odd height belongs to no window.
template <class S>
void clear_last_rows(const Pool2dParams& p, S* dx) {
  if (p.h.in == 2 * p.h.out) return;
  for (int64_t plane = 1; plane <= p.batch * p.channels; ++plane)
    __builtin_memset(static_cast<void*>(dx + (plane * p.h.in - 1) * p.w.in), 0, uint64_t(p.w.in) * sizeof(S));
}

}  // namespace

bool is_2x2(const Pool2dParams& p) {
  const PoolAxis* axes[] = {&p.h, &p.w};
  for (const PoolAxis* a : axes)
    if (a->kernel != 2 || a->stride != 2 || a->padding != 0 || a->dilation != 1 || a->out * 2 > a->in) return false;
  return !p.adaptive && !p.wide;  // keeps one byte per window
}

Status max_pool2d_forward_2x2(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    uint8_t* taps = static_cast<uint8_t*>(p.offsets);
    const auto run = [&](auto has_taps, auto far) {  // loops of their own: one with all would spill
      for_row_pairs(p, [&](int64_t from, int64_t to) {
        if constexpr (decltype(far)::value) prefetch_behind(x + from, 2 * p.w.in);
        max_rows(x + from, p.w.in, y + to, decltype(has_taps)::value ? taps + to : nullptr, p.w.out);
      });
    };
    const bool far = outside_caches(p);
    if (taps) far ? run(Constant<1>{}, Constant<1>{}) : run(Constant<1>{}, Constant<0>{});
    else far ? run(Constant<0>{}, Constant<1>{}) : run(Constant<0>{}, Constant<0>{});
    return Status::ok;
  });
}

Status max_pool2d_backward_2x2(const Pool2dParams& p) {
  const int64_t rows = p.batch * p.channels * p.h.out;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    S* dx = static_cast<S*>(p.grad_input);
    parallel_for(0, rows, max64(1, kGrain / (2 * p.w.in)), [&](int64_t begin, int64_t end) {
      // Rows with a vector of outputs after them that is this thread's.
      const int64_t safe = max64(begin, end - ceil_div(Vec<acc_t<S>>::N, p.w.out));
      max_planes_backward<true, S>(p, begin, safe);
      max_planes_backward<false, S>(p, safe, end);
    });
    clear_last_rows(p, dx);
    return Status::ok;
  });
}

Status avg_pool2d_forward_2x2(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    const Divide<acc_t<S>> mean(p.divisor ? p.divisor : 4);
    const int64_t ahead = outside_caches(p) ? 2 * p.w.in : 0;
    for_row_pairs(p, [&](int64_t from, int64_t to) {
      prefetch_behind(x + from, ahead);
      avg_rows(x + from, p.w.in, y + to, p.w.out, mean);
    });
    return Status::ok;
  });
}

Status avg_pool2d_backward_2x2(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* g = static_cast<const S*>(p.grad_output);
    S* dx = static_cast<S*>(p.grad_input);
    const Divide<acc_t<S>> mean(p.divisor ? p.divisor : 4);
    for_row_pairs(p, [&](int64_t to, int64_t from) { avg_rows_backward(g + from, dx + to, p.w.in, p.w.out, mean); });
    clear_last_rows(p, dx);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
