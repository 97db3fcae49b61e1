// Pointwise activations: one formula per kind, one loop for all.
#include "../../activation.h"

#include "../../parallel.h"
#include "isa.h"
#include "normal.h"
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// ---- formulas ------------------------------------------------------------------------------------------------------

// K vectors of x in place, those that take long side by side (math.h).
template <Activation Kind, class S, int K, class V, class A>
FASTNN_INLINE void value(V* x, A slope) {
  const auto one_by_one = [&](const auto& f) __attribute__((always_inline)) {
    each<K>([&](int k) __attribute__((always_inline)) { x[k] = V{f(x[k].v)}; });
  };
  if constexpr (Kind == Activation::relu) one_by_one([](auto x) { return x < A(0) ? V::zero().v : x; });  // NaN passes
  if constexpr (Kind == Activation::relu6) {
    one_by_one([](auto x) {
      const auto y = x < A(0) ? V::zero().v : x;
      return y > A(6) ? V::zero().v + A(6) : y;
    });
  }
  if constexpr (Kind == Activation::leaky_relu) one_by_one([slope](auto x) { return x > A(0) ? x : x * slope; });
  if constexpr (Kind == Activation::sigmoid) sigmoid_each<K>(x);
  if constexpr (Kind == Activation::tanh) tanh_each<K>(x);
  V f[K];
  if constexpr (Kind == Activation::gelu) {
    each<K>([&](int k) { f[k] = x[k]; });
    normal_cdf_each<S, K>(f);
    each<K>([&](int k) { x[k] = x[k] * f[k]; });
  }
  if constexpr (Kind == Activation::gelu_tanh || Kind == Activation::silu) {
    each<K>([&](int k) {
      if constexpr (Kind == Activation::silu) f[k] = {-x[k].v};
      else  // -2 u: (1 + tanh(u)) / 2 = sigmoid(2 u)
        f[k] = {x[k].v * (A(-2) * A(kSqrt2OverPi) - A(2) * A(kSqrt2OverPi) * A(kGeluCubic) * (x[k].v * x[k].v))};
    });
    exp_each<K>(f);
    each<K>([&](int k) { x[k] = {x[k].v / (A(1) + f[k].v)}; });
  }
}

// grad_input in place of grad_output g, from what forward saved (ActivationParams::saved).
template <Activation Kind, class S, int K, class V, class A>
FASTNN_INLINE void derivative(V* g, const V* saved, A slope) {
  const auto one_by_one = [&](const auto& f) __attribute__((always_inline)) {
    each<K>([&](int k) __attribute__((always_inline)) { g[k] = V{f(g[k].v, saved[k].v)}; });
  };
  if constexpr (Kind == Activation::relu) one_by_one([](auto g, auto s) { return s <= A(0) ? V::zero().v : g; });
  if constexpr (Kind == Activation::relu6) {
    one_by_one([](auto g, auto s) {
      const auto below = s < A(6) ? g : V::zero().v;
      return s > A(0) ? below : V::zero().v;
    });
  }
  if constexpr (Kind == Activation::leaky_relu) {
    one_by_one([slope](auto g, auto s) { return s > A(0) ? g : g * slope; });
  }
  if constexpr (Kind == Activation::sigmoid) one_by_one([](auto g, auto s) { return g * (A(1) - s) * s; });
  if constexpr (Kind == Activation::tanh) one_by_one([](auto g, auto s) { return g * (A(1) - s * s); });
  V f[K];
  each<K>([&](int k) { f[k] = saved[k]; });
  if constexpr (Kind == Activation::gelu) {
    gelu_derivative_each<S, K>(f);
    each<K>([&](int k) { g[k] = g[k] * f[k]; });
  }
  if constexpr (Kind == Activation::gelu_tanh) {
    each<K>([&](int k) {
      const auto s = saved[k].v;
      const auto two_u = s * (2 * A(kSqrt2OverPi) + 2 * A(kSqrt2OverPi) * A(kGeluCubic) * (s * s));
      f[k] = {-abs(V{two_u}).v};  // 1 - sigmoid without cancellation
    });
    exp_each<K>(f);
    each<K>([&](int k) {
      const auto s = saved[k].v;
      const auto slope_of_two_u = 2 * A(kSqrt2OverPi) + 6 * A(kSqrt2OverPi) * A(kGeluCubic) * (s * s);
      const auto e = f[k].v, r = A(1) / (A(1) + e);
      const auto sig = s < A(0) ? e * r : r;
      g[k] = {g[k].v * (sig + s * (e * r * r) * slope_of_two_u)};
    });
  }
  if constexpr (Kind == Activation::silu) {
    sigmoid_each<K>(f);
    each<K>([&](int k) { g[k] = {g[k].v * f[k].v * (A(1) + saved[k].v * (A(1) - f[k].v))}; });
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

// Whether the last vector of a line is loaded and stored in part. Else it is a whole one that overlaps the one before
// it: where masks are slow or missing, and in place everywhere, since the next line's loads would wait for a masked
// store (crops of 28x28: 53 and 21 us). In place it is loaded before anything is stored.
template <class S>
#if defined(__AVX512F__)
constexpr bool kMasked = sizeof(S) > 2;
#else
constexpr bool kMasked = false;
#endif

// Elements from which on a result goes past the caches (aligned pieces of float32): relu x1.3 to x1.5 of the speed,
// x1.1 with what reads it next, which loses below (4 M elements of forward on two threads x0.7). Backward reads twice
// as much.
constexpr int64_t kStreamedForward = 10 << 20, kStreamedBackward = 4 << 20;

// The loops work on copies of pointers and formula: captured ones the compiler reads anew after every store, which
// might have changed them (relu in place, in L2 and beyond, took 1.2 to 1.7 of the time).
template <class S, class F>
FASTNN_INLINE void map1(const ActivationParams& p, const S* x, S* y, const F& f) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const LineStrides of_x = p.of_x, of_y = p.of_y;
  const bool buffered = of_x.element != 1 || of_y.element != 1, in_place = x == y;
  const bool streams = p.size >= kStreamedForward && !in_place && of_y.element == 1;
  parallel_for(0, p.size, kGrain, [&, of_x, of_y, buffered, in_place](int64_t begin, int64_t end) {
    S x_buffer[kPiece], y_buffer[kPiece];
    for_pieces(p, begin, end, buffered, [&](int64_t plane, int64_t line, int64_t at, int64_t n, int64_t lines) {
      const S* from = piece_of(x, of_x, plane, line, at);
      S* to = piece_of(y, of_y, plane, line, at);
      const F formula = f;
      for (; lines > 0; --lines, from += of_x.line, to += of_y.line) {
        const S* const read = buffered ? side_by_side(from, of_x.element, n, x_buffer) : from;
        S* const written = of_y.element == 1 ? to : y_buffer;
        const bool whole = n >= V::N && (in_place || !kMasked<S>);
        const V end = whole ? V::load(read + n - V::N) : V::zero();
        const bool past = streams && uintptr_t(written) % 64 == 0;
        for_groups<V::N>(n, [=](auto vectors, int64_t i, int last) __attribute__((always_inline)) {
          constexpr int K = vectors.count;
          V v[K];
          each<K - 1>([&](int k) { v[k] = V::load(read + i + k * V::N); });
          const int64_t at = i + (K - 1) * V::N;
          v[K - 1] = last == V::N ? V::load(read + at) : whole ? end : load_first(read + at, last, A(0));
          formula(vectors, v);
          if (past && last == V::N) {
            each<K>([&](int k) { stream(v[k], written + i + k * V::N); });
            return;
          }
          each<K - 1>([&](int k) { v[k].store(written + i + k * V::N); });
          if (last == V::N) v[K - 1].store(written + at);
          else if (whole) v[K - 1].store(written + n - V::N);
          else store_first(v[K - 1], written + at, last);
        });
        if (of_y.element == 1) continue;
#pragma GCC unroll 8
        for (int64_t i = 0; i < n; ++i) to[i * of_y.element] = y_buffer[i];
      }
    });
    end_streams(streams);
  });
}

// grad_output is loaded whatever the saved value is: loads masked by that wait for it to come from memory (relu of 20
// MB x0.85 to x0.95 of torch's speed).
template <class S, class F>
FASTNN_INLINE void map2(const ActivationParams& p, const S* g, const S* x, S* y, const F& f) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const LineStrides of_g = p.of_g, of_x = p.of_x, of_y = p.of_y;  // y's elements lie next to each other
  const bool buffered = of_g.element != 1 || of_x.element != 1;
  const bool streams = p.size >= kStreamedBackward;
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
        const bool whole = n >= V::N && !kMasked<S>;
        const bool past = streams && uintptr_t(written) % 64 == 0;
        for_groups<V::N>(n, [=](auto vectors, int64_t i, int last) __attribute__((always_inline)) {
          constexpr int K = vectors.count;
          V v[K], s[K];
          each<K - 1>([&](int k) {
            v[k] = {in_register(V::load(a + i + k * V::N).v)};
            s[k] = V::load(b + i + k * V::N);
          });
          const int lanes = whole ? V::N : last;
          const int64_t at = i + (K - 1) * V::N - (lanes - last);
          v[K - 1] = {in_register(load_some(a + at, lanes, A(0)).v)};
          s[K - 1] = load_some(b + at, lanes, A(0));
          formula(vectors, v, s);
          if (past && last == V::N) {
            each<K>([&](int k) { stream(v[k], written + i + k * V::N); });
            return;
          }
          each<K - 1>([&](int k) { v[k].store(written + i + k * V::N); });
          store_some(v[K - 1], written + at, lanes);
        });
      }
    });
    end_streams(streams);
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
           [slope](auto vectors, V* x)
               __attribute__((always_inline)) { value<decltype(kind)::kind, S, vectors.count>(x, slope); });
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
           [slope](auto vectors, V* g, const V* s)
               __attribute__((always_inline)) { derivative<decltype(kind)::kind, S, vectors.count>(g, s, slope); });
      return Status::ok;
    });
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
