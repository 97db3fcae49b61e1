// The mean of whole contiguous planes, and its gradient.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements per thread at least

// Elements fetched early. On Zen 4 512 planes of 56x56 take 75 us with 128, 83 with 1024, 75 to 78 without.
constexpr int64_t kAhead = 128;

// reduce_add() without its way through memory, which takes AVX2 longer than the 49 elements of a plane of 7x7.
template <class A>
FASTNN_INLINE A sum_of_lanes(Vec<A> v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  v = v + pick_lanes<[](int i, int n) { return (i + n / 2) % n; }>(v, v);
  v = v + pick_lanes<[](int i, int n) { return (i + n / 4) % n; }>(v, v);
  if constexpr (Vec<A>::N == 8) v = v + pick_lanes<[](int i, int n) { return (i + 1) % n; }>(v, v);
  return v.v[0];
#else
  return reduce_add(v);
#endif
}

template <class S>
acc_t<S> sum_of(const S* x, int64_t n) {
  using V = Vec<acc_t<S>>;
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::N <= n; i += 4 * V::N) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      __builtin_prefetch(x + i + k * V::N + kAhead);
      sums[k] = sums[k] + V::load(x + i + k * V::N);
    }
  }
  for_vectors<V::N>(n - i, [&](int64_t at, int lanes) { sums[0] = sums[0] + load_some(x + i + at, lanes); });
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Of planes of one element: y = x / divisor. The loops that write work on copies of what they read: a captured pointer
// would be read anew after every store.
template <class S>
void divide(const Pool2dParams& p, const void* from, void* to, acc_t<S> divisor) {
  using V = Vec<acc_t<S>>;
  const S* x = static_cast<const S*>(from);
  S* y = static_cast<S*>(to);
  parallel_for(0, p.batch * p.channels, kGrain, [&](int64_t begin, int64_t end) {
    const S* const source = x + begin;
    S* const target = y + begin;
    const V by = V::set1(divisor);
    for_vectors<V::N>(end - begin,
                      [=](int64_t i, int lanes) { store_some(load_some(source + i, lanes) / by, target + i, lanes); });
  });
}

}  // namespace

bool is_global(const Pool2dParams& p) {
  return p.h.out == 1 && p.w.out == 1 && p.h.kernel == p.h.in && p.w.kernel == p.w.in && p.h.padding == 0 &&
         p.w.padding == 0 && p.h.dilation == 1 && p.w.dilation == 1;
}

Status avg_pool2d_forward_global(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    const int64_t n = p.h.in * p.w.in;
    const A divisor = A(p.divisor ? p.divisor : n);
    if (n == 1) {
      divide<S>(p, x, y, divisor);
      return Status::ok;
    }
    parallel_for(0, p.batch * p.channels, max64(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) y[plane] = from_acc<S>(sum_of(x + plane * n, n) / divisor);
    });
    return Status::ok;
  });
}

Status avg_pool2d_backward_global(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    using V = Vec<A>;
    const S* g = static_cast<const S*>(p.grad_output);
    S* dx = static_cast<S*>(p.grad_input);
    const int64_t n = p.h.in * p.w.in;
    const A divisor = A(p.divisor ? p.divisor : n);
    if (n == 1) {
      divide<S>(p, g, dx, divisor);
      return Status::ok;
    }
    parallel_for(0, p.batch * p.channels, max64(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const V share = V::set1(to_acc(g[plane]) / divisor);
        S* const target = dx + plane * n;
        for_vectors<V::N>(n, [=](int64_t i, int lanes) { store_some(share, target + i, lanes); });
      }
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
