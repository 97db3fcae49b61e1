// Optimizer steps: each rule is a few lines on one vector of elements, the walk over the tensors is common to all.
#include "../../optim.h"

#include "../../parallel.h"
#include "isa.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> get(const void* base, int64_t at, int lanes) {
  const S* p = static_cast<const S*>(base) + at;
  return lanes == Vec<A>::N ? Vec<A>::load(p) : Vec<A>::load_n(p, lanes);
}
template <class S, class A = acc_t<S>>
FASTNN_INLINE void put(void* base, int64_t at, int lanes, Vec<A> v) {
  S* p = static_cast<S*>(base) + at;
  if (lanes == Vec<A>::N) v.store(p);
  else v.store_n(p, lanes);
}

// Applies f to each vector of [from, to): f(offset, lanes), lanes == N but for the tail.
template <int N, class F>
FASTNN_INLINE void for_vectors(int64_t from, int64_t to, const F& f) {
  int64_t i = from;
  for (; i + N <= to; i += N) f(i, N);
  if (i < to) f(i, int(to - i));
}

// Has the caches fetch what lies a few lines ahead of element i in every array: the hardware follows each stream to the
// end of its page alone. On Zen 5, a page ahead, Adam of 575 k parameters took 155-165 us instead of 205-250 out of the
// caches. For four arrays in Zen 4's smaller L1 a page is too far: 20 M took 15.5-22 ms, not 12-14, 2 M 1.3-1.9, not
// 1.0-1.2.
template <class S>
FASTNN_INLINE void fetch_ahead(const OptimTensor& t, int64_t i, int64_t to) {
  constexpr int64_t kAhead = 512 / sizeof(S);
  if (i + kAhead >= to) return;
  const auto fetch = [&](const void* base) __attribute__((always_inline)) {
    if (base) __builtin_prefetch(static_cast<const S*>(base) + i + kAhead);
  };
  fetch(t.param), fetch(t.grad);
#pragma GCC unroll 3
  for (const void* state : t.state) fetch(state);
}

// The larger of two vectors; NaN in either gives NaN, as torch.maximum does.
template <class A>
FASTNN_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return {a.v == a.v ? max(a, b).v : a.v};
}

// The gradient a rule works on: its sign, and the L2 penalty.
template <class S, class V = Vec<acc_t<S>>>
struct Gradient {
  const V decay;
  const bool penalised, maximize;
  const void* base;

  FASTNN_VEC_FN Gradient(const OptimParams& o, const OptimTensor& t)
      : decay(V::set1(o.weight_decay)), penalised(o.weight_decay != 0), maximize(o.maximize), base(t.grad) {}
  FASTNN_VEC_FN V operator()(int64_t i, int lanes, V param) const {
    V g = get<S>(base, i, lanes);
    if (maximize) g.v = -g.v;
    return penalised ? fma(decay, param, g) : g;
  }
};

// ---- rules: elements [from, to) of one tensor ----------------------------------------------------------------------
// Each has its own OptimTensor: pointers in one of the caller's would be read anew after every store.

// v moves towards g^2 by a fixed share of g^2, whatever the distance: Yogi's second moment.
template <class A>
FASTNN_INLINE Vec<A> yogi_moment(Vec<A> v, Vec<A> g, Vec<A> rest) {
  const Vec<A> g2 = g * g, distance = v - g2;
  const Vec<A> towards = {distance.v > 0 ? g2.v : distance.v < 0 ? -g2.v : distance.v};  // keeps 0 and NaN
  return v - rest * towards;
}

template <class S, bool kYogi>
void adam(const OptimParams& o, const OptimTensor t, int64_t from, int64_t to) {
  using V = Vec<acc_t<S>>;
  const Gradient<S> gradient(o, t);
  const V rest1 = V::set1(1 - o.beta1), beta2 = V::set1(o.beta2), rest2 = V::set1(1 - o.beta2), eps = V::set1(o.eps);
  const V step = V::set1(-t.step_size), denom_scale = V::set1(t.denom_scale), param_scale = V::set1(o.param_scale);
  const bool decoupled = o.param_scale != 1, amsgrad = t.state[2] != nullptr;
  for_vectors<V::N>(from, to, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    fetch_ahead<S>(t, i, to);
    V param = get<S>(t.param, i, lanes);
    if (decoupled) param = param * param_scale;
    const V g = gradient(i, lanes, param);
    V m = get<S>(t.state[0], i, lanes), v = get<S>(t.state[1], i, lanes);
    m = fma(rest1, g - m, m);
    v = kYogi ? yogi_moment(v, g, rest2) : fma(rest2 * g, g, beta2 * v);
    put<S>(t.state[0], i, lanes, m);
    put<S>(t.state[1], i, lanes, v);
    if (amsgrad) {
      v = maximum(get<S>(t.state[2], i, lanes), v);
      put<S>(t.state[2], i, lanes, v);
    }
    put<S>(t.param, i, lanes, fma(step, m / fma(sqrt(v), denom_scale, eps), param));
  });
}

template <class S>
void sgd(const OptimParams& o, const OptimTensor t, int64_t from, int64_t to) {
  using V = Vec<acc_t<S>>;
  const Gradient<S> gradient(o, t);
  const V momentum = V::set1(o.beta1), undamped = V::set1(o.beta2), step = V::set1(-t.step_size);
  const bool buffered = t.state[0] != nullptr, first = o.first, nesterov = o.nesterov;
  for_vectors<V::N>(from, to, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    fetch_ahead<S>(t, i, to);
    const V param = get<S>(t.param, i, lanes);
    V g = gradient(i, lanes, param);
    if (buffered) {
      const V buffer = first ? g : fma(undamped, g, momentum * get<S>(t.state[0], i, lanes));
      put<S>(t.state[0], i, lanes, buffer);
      g = nesterov ? fma(momentum, buffer, g) : buffer;
    }
    put<S>(t.param, i, lanes, fma(step, g, param));
  });
}

template <class S>
void adagrad(const OptimParams& o, const OptimTensor t, int64_t from, int64_t to) {
  using V = Vec<acc_t<S>>;
  const Gradient<S> gradient(o, t);
  const V step = V::set1(-t.step_size), eps = V::set1(o.eps);
  for_vectors<V::N>(from, to, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    fetch_ahead<S>(t, i, to);
    const V param = get<S>(t.param, i, lanes), g = gradient(i, lanes, param);
    const V sum = fma(g, g, get<S>(t.state[0], i, lanes));
    put<S>(t.state[0], i, lanes, sum);
    put<S>(t.param, i, lanes, param + step * g / (sqrt(sum) + eps));
  });
}

template <class S>
void rmsprop(const OptimParams& o, const OptimTensor t, int64_t from, int64_t to) {
  using V = Vec<acc_t<S>>;
  const Gradient<S> gradient(o, t);
  const V alpha = V::set1(o.beta2), rest = V::set1(1 - o.beta2), momentum = V::set1(o.beta1);
  const V step = V::set1(-t.step_size), eps = V::set1(o.eps);
  const bool buffered = t.state[1] != nullptr, centered = t.state[2] != nullptr;
  for_vectors<V::N>(from, to, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    fetch_ahead<S>(t, i, to);
    const V param = get<S>(t.param, i, lanes), g = gradient(i, lanes, param);
    V v = get<S>(t.state[0], i, lanes);
    v = fma(rest * g, g, alpha * v);
    put<S>(t.state[0], i, lanes, v);
    if (centered) {
      V mean = get<S>(t.state[2], i, lanes);
      mean = fma(rest, g - mean, mean);
      put<S>(t.state[2], i, lanes, mean);
      v = v - mean * mean;
    }
    V update = g / (sqrt(v) + eps);
    if (buffered) {
      update = fma(momentum, get<S>(t.state[1], i, lanes), update);
      put<S>(t.state[1], i, lanes, update);
    }
    put<S>(t.param, i, lanes, fma(step, update, param));
  });
}

template <class S>
void adadelta(const OptimParams& o, const OptimTensor t, int64_t from, int64_t to) {
  using V = Vec<acc_t<S>>;
  const Gradient<S> gradient(o, t);
  const V rho = V::set1(o.beta2), rest = V::set1(1 - o.beta2), step = V::set1(-t.step_size), eps = V::set1(o.eps);
  for_vectors<V::N>(from, to, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    fetch_ahead<S>(t, i, to);
    const V param = get<S>(t.param, i, lanes), g = gradient(i, lanes, param);
    V v = get<S>(t.state[0], i, lanes), acc = get<S>(t.state[1], i, lanes);
    v = fma(rest * g, g, rho * v);
    const V delta = sqrt(acc + eps) / sqrt(v + eps) * g;
    acc = fma(rest * delta, delta, rho * acc);
    put<S>(t.state[0], i, lanes, v);
    put<S>(t.state[1], i, lanes, acc);
    put<S>(t.param, i, lanes, fma(step, delta, param));
  });
}

template <class S>
void scale(const OptimTensor t, int64_t from, int64_t to) {
  using V = Vec<acc_t<S>>;
  const V factor = V::set1(t.step_size);
  for_vectors<V::N>(from, to,
                    [&](int64_t i, int lanes) { put<S>(t.param, i, lanes, get<S>(t.param, i, lanes) * factor); });
}

// ---- norms ---------------------------------------------------------------------------------------------------------

template <class S>
double partial_norm(const S* x, int64_t n, NormKind kind) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int kChains = 4;  // independent sums hide the latency of the addition
  V sums[kChains];
  for (V& sum : sums) sum = V::zero();
  const auto add = [&](V& sum, int64_t i, int lanes) {
    const V v = get<S>(x, i, lanes);
    const V magnitude = {v.v < 0 ? -v.v : v.v};
    sum = kind == NormKind::two ? fma(v, v, sum) : kind == NormKind::one ? sum + magnitude : maximum(magnitude, sum);
  };
  int64_t i = 0;
  for (; i + kChains * V::N <= n; i += kChains * V::N) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) add(sums[c], i + c * V::N, V::N);
  }
  for_vectors<V::N>(i, n, [&](int64_t k, int lanes) { add(sums[0], k, lanes); });
  double total = 0;
  for (const V& sum : sums)
    for (int lane = 0; lane < V::N; ++lane) {
      const double s = sum.v[lane];
      if (kind != NormKind::inf) total += s;
      else if (total == total && !(s <= total)) total = s;  // NaN stays
    }
  return total;
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(tensor, from, to) for pieces that cover every element once. Where a tensor is cut depends on the number of
// threads; no element's result does, because every lane runs the same instructions.
template <class F>
void for_pieces(const OptimParams& p, const F& f) {
  constexpr int64_t kGrain = 1 << 15;
  constexpr int64_t kCut = 64;  // inside a tensor threads part at whole cache lines
  const auto range = [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = p.count;  // the first tensor that reaches beyond `begin`
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (p.tensors[mid].begin + p.tensors[mid].size > begin) high = mid;
      else low = mid + 1;
    }
    for (int64_t i = low; i < p.count && p.tensors[i].begin < end; ++i) {
      const OptimTensor& t = p.tensors[i];
      const int64_t from = begin <= t.begin ? 0 : (begin - t.begin) / kCut * kCut;
      const int64_t to = end >= t.begin + t.size ? t.size : (end - t.begin) / kCut * kCut;
      f(t, from, to);
    }
  };
  if (p.serial) range(0, p.total);
  else parallel_for(0, p.total, kGrain, range);
}

}  // namespace

Status optim_step(const OptimParams& p) {
  for (int64_t i = 0; i < p.count; ++i)
    if (p.tensors[i].dtype > DType::f16) return Status::unsupported_dtype;
  if (p.rule > OptimRule::scale) return Status::invalid_argument;
  for_pieces(p, [&](const OptimTensor& t, int64_t from, int64_t to) {
    dispatch_dtype(t.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      switch (p.rule) {
        case OptimRule::adam: adam<S, false>(p, t, from, to); break;
        case OptimRule::yogi: adam<S, true>(p, t, from, to); break;
        case OptimRule::sgd: sgd<S>(p, t, from, to); break;
        case OptimRule::adagrad: adagrad<S>(p, t, from, to); break;
        case OptimRule::rmsprop: rmsprop<S>(p, t, from, to); break;
        case OptimRule::adadelta: adadelta<S>(p, t, from, to); break;
        case OptimRule::scale: scale<S>(t, from, to); break;
      }
      return Status::ok;
    });
  });
  return Status::ok;
}

Status partial_norms(const NormParams& p) {
  for (int64_t i = 0; i < p.count; ++i)
    if (p.tensors[i].dtype > DType::f16) return Status::unsupported_dtype;
  if (p.kind > NormKind::inf) return Status::invalid_argument;
  parallel_for(0, p.chunks, 2, [&](int64_t begin, int64_t end) {
    int64_t tensor = 0;
    while (tensor + 1 < p.count && p.tensors[tensor + 1].first_chunk <= begin) ++tensor;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (tensor + 1 < p.count && p.tensors[tensor + 1].first_chunk <= chunk) ++tensor;
      const NormTensor& t = p.tensors[tensor];
      const int64_t from = (chunk - t.first_chunk) * kNormChunk;
      dispatch_dtype(t.dtype, [&](auto tag) {
        using S = typename decltype(tag)::type;
        const S* x = static_cast<const S*>(t.data) + from;
        p.partial[chunk] = partial_norm(x, min64(kNormChunk, t.size - from), p.kind);
        return Status::ok;
      });
    }
  });
  return Status::ok;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
