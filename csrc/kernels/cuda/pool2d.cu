// Max, average and adaptive pooling. A plane is one channel (contiguous) or one
// image (channels_last); a thread computes N neighbouring channels of one output,
// or of one input in the backward pass, which gathers and so needs no atomics.
#include "../pool2d.h"

#include "device/dtype.h"
#include "device/index.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;

// ---- windows along one dimension -----------------------------------------------------------------------------------

struct Axis {
  int in, out, kernel, stride, padding, dilation;
  bool adaptive;
  Divisor strides, dilations, ins, outs;

  Axis(const PoolAxis& a, bool adaptive)
      : in(int(a.in)),
        out(int(a.out)),
        kernel(int(a.kernel)),
        stride(int(a.stride)),
        padding(int(a.padding)),
        dilation(int(a.dilation)),
        adaptive(adaptive),
        strides(max64(1, a.stride)),
        dilations(max64(1, a.dilation)),
        ins(max64(1, a.in)),
        outs(max64(1, a.out)) {}

  // Window o has taps at first(o) + i * dilation; those with begin(o) <= i < end(o) lie inside the input.
  __device__ __forceinline__ int first(int o) const { return adaptive ? outs.quotient(o * in) : o * stride - padding; }
  __device__ __forceinline__ int begin(int o) const {
    const int at = first(o);
    return at >= 0 ? 0 : dilations.quotient(-at + dilation - 1);
  }
  __device__ __forceinline__ int end(int o) const {
    const int at = first(o);
    if (adaptive) return outs.quotient((o + 1) * in + out - 1) - at;
    return at >= in ? 0 : min(kernel, dilations.quotient(in - at + dilation - 1));
  }
  // Input x lies between the first and the last tap of windows low(x) <= o < high(x); tap(x, o) is -1 where it falls
  // between two taps.
  __device__ __forceinline__ int low(int x) const {
    if (adaptive) return ins.quotient(x * out);
    const int reach = x + padding - (kernel - 1) * dilation;
    return reach <= 0 ? 0 : strides.quotient(reach + stride - 1);
  }
  __device__ __forceinline__ int high(int x) const {
    if (adaptive) return ins.quotient((x + 1) * out + in - 1);
    return min(out, strides.quotient(x + padding) + 1);
  }
  __device__ __forceinline__ int tap(int x, int o) const {
    int rest;
    const int tap = dilations.divide(x - first(o), rest);
    return rest == 0 ? tap : -1;
  }
  // What window o counts in an average along this dimension.
  __device__ __forceinline__ int count(int o, bool include_pad) const {
    if (adaptive) return end(o);
    const int from = first(o), to = min(from + kernel, in + padding);
    return include_pad ? to - from : min(to, in) - max(from, 0);
  }
};

// Where a thread works: a pixel of a plane, and the first of its channels.
struct Pixel {
  int plane, row, column, channel;
};

// A pool over planes [rows, columns, inner]: inner is 1, or the channels of a channels_last tensor.
struct Planes {
  Axis h, w;
  int inner, divisor;
  bool include_pad;
  Divisor groups, out_h, out_w, in_h, in_w;  // groups of N channels in a pixel

  Planes(const Pool2dParams& p, int lanes)
      : h(p.h, p.adaptive),
        w(p.w, p.adaptive),
        inner(int(p.channels_last ? p.channels : 1)),
        divisor(int(p.divisor)),
        include_pad(p.count_include_pad),
        groups(max64(1, inner / lanes)),
        out_h(p.h.out),
        out_w(p.w.out),
        in_h(p.h.in),
        in_w(p.w.in) {}

  // The offset of a pixel; it may lie in the padding.
  __device__ __forceinline__ int64_t input_at(const Pixel& at) const {
    return ((int64_t(at.plane) * h.in + at.row) * w.in + at.column) * inner + at.channel;
  }
  __device__ __forceinline__ int64_t output_at(const Pixel& at) const {
    return ((int64_t(at.plane) * h.out + at.row) * w.out + at.column) * inner + at.channel;
  }
  __device__ __forceinline__ int window_size(int oh, int ow) const {
    return divisor ? divisor : h.count(oh, include_pad) * w.count(ow, include_pad);
  }
};

// This thread's of `count` pixels, N channels each, in planes of this size; false past the last.
template <int N>
__device__ __forceinline__ bool find_pixel(int count, const Divisor& groups, const Divisor& rows,
                                           const Divisor& columns, Pixel& at) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return false;
  at.plane = rows.divide(columns.divide(groups.divide(int(item), at.channel), at.column), at.row);
  at.channel *= N;
  return true;
}

template <class S, int N>
__device__ __forceinline__ void store_rounded(S* to, const acc_t<S> (&values)[N]) {
  Pack<S, N> pack;
#pragma unroll
  for (int n = 0; n < N; ++n) pack.at[n] = from_acc<S>(values[n]);
  store_pack(to, pack);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class S, class O, int N>
__global__ void __launch_bounds__(kThreads, 3)
    max_pool2d_forward_kernel(const S* x, S* y, O* offsets, const __grid_constant__ Planes p, int count) {
  using A = acc_t<S>;
  Pixel at;
  if (!find_pixel<N>(count, p.groups, p.out_h, p.out_w, at)) return;
  const int i0 = p.h.begin(at.row), i1 = p.h.end(at.row), j0 = p.w.begin(at.column), j1 = p.w.end(at.column);
  const S* const corner = x + p.input_at({at.plane, p.h.first(at.row), p.w.first(at.column), at.channel});
  A best[N];
  int tap[N];
#pragma unroll
  for (int n = 0; n < N; ++n) best[n] = -kInf<A>, tap[n] = i0 * p.w.kernel + j0;
  for (int i = i0; i < i1; ++i)
    for (int j = j0; j < j1; ++j) {
      const Pack<S, N> pack = load_pack<N>(corner + (int64_t(i) * p.h.dilation * p.w.in + j * p.w.dilation) * p.inner);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A v = to_acc(pack.at[n]);
        if (v > best[n] || v != v) best[n] = v, tap[n] = i * p.w.kernel + j;  // torch's rule: larger, or NaN
      }
    }
  const int64_t to = p.output_at(at);
  store_rounded(y + to, best);
  if (!offsets) return;
  Pack<O, N> taps;
#pragma unroll
  for (int n = 0; n < N; ++n) taps.at[n] = O(tap[n]);
  store_pack(offsets + to, taps);
}

template <class S, class O, int N>
__global__ void __launch_bounds__(kThreads, 3)
    max_pool2d_backward_kernel(const S* grad, const O* offsets, S* dx, const __grid_constant__ Planes p, int count) {
  using A = acc_t<S>;
  Pixel at;
  if (!find_pixel<N>(count, p.groups, p.in_h, p.in_w, at)) return;
  const int64_t plane = p.output_at({at.plane, 0, 0, at.channel});
  A sum[N] = {};
  for (int oh = p.h.low(at.row); oh < p.h.high(at.row); ++oh) {
    const int i = p.h.tap(at.row, oh);
    if (i < 0) continue;
    for (int ow = p.w.low(at.column); ow < p.w.high(at.column); ++ow) {
      const int j = p.w.tap(at.column, ow);
      if (j < 0) continue;
      const int64_t from = plane + (int64_t(oh) * p.w.out + ow) * p.inner;
      const Pack<S, N> g = load_pack<N>(grad + from);
      const Pack<O, N> taps = load_pack<N>(offsets + from);
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (int(taps.at[n]) == i * p.w.kernel + j) sum[n] += to_acc(g.at[n]);
    }
  }
  store_rounded(dx + p.input_at(at), sum);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads, 3)
    avg_pool2d_forward_kernel(const S* x, S* y, const __grid_constant__ Planes p, int count) {
  using A = acc_t<S>;
  Pixel at;
  if (!find_pixel<N>(count, p.groups, p.out_h, p.out_w, at)) return;
  const int i0 = p.h.begin(at.row), i1 = p.h.end(at.row), j0 = p.w.begin(at.column), j1 = p.w.end(at.column);
  const S* const corner = x + p.input_at({at.plane, p.h.first(at.row), p.w.first(at.column), at.channel});
  A sum[N] = {};
  for (int i = i0; i < i1; ++i)
    for (int j = j0; j < j1; ++j) {
      const Pack<S, N> pack = load_pack<N>(corner + (int64_t(i) * p.w.in + j) * p.inner);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += to_acc(pack.at[n]);
    }
  const A size = A(p.window_size(at.row, at.column));
#pragma unroll
  for (int n = 0; n < N; ++n) sum[n] /= size;
  store_rounded(y + p.output_at(at), sum);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads, 3)
    avg_pool2d_backward_kernel(const S* grad, S* dx, const __grid_constant__ Planes p, int count) {
  using A = acc_t<S>;
  Pixel at;
  if (!find_pixel<N>(count, p.groups, p.in_h, p.in_w, at)) return;
  const int64_t plane = p.output_at({at.plane, 0, 0, at.channel});
  A sum[N] = {};
  for (int oh = p.h.low(at.row); oh < p.h.high(at.row); ++oh)
    for (int ow = p.w.low(at.column); ow < p.w.high(at.column); ++ow) {
      const A size = A(p.window_size(oh, ow));
      const Pack<S, N> g = load_pack<N>(grad + plane + (int64_t(oh) * p.w.out + ow) * p.inner);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += to_acc(g.at[n]) / size;
    }
  store_rounded(dx + p.input_at(at), sum);
}

template <class O>
__global__ void __launch_bounds__(kThreads, 3)
    max_pool2d_indices_kernel(const O* offsets, int64_t* indices, const __grid_constant__ Planes p, int count) {
  Pixel at;
  if (!find_pixel<1>(count, p.groups, p.out_h, p.out_w, at)) return;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int tap = int(offsets[item]), i = tap / p.w.kernel, j = tap % p.w.kernel;
  indices[item] = int64_t(p.h.first(at.row) + i * p.h.dilation) * p.w.in + p.w.first(at.column) + j * p.w.dilation;
}

// ---- launchers -----------------------------------------------------------------------------------------------------

bool indexable(const PoolAxis& a) {
  return a.in <= kMaxIndex / 2 && a.out <= kMaxIndex / 2 && (a.kernel - 1) * a.dilation < kMaxIndex / 2 &&
         a.stride <= kMaxIndex / 2;
}
bool adaptable(const PoolAxis& a) { return (a.in + 1) * (a.out + 1) <= kMaxIndex; }

// Calls f(part, count) on runs of planes with at most 2^31 - 1 elements each; `count` counts inputs or outputs.
template <class S, class F>
Status for_planes(const Pool2dParams& p, bool inputs, const F& f) {
  if (!indexable(p.h) || !indexable(p.w) || p.divisor > kMaxIndex) return Status::invalid_argument;
  if (p.adaptive && !(adaptable(p.h) && adaptable(p.w))) return Status::invalid_argument;
  const int64_t inner = p.channels_last ? p.channels : 1, planes = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t in = p.h.in * p.w.in * inner, out = p.h.out * p.w.out * inner;
  if (max64(in, out) > kMaxIndex) return Status::invalid_argument;
  const int64_t most = max64(1, longest_run() / max64(1, max64(in, out)));
  for (int64_t first = 0; first < planes; first += most) {
    Pool2dParams part = p;
    const int64_t inputs_before = first * in, outputs_before = first * out;
    advance(part.input, inputs_before * sizeof(S)), advance(part.grad_input, inputs_before * sizeof(S));
    advance(part.output, outputs_before * sizeof(S)), advance(part.grad_output, outputs_before * sizeof(S));
    advance(part.offsets, outputs_before * (p.wide ? 4 : 1));
    advance(part.indices, outputs_before * sizeof(int64_t));
    const int64_t count = min64(most, planes - first) * (inputs ? in : out);
    if (count == 0) return Status::ok;
    if (const Status status = f(part, count); status != Status::ok) return status;
  }
  return Status::ok;
}

// Calls f(Tag<S>, Tag<O>, Constant<N>, part, count): the element
// type, the type of a window tap, the channels of a thread.
template <class F>
Status with_types(const Pool2dParams& p, bool inputs, const F& f) {
  return dispatch_dtype(p.dtype, [&](auto s) {
    using S = typename decltype(s)::type;
    return for_planes<S>(p, inputs, [&](const Pool2dParams& part, int64_t count) {
      constexpr int N = kPack<S>;
      const bool packed = p.channels_last && p.channels % N == 0 &&
                          aligned16(part.input, part.output, part.grad_output, part.grad_input, part.offsets);
      const auto with_taps = [&](auto taps) {
        return packed ? f(s, taps, Constant<N>{}, part, int(count / N)) : f(s, taps, Constant<1>{}, part, int(count));
      };
      return p.wide ? with_taps(Tag<int32_t>{}) : with_taps(Tag<uint8_t>{});
    });
  });
}

template <class... P, class... A>
Status launch_items(void (*kernel)(P...), int count, CUstream_st* stream, const A&... args) {
  return launch(kernel, grid_of(ceil_div(count, kThreads)), dim3(kThreads), 0, stream, args..., count);
}

}  // namespace

Status max_pool2d_forward(const Pool2dParams& whole, CUstream_st* stream) {
  return with_types(whole, false, [&](auto s, auto o, auto n, const Pool2dParams& p, int count) {
    using S = typename decltype(s)::type;
    using O = typename decltype(o)::type;
    return launch_items(max_pool2d_forward_kernel<S, O, n.value>, count, stream, static_cast<const S*>(p.input),
                        static_cast<S*>(p.output), static_cast<O*>(p.offsets), Planes(p, n.value));
  });
}

Status max_pool2d_backward(const Pool2dParams& whole, CUstream_st* stream) {
  return with_types(whole, true, [&](auto s, auto o, auto n, const Pool2dParams& p, int count) {
    using S = typename decltype(s)::type;
    using O = typename decltype(o)::type;
    return launch_items(max_pool2d_backward_kernel<S, O, n.value>, count, stream, static_cast<const S*>(p.grad_output),
                        static_cast<const O*>(p.offsets), static_cast<S*>(p.grad_input), Planes(p, n.value));
  });
}

Status avg_pool2d_forward(const Pool2dParams& whole, CUstream_st* stream) {
  return with_types(whole, false, [&](auto s, auto, auto n, const Pool2dParams& p, int count) {
    using S = typename decltype(s)::type;
    return launch_items(avg_pool2d_forward_kernel<S, n.value>, count, stream, static_cast<const S*>(p.input),
                        static_cast<S*>(p.output), Planes(p, n.value));
  });
}

Status avg_pool2d_backward(const Pool2dParams& whole, CUstream_st* stream) {
  return with_types(whole, true, [&](auto s, auto, auto n, const Pool2dParams& p, int count) {
    using S = typename decltype(s)::type;
    return launch_items(avg_pool2d_backward_kernel<S, n.value>, count, stream, static_cast<const S*>(p.grad_output),
                        static_cast<S*>(p.grad_input), Planes(p, n.value));
  });
}

Status max_pool2d_indices(const Pool2dParams& whole, CUstream_st* stream) {
  return for_planes<float>(whole, false, [&](const Pool2dParams& p, int64_t count) {
    const auto with_taps = [&](auto o) {
      using O = typename decltype(o)::type;
      return launch_items(max_pool2d_indices_kernel<O>, int(count), stream, static_cast<const O*>(p.offsets), p.indices,
                          Planes(p, 1));
    };
    return p.wide ? with_taps(Tag<int32_t>{}) : with_taps(Tag<uint8_t>{});
  });
}

}  // namespace fastnn::cuda
