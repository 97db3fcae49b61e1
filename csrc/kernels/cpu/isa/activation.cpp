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

// Elements that do not lie next to each other pass through a buffer in L1.
constexpr int64_t kGrain = 1 << 15, kPiece = 512;

// Calls f(plane, line, where in it, how many, of how many lines) for the pieces of lines that elements [begin, end)
// are.
template <class F>
FASTNN_INLINE void for_pieces(const ActivationParams& p, int64_t begin, int64_t end, bool buffered, const F& f) {
  const int64_t width = p.width, height = p.height, most = buffered ? kPiece : width;
  int64_t x = 0, line = 0, plane = 0;
  if (begin > 0) x = begin % width, line = begin / width % height, plane = begin / width / height;
  while (begin < end) {
    const int64_t n = min64(min64(most, width - x), end - begin);
    const int64_t lines = n == width && height > 1 ? min64(height - line, (end - begin) / width) : 1;
    f(plane, line, x, n, lines);
    begin += n * lines;
    x += n;
    if (x == width) x = 0, line += lines;
    if (line == height) line = 0, ++plane;
  }
}

template <class S>
FASTNN_INLINE S* piece_of(S* p, const LineStrides& strides, int64_t plane, int64_t line, int64_t x) {
  return p + plane * strides.plane + line * strides.line + x * strides.element;
}

// n elements from p on, where they lie or in the buffer.
template <class S>
FASTNN_INLINE const S* side_by_side(const S* p, int64_t stride, int64_t n, S* buffer) {
  using V = Vec<acc_t<S>>;
  if (stride == 1) return p;
  if (stride == 0) {
    const V all = V::set1(to_acc(*p));
    for_vectors<V::N>(n, [=](int64_t i, int lanes, int) { store_some(all, buffer + i, lanes); });
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
  }
  return buffer;
}

// The loops work on copies of pointers and formula: captured ones the compiler reads anew after every store, which
// might have changed them (relu in place, in L2 and beyond, took 1.2 to 1.7 of the time).
template <class S, class F>
FASTNN_INLINE void map1(const ActivationParams& p, const S* x, S* y, const F& f) {
  using A = acc_t<S>;
  const LineStrides of_x = p.of_x, of_y = p.of_y;
  const bool buffered = of_x.element != 1 || of_y.element != 1;
  parallel_for(0, p.size, kGrain, [&, of_x, of_y, buffered](int64_t begin, int64_t end) {
    S x_buffer[kPiece], y_buffer[kPiece];
    for_pieces(p, begin, end, buffered, [&](int64_t plane, int64_t line, int64_t at, int64_t n, int64_t lines) {
      const S* from = piece_of(x, of_x, plane, line, at);
      S* to = piece_of(y, of_y, plane, line, at);
      const F formula = f;
      for (; lines > 0; --lines, from += of_x.line, to += of_y.line) {
        const S* const read = buffered ? side_by_side(from, of_x.element, n, x_buffer) : from;
        S* const written = of_y.element == 1 ? to : y_buffer;
        for_vectors<Vec<A>::N>(n, [=](int64_t i, int lanes, int) __attribute__((always_inline)) {
          store_some(formula(load_some(read + i, lanes, A(0))), written + i, lanes);
        });
        if (of_y.element == 1) continue;
#pragma GCC unroll 8
        for (int64_t i = 0; i < n; ++i) to[i * of_y.element] = y_buffer[i];
      }
    });
  });
}

template <class S, class F>
FASTNN_INLINE void map2(const ActivationParams& p, const S* g, const S* x, S* y, const F& f) {
  using A = acc_t<S>;
  const LineStrides of_g = p.of_g, of_x = p.of_x, of_y = p.of_y;  // y's elements lie next to each other
  const bool buffered = of_g.element != 1 || of_x.element != 1;
  parallel_for(0, p.size, kGrain, [&, of_g, of_x, of_y, buffered](int64_t begin, int64_t end) {
    S g_buffer[kPiece], x_buffer[kPiece];
    for_pieces(p, begin, end, buffered, [&](int64_t plane, int64_t line, int64_t at, int64_t n, int64_t lines) {
      const S* left = piece_of(g, of_g, plane, line, at);
      const S* right = piece_of(x, of_x, plane, line, at);
      S* to = piece_of(y, of_y, plane, line, at);
      const F formula = f;
      for (; lines > 0; --lines, left += of_g.line, right += of_x.line, to += of_y.line) {
        const S* const a = buffered ? side_by_side(left, of_g.element, n, g_buffer) : left;
        const S* const b = buffered ? side_by_side(right, of_x.element, n, x_buffer) : right;
        S* const written = to;
        for_vectors<Vec<A>::N>(n, [=](int64_t i, int lanes, int) __attribute__((always_inline)) {
          store_some(formula(load_some(a + i, lanes, A(0)), load_some(b + i, lanes, A(0))), written + i, lanes);
        });
      }
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
      map1(p, static_cast<const S*>(p.input), static_cast<S*>(p.output),
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
      map2(p, static_cast<const S*>(p.grad_output), static_cast<const S*>(p.saved), static_cast<S*>(p.grad_input),
           [slope](V g, V s) { return derivative<decltype(kind)::kind, S>(g, s, slope); });
      return Status::ok;
    });
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
