// Convolution by its definition: a thread per output (or input) pixel, a block per weight. For groups of few channels,
// where a matrix product would be mostly padding; they are bound by memory.
#include "conv2d_direct.h"

#include "device/index.h"
#include "device/reduce.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;

// A pixel as (n, channel, row, column), neighbouring threads along what lies together in memory.
struct Pixels {
  Divisor channels, height, width;
  bool channels_last;

  __device__ __forceinline__ void split(int i, int& n, int& c, int& h, int& w) const {
    if (channels_last) {
      n = height.divide(width.divide(channels.divide(i, c), w), h);
    } else {
      n = channels.divide(height.divide(width.divide(i, w), h), c);
    }
  }
};

template <class F>
__device__ __forceinline__ void for_items(int64_t count, const F& f) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    f(i);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    conv2d_direct_forward_kernel(const __grid_constant__ Conv2dParams p, const __grid_constant__ Epilogue e,
                                 Pixels pixels, int64_t count) {
  const S *const x = static_cast<const S*>(p.input), *const weight = static_cast<const S*>(p.weight),
                 *const bias = static_cast<const S*>(p.bias);
  const int group_c = int(p.C) / int(p.groups), group_k = int(p.K) / int(p.groups);
  for_items(count, [&](int64_t i) {
    int n, k, o, q;
    pixels.split(int(i), n, k, o, q);
    const int c0 = k / group_k * group_c;
    const int64_t h0 = o * p.stride_h - p.pad_h, w0 = q * p.stride_w - p.pad_w;
    acc_t<S> sum = bias ? to_acc(bias[k]) : 0;
    for (int c = 0; c < group_c; ++c)
      for (int r = 0; r < p.R; ++r) {
        const int64_t h = h0 + r * p.dilation_h;
        if (uint64_t(h) >= uint64_t(p.H)) continue;
        const S* const row = x + n * p.input_stride_n + (c0 + c) * p.input_stride_c + h * p.input_stride_h;
        const S* const taps = weight + k * p.weight_stride_k + c * p.weight_stride_c + r * p.weight_stride_r;
        for (int s = 0; s < p.S; ++s) {
          const int64_t w = w0 + s * p.dilation_w;
          if (uint64_t(w) < uint64_t(p.W))
            sum += to_acc(row[w * p.input_stride_w]) * to_acc(taps[s * p.weight_stride_s]);
        }
      }
    const int64_t at = output_at(p, n, k, o, q);
    if (e.residual) sum += to_acc(static_cast<const S*>(e.residual)[at]);
    static_cast<S*>(p.output)[at] = from_acc<S>(e.clamps ? clamp(sum, e) : sum);
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    conv2d_direct_grad_input_kernel(const __grid_constant__ Conv2dParams p, Pixels pixels, Divisor stride_h,
                                    Divisor stride_w, int64_t count) {
  const S *const g = static_cast<const S*>(p.grad_output), *const weight = static_cast<const S*>(p.weight);
  const int group_c = int(p.C) / int(p.groups), group_k = int(p.K) / int(p.groups);
  for_items(count, [&](int64_t i) {
    int n, c, h, w, rest;
    pixels.split(int(i), n, c, h, w);
    const int group = c / group_c;
    acc_t<S> sum = 0;
    for (int r = 0; r < p.R; ++r) {
      const int at_h = h + int(p.pad_h) - r * int(p.dilation_h);
      if (at_h < 0) break;
      const int o = stride_h.divide(at_h, rest);
      if (rest || o >= p.P) continue;
      for (int s = 0; s < p.S; ++s) {
        const int at_w = w + int(p.pad_w) - s * int(p.dilation_w);
        if (at_w < 0) break;
        const int q = stride_w.divide(at_w, rest);
        if (rest || q >= p.Q) continue;
        for (int k = group * group_k; k < (group + 1) * group_k; ++k)
          sum += to_acc(g[output_at(p, n, k, o, q)]) * to_acc(weight[weight_at(p, k, c % group_c, r, s)]);
      }
    }
    static_cast<S*>(p.grad_input)[input_at(p, n, c, h, w)] = from_acc<S>(sum);
  });
}

// A block per weight.
template <class S>
__global__ void __launch_bounds__(kThreads)
    conv2d_direct_grad_weight_kernel(const __grid_constant__ Conv2dParams p, Divisor height, Divisor width) {
  const int group_c = int(p.C) / int(p.groups), group_k = int(p.K) / int(p.groups), positions = int(p.P * p.Q);
  const S *const g = static_cast<const S*>(p.grad_output), *const x = static_cast<const S*>(p.input);
  for (int64_t b = blockIdx.x; b < p.K * group_c * p.R * p.S; b += gridDim.x) {
    const int s = int(b % p.S), r = int(b / p.S % p.R), c = int(b / p.S / p.R % group_c);
    const int64_t k = b / p.S / p.R / group_c, channel = k / group_k * group_c + c;
    acc_t<S> sum = 0;
    for (int64_t n = 0; n < p.N; ++n)
#pragma unroll 1  // four at a time spill registers
      for (int i = threadIdx.x; i < positions; i += kThreads) {
        int q;
        const int o = width.divide(i, q);
        const int64_t h = o * p.stride_h - p.pad_h + r * p.dilation_h, w = q * p.stride_w - p.pad_w + s * p.dilation_w;
        if (uint64_t(h) < uint64_t(p.H) && uint64_t(w) < uint64_t(p.W))
          sum += to_acc(g[output_at(p, n, k, o, q)]) * to_acc(x[input_at(p, n, channel, h, w)]);
      }
    sum = block_reduce(sum, acc_t<S>(0), Add{});
    if (threadIdx.x == 0) static_cast<S*>(p.grad_weight)[weight_at(p, k, c, r, s)] = from_acc<S>(sum);
  }
}

// A block per output channel.
template <class S>
__global__ void __launch_bounds__(kThreads)
    conv2d_grad_bias_kernel(const __grid_constant__ Conv2dParams p, Divisor width) {
  const int positions = int(p.P * p.Q);
  for (int64_t k = blockIdx.x; k < p.K; k += gridDim.x) {
    const S* const g = static_cast<const S*>(p.grad_output) + k * p.output_stride_k;
    acc_t<S> sum = 0;
    for (int64_t n = 0; n < p.N; ++n)
      for (int i = threadIdx.x; i < positions; i += kThreads) {
        int q;
        const int o = width.divide(i, q);
        sum += to_acc(g[n * p.output_stride_n + o * p.output_stride_p + q * p.output_stride_q]);
      }
    sum = block_reduce(sum, acc_t<S>(0), Add{});
    if (threadIdx.x == 0) static_cast<S*>(p.grad_bias)[k] = from_acc<S>(sum);
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

template <class S>
Status direct(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream) {
  const bool forward = p.pass == Conv2dPass::forward;
  if (p.pass == Conv2dPass::grad_weight)
    return launch(conv2d_direct_grad_weight_kernel<S>, grid_of(p.K * (p.C / p.groups) * p.R * p.S), dim3(kThreads), 0,
                  stream, p, Divisor(p.P), Divisor(p.Q));
  const int64_t count = forward ? p.N * p.K * p.P * p.Q : p.N * p.C * p.H * p.W;
  if (count > kMaxIndex) return Status::invalid_argument;
  if (forward)
    return launch(conv2d_direct_forward_kernel<S>, grid_of(ceil_div(count, kThreads)), dim3(kThreads), 0, stream, p, e,
                  Pixels{Divisor(p.K), Divisor(p.P), Divisor(p.Q), p.output_stride_k == 1}, count);
  return launch(conv2d_direct_grad_input_kernel<S>, grid_of(ceil_div(count, kThreads)), dim3(kThreads), 0, stream, p,
                Pixels{Divisor(p.C), Divisor(p.H), Divisor(p.W), p.input_stride_c == 1}, Divisor(p.stride_h),
                Divisor(p.stride_w), count);
}

template <class S>
Status direct_grad_bias(const Conv2dParams& p, CUstream_st* stream) {
  return launch(conv2d_grad_bias_kernel<S>, grid_up_to(p.K), dim3(kThreads), 0, stream, p, Divisor(p.Q));
}

template Status direct<float>(const Conv2dParams&, const Epilogue&, CUstream_st*);
template Status direct<double>(const Conv2dParams&, const Epilogue&, CUstream_st*);
template Status direct<bf16>(const Conv2dParams&, const Epilogue&, CUstream_st*);
template Status direct<f16>(const Conv2dParams&, const Epilogue&, CUstream_st*);
template Status direct_grad_bias<float>(const Conv2dParams&, CUstream_st*);
template Status direct_grad_bias<double>(const Conv2dParams&, CUstream_st*);
template Status direct_grad_bias<bf16>(const Conv2dParams&, CUstream_st*);
template Status direct_grad_bias<f16>(const Conv2dParams&, CUstream_st*);

}  // namespace fastnn::cuda
