// Pointwise activations: one formula per kind, one loop for all.
#include "../../activation.h"

#include "../../parallel.h"
#include "isa.h"
#include "math.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// ---- formulas ------------------------------------------------------------------------------------------------------

template <class A>
constexpr A kSqrt1_2 = A(0.70710678118654752440);
template <class A>
constexpr A kInvSqrt2Pi = A(0.39894228040143267794);
template <class A>
constexpr A kSqrt2OverPi = A(0.79788456080286535588);
template <class A>
constexpr A kGeluCubic = A(0.044715);

template <Activation K, class V, class A>
FASTNN_INLINE V value(V x, A slope) {
  if constexpr (K == Activation::relu) return {x.v < A(0) ? V::zero().v : x.v};  // NaN passes
  if constexpr (K == Activation::relu6) {
    const V y{x.v < A(0) ? V::zero().v : x.v};
    return {y.v > A(6) ? V::zero().v + A(6) : y.v};
  }
  if constexpr (K == Activation::leaky_relu) return {x.v > A(0) ? x.v : x.v * slope};
  if constexpr (K == Activation::sigmoid) return sigmoid(x);
  if constexpr (K == Activation::tanh) return tanh(x);
  if constexpr (K == Activation::gelu) return {x.v * A(0.5) * (A(1) + erf(V{x.v * kSqrt1_2<A>}).v)};
  if constexpr (K == Activation::gelu_tanh) {
    const auto inner = kSqrt2OverPi<A> * (x.v + kGeluCubic<A> * x.v * x.v * x.v);
    return {A(0.5) * x.v * (A(1) + tanh(V{inner}).v)};
  }
  if constexpr (K == Activation::silu) return {x.v / (A(1) + exp(V{-x.v}).v)};
}

// grad_input from grad_output and what forward saved (ActivationParams::saved).
template <Activation K, class V, class A>
FASTNN_INLINE V derivative(V g, V s, A slope) {
  if constexpr (K == Activation::relu) return {s.v <= A(0) ? V::zero().v : g.v};
  if constexpr (K == Activation::relu6) {
    const V below{s.v < A(6) ? g.v : V::zero().v};
    return {s.v > A(0) ? below.v : V::zero().v};
  }
  if constexpr (K == Activation::leaky_relu) return {s.v > A(0) ? g.v : g.v * slope};
  if constexpr (K == Activation::sigmoid) return {g.v * (A(1) - s.v) * s.v};
  if constexpr (K == Activation::tanh) return {g.v * (A(1) - s.v * s.v)};
  if constexpr (K == Activation::gelu) {
    const auto cdf = A(0.5) * (A(1) + erf(V{s.v * kSqrt1_2<A>}).v);
    const auto pdf = kInvSqrt2Pi<A> * exp(V{s.v * s.v * A(-0.5)}).v;
    return {g.v * (cdf + s.v * pdf)};
  }
  if constexpr (K == Activation::gelu_tanh) {
    const auto square = s.v * s.v;
    const auto t = tanh(V{kSqrt2OverPi<A> * (s.v + kGeluCubic<A> * square * s.v)}).v;
    const auto inner = kSqrt2OverPi<A> * (A(1) + 3 * kGeluCubic<A> * square);
    return {g.v * (A(0.5) * (A(1) + t) + A(0.5) * s.v * (A(1) - t * t) * inner)};
  }
  if constexpr (K == Activation::silu) {
    const auto sig = sigmoid(s).v;
    return {g.v * sig * (A(1) + s.v * (A(1) - sig))};
  }
}

// ---- loops ---------------------------------------------------------------------------------------------------------

constexpr int64_t kGrain = 1 << 15;

template <class S, class F>
FASTNN_INLINE void map1(const S* x, S* y, int64_t size, const F& f) {
  using V = Vec<acc_t<S>>;
  parallel_for(0, size, kGrain, [&](int64_t i, int64_t end) {
    for (; i + V::N <= end; i += V::N) f(V::load(x + i)).store(y + i);
    if (i < end) f(V::load_n(x + i, end - i)).store_n(y + i, end - i);
  });
}

template <class S, class F>
FASTNN_INLINE void map2(const S* a, const S* b, S* y, int64_t size, const F& f) {
  using V = Vec<acc_t<S>>;
  parallel_for(0, size, kGrain, [&](int64_t i, int64_t end) {
    for (; i + V::N <= end; i += V::N) f(V::load(a + i), V::load(b + i)).store(y + i);
    if (i < end) f(V::load_n(a + i, end - i), V::load_n(b + i, end - i)).store_n(y + i, end - i);
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
           [slope](V x) { return value<decltype(kind)::kind>(x, slope); });
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
           [slope](V g, V s) { return derivative<decltype(kind)::kind>(g, s, slope); });
      return Status::ok;
    });
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
