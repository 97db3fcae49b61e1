// Pointwise activations: one formula per kind, one loop for all.
#include "../activation.h"

#include "device/dtype.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;  // at least two blocks: the bound under which no call of a division spills registers

// ---- formulas ------------------------------------------------------------------------------------------------------

template <class A>
constexpr A kSqrt1_2 = A(0.70710678118654752440);
template <class A>
constexpr A kInvSqrt2Pi = A(0.39894228040143267794);

__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }
template <class A>
__device__ __forceinline__ A sigmoid_of(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

template <Activation K, class A>
__device__ __forceinline__ A value(A x, A slope) {
  if constexpr (K == Activation::relu) return x < A(0) ? A(0) : x;  // NaN passes
  if constexpr (K == Activation::relu6) return x < A(0) ? A(0) : x > A(6) ? A(6) : x;
  if constexpr (K == Activation::leaky_relu) return x > A(0) ? x : x * slope;
  if constexpr (K == Activation::sigmoid) return sigmoid_of(x);
  if constexpr (K == Activation::tanh) return tanh_of(x);
  if constexpr (K == Activation::gelu) return x * A(0.5) * (A(1) + erf_of(x * kSqrt1_2<A>));
  if constexpr (K == Activation::gelu_tanh)
    return A(0.5) * x * (A(1) + tanh_of(A(kSqrt2OverPi) * (x + A(kGeluCubic) * x * x * x)));
  if constexpr (K == Activation::silu) return x / (A(1) + exp_of(-x));
  return A(0);
}

// grad_input from grad_output and what forward saved (ActivationParams::saved).
template <Activation K, class A>
__device__ __forceinline__ A derivative(A g, A s, A slope) {
  if constexpr (K == Activation::relu) return s <= A(0) ? A(0) : g;
  if constexpr (K == Activation::relu6) return s > A(0) && s < A(6) ? g : A(0);
  if constexpr (K == Activation::leaky_relu) return s > A(0) ? g : g * slope;
  if constexpr (K == Activation::sigmoid) return g * (A(1) - s) * s;
  if constexpr (K == Activation::tanh) return g * (A(1) - s * s);
  if constexpr (K == Activation::gelu) {
    const A cdf = A(0.5) * (A(1) + erf_of(s * kSqrt1_2<A>));
    return g * (cdf + s * kInvSqrt2Pi<A> * exp_of(s * s * A(-0.5)));
  }
  if constexpr (K == Activation::gelu_tanh) {
    const A square = s * s;
    const A t = tanh_of(A(kSqrt2OverPi) * (s + A(kGeluCubic) * square * s));
    const A inner = A(kSqrt2OverPi) * (A(1) + A(3) * A(kGeluCubic) * square);
    return g * (A(0.5) * (A(1) + t) + A(0.5) * s * (A(1) - t * t) * inner);
  }
  if constexpr (K == Activation::silu) {
    const A sig = sigmoid_of(s);
    return g * sig * (A(1) + s * (A(1) - sig));
  }
  return A(0);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// Elements of `size` by N; the last ones, size % N, one by one. `a` is the input, or grad_output beside `saved`.
template <class S, Activation K, int N, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2)
    activation_kernel(const S* a, const S* saved, S* out, int64_t size, acc_t<S> slope) {
  const auto apply = [&](S x, S s) {
    if constexpr (kBackward) return from_acc<S>(derivative<K>(to_acc(x), to_acc(s), slope));
    else return from_acc<S>(value<K>(to_acc(x), slope));
  };
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t packs = size / N;
  for (int64_t i = thread; i < packs; i += threads) {
    Pack<S, N> x = load_pack<N>(a + i * N);
    Pack<S, N> s = x;
    if constexpr (kBackward) s = load_pack<N>(saved + i * N);
#pragma unroll
    for (int n = 0; n < N; ++n) x.at[n] = apply(x.at[n], s.at[n]);
    store_pack(out + i * N, x);
  }
  for (int64_t i = packs * N + thread; i < size; i += threads) out[i] = apply(a[i], kBackward ? saved[i] : a[i]);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

template <Activation K, bool kBackward>
Status run(const ActivationParams& p, CUstream_st* stream) {
  const void* const a = kBackward ? p.grad_output : p.input;
  const void* const saved = kBackward ? p.saved : nullptr;
  void* const out = kBackward ? p.grad_input : p.output;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int N = kPack<S>;
    const bool packed = aligned16(a, saved, out);
    auto* kernel = packed ? activation_kernel<S, K, N, kBackward> : activation_kernel<S, K, 1, kBackward>;
    return launch(kernel, strided_grid_of(ceil_div(p.size, packed ? N : 1), kThreads), dim3(kThreads), 0, stream,
                  static_cast<const S*>(a), static_cast<const S*>(saved), static_cast<S*>(out), p.size,
                  acc_t<S>(p.slope));
  });
}

template <bool kBackward>
Status run_kind(const ActivationParams& p, CUstream_st* stream) {
  switch (p.kind) {
    case Activation::relu: return run<Activation::relu, kBackward>(p, stream);
    case Activation::relu6: return run<Activation::relu6, kBackward>(p, stream);
    case Activation::leaky_relu: return run<Activation::leaky_relu, kBackward>(p, stream);
    case Activation::sigmoid: return run<Activation::sigmoid, kBackward>(p, stream);
    case Activation::tanh: return run<Activation::tanh, kBackward>(p, stream);
    case Activation::gelu: return run<Activation::gelu, kBackward>(p, stream);
    case Activation::gelu_tanh: return run<Activation::gelu_tanh, kBackward>(p, stream);
    case Activation::silu: return run<Activation::silu, kBackward>(p, stream);
    default: return Status::invalid_argument;
  }
}

}  // namespace

Status activation_forward(const ActivationParams& p, CUstream_st* stream) { return run_kind<false>(p, stream); }

Status activation_backward(const ActivationParams& p, CUstream_st* stream) { return run_kind<true>(p, stream); }

}  // namespace fastnn::cuda
