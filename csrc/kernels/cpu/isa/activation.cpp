// Pointwise activations: one formula per kind, one loop for all.
#include "../../activation.h"

#include "../../parallel.h"
#include "isa.h"
#include "normal.h"
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// ---- formulas ------------------------------------------------------------------------------------------------------

template <Activation K, class S, class V, class A>
FASTNN_INLINE V value(V x, A slope) {
  if constexpr (K == Activation::relu) return {x.v < A(0) ? V::zero().v : x.v};  // NaN passes
  if constexpr (K == Activation::relu6) {
    const V y{x.v < A(0) ? V::zero().v : x.v};
    return {y.v > A(6) ? V::zero().v + A(6) : y.v};
  }
  if constexpr (K == Activation::leaky_relu) return {x.v > A(0) ? x.v : x.v * slope};
  if constexpr (K == Activation::sigmoid) return sigmoid(x);
  if constexpr (K == Activation::tanh) return tanh(x);
  if constexpr (K == Activation::gelu) return x * normal_cdf<S>(x);
  if constexpr (K == Activation::gelu_tanh) {
    const auto minus_2u = x.v * (A(-2) * A(kSqrt2OverPi) - A(2) * A(kSqrt2OverPi) * A(kGeluCubic) * (x.v * x.v));
    return {x.v / (A(1) + exp(V{minus_2u}).v)};  // (1 + tanh(u)) / 2 = sigmoid(2 u)
  }
  if constexpr (K == Activation::silu) return {x.v / (A(1) + exp(V{-x.v}).v)};
}

// grad_input from grad_output and what forward saved (ActivationParams::saved).
template <Activation K, class S, class V, class A>
FASTNN_INLINE V derivative(V g, V s, A slope) {
  if constexpr (K == Activation::relu) return {s.v <= A(0) ? V::zero().v : g.v};
  if constexpr (K == Activation::relu6) {
    const V below{s.v < A(6) ? g.v : V::zero().v};
    return {s.v > A(0) ? below.v : V::zero().v};
  }
  if constexpr (K == Activation::leaky_relu) return {s.v > A(0) ? g.v : g.v * slope};
  if constexpr (K == Activation::sigmoid) return {g.v * (A(1) - s.v) * s.v};
  if constexpr (K == Activation::tanh) return {g.v * (A(1) - s.v * s.v)};
  if constexpr (K == Activation::gelu) return g * gelu_derivative<S>(s);
  if constexpr (K == Activation::gelu_tanh) {
    const auto square = s.v * s.v;
    const auto two_u = s.v * (2 * A(kSqrt2OverPi) + 2 * A(kSqrt2OverPi) * A(kGeluCubic) * square);
    const auto slope_of_two_u = 2 * A(kSqrt2OverPi) + 6 * A(kSqrt2OverPi) * A(kGeluCubic) * square;
    const auto e = exp(V{-abs(V{two_u}).v}).v, r = A(1) / (A(1) + e);  // of -|2u|: 1 - sigmoid without cancellation
    const auto sig = s.v < A(0) ? e * r : r;
    return {g.v * (sig + s.v * (e * r * r) * slope_of_two_u)};
  }
  if constexpr (K == Activation::silu) {
    const auto sig = sigmoid(s).v;
    return {g.v * sig * (A(1) + s.v * (A(1) - sig))};
  }
}

// ---- loops ---------------------------------------------------------------------------------------------------------

constexpr int64_t kGrain = 1 << 15;

// The loops work on copies of pointers and formula: captured ones the compiler reads anew after every store, which
// might have changed them (relu in place, in L2 and beyond, took 1.2 to 1.7 of the time).
template <class S, class F>
FASTNN_INLINE void map1(const S* x, S* y, int64_t size, const F& f) {
  using A = acc_t<S>;
  parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    const S* const from = x + begin;
    S* const to = y + begin;
    const F formula = f;
    for_vectors<Vec<A>::N>(end - begin, [=](int64_t i, int lanes, int) __attribute__((always_inline)) {
      store_some(formula(load_some(from + i, lanes, A(0))), to + i, lanes);
    });
  });
}

template <class S, class F>
FASTNN_INLINE void map2(const S* a, const S* b, S* y, int64_t size, const F& f) {
  using A = acc_t<S>;
  parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    const S *const left = a + begin, *const right = b + begin;
    S* const to = y + begin;
    const F formula = f;
    for_vectors<Vec<A>::N>(end - begin, [=](int64_t i, int lanes, int) __attribute__((always_inline)) {
      store_some(formula(load_some(left + i, lanes, A(0)), load_some(right + i, lanes, A(0))), to + i, lanes);
    });
  });
}

template <Activation K>
struct KindTag {
  static constexpr Activation kind = K;
};

template <class F>
Status dispatch_kind(Activation kind, const F& f) {
  switch (kind) {
    case Activation::relu: return f(KindTag<Activation::relu>{});
    case Activation::relu6: return f(KindTag<Activation::relu6>{});
    case Activation::leaky_relu: return f(KindTag<Activation::leaky_relu>{});
    case Activation::sigmoid: return f(KindTag<Activation::sigmoid>{});
    case Activation::tanh: return f(KindTag<Activation::tanh>{});
    case Activation::gelu: return f(KindTag<Activation::gelu>{});
    case Activation::gelu_tanh: return f(KindTag<Activation::gelu_tanh>{});
    case Activation::silu: return f(KindTag<Activation::silu>{});
  }
  return Status::invalid_argument;
}

}  // namespace

Status activation_forward(const ActivationParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    return dispatch_kind(p.kind, [&](auto kind) {
      using S = typename decltype(tag)::type;
      using V = Vec<acc_t<S>>;
      const acc_t<S> slope = acc_t<S>(p.slope);
      map1(static_cast<const S*>(p.input), static_cast<S*>(p.output), p.size,
           [slope](V x) { return value<decltype(kind)::kind, S>(x, slope); });
      return Status::ok;
    });
  });
}

Status activation_backward(const ActivationParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    return dispatch_kind(p.kind, [&](auto kind) {
      using S = typename decltype(tag)::type;
      using V = Vec<acc_t<S>>;
      const acc_t<S> slope = acc_t<S>(p.slope);
      map2(static_cast<const S*>(p.grad_output), static_cast<const S*>(p.saved), static_cast<S*>(p.grad_input), p.size,
           [slope](V g, V s) { return derivative<decltype(kind)::kind, S>(g, s, slope); });
      return Status::ok;
    });
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
