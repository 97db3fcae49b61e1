// Convolution as an implicit matrix product: the operands of device/tile.h read the image, the weights or the gradient
// through their strides, so every layout, stride, dilation and group runs here and nothing is unfolded in memory.
#include "conv2d_direct.h"
#include "device/index.h"
#include "device/reduce.h"
#include "device/tile.h"

namespace fastnn::cuda {
namespace {

// k of the reduced dimension as (channel, tap): the channel varies fastest where channels lie together in memory.
struct Taps {
  Divisor channels, R, S;
  bool channels_fastest;

  Taps(const Conv2dParams& p, int64_t channels, bool channels_fastest)
      : channels(channels), R(p.R), S(p.S), channels_fastest(channels_fastest) {}
  __device__ __forceinline__ void split(int k, int& c, int& r, int& s) const {
    if (channels_fastest) {
      r = S.divide(channels.divide(k, c), s);
    } else {
      c = R.divide(S.divide(k, s), r);
    }
  }
};

// An image position as (n, row, column).
struct Positions {
  Divisor height, width;
  Positions(int64_t height, int64_t width) : height(height), width(width) {}
  __device__ __forceinline__ void split(int i, int& n, int& h, int& w) const {
    n = height.divide(width.divide(i, w), h);
  }
};

// ---- operands ------------------------------------------------------------------------------------------------------

// Weights: a row is an output channel and k an (input channel, tap), or the other way round for the input's gradient.
template <class S>
struct Weights {
  const S* w;  // of this group
  Taps taps;
  int64_t stride_row, stride_c, stride_r, stride_s;
  bool along_k;

  using Row = const S*;
  __device__ __forceinline__ Row row(int r) const { return w + r * stride_row; }
  __device__ __forceinline__ acc_t<S> at(Row w, int k) const {
    int c, r, s;
    taps.split(k, c, r, s);
    return to_acc(w[c * stride_c + r * stride_r + s * stride_s]);
  }
};

// A pixel of one channel at rows and columns that may lie in the padding.
template <class S>
__device__ __forceinline__ acc_t<S> pixel(const S* x, const Conv2dParams& p, int64_t h, int64_t w) {
  if (uint64_t(h) >= uint64_t(p.H) || uint64_t(w) >= uint64_t(p.W)) return 0;
  return to_acc(x[h * p.input_stride_h + w * p.input_stride_w]);
}

// The image under the window: a row is an output position and k an (input channel, tap).
template <class S>
struct Windows {
  const S* x;
  Taps taps;
  Positions outputs;
  Conv2dParams p;
  bool along_k;

  struct Row {
    const S* x;
    int h0, w0;
  };
  __device__ __forceinline__ Row row(int i) const {
    int n, o, q;
    outputs.split(i, n, o, q);
    return {x + n * p.input_stride_n, int(o * p.stride_h - p.pad_h), int(q * p.stride_w - p.pad_w)};
  }
  __device__ __forceinline__ acc_t<S> at(const Row& row, int k) const {
    int c, r, s;
    taps.split(k, c, r, s);
    return pixel(row.x + c * p.input_stride_c, p, row.h0 + r * p.dilation_h, row.w0 + s * p.dilation_w);
  }
};

// The outputs whose windows cover a pixel: a row is an input position and k an (output channel, tap).
template <class S>
struct Covers {
  const S* g;
  Taps taps;
  Positions inputs;
  Divisor stride_h, stride_w;
  Conv2dParams p;
  bool along_k;

  struct Row {
    const S* g;
    int h, w;
  };
  __device__ __forceinline__ Row row(int i) const {
    int n, h, w;
    inputs.split(i, n, h, w);
    return {g + n * p.output_stride_n, h + int(p.pad_h), w + int(p.pad_w)};
  }
  __device__ __forceinline__ acc_t<S> at(const Row& row, int k) const {
    int c, r, s, rest_h, rest_w;
    taps.split(k, c, r, s);
    const int h = row.h - r * int(p.dilation_h), w = row.w - s * int(p.dilation_w);
    if (h < 0 || w < 0) return 0;
    const int o = stride_h.divide(h, rest_h), q = stride_w.divide(w, rest_w);
    if (rest_h || rest_w || o >= p.P || q >= p.Q) return 0;
    return to_acc(row.g[c * p.output_stride_k + o * p.output_stride_p + q * p.output_stride_q]);
  }
};

// For the weights' gradient: a row is an output channel and k an output position of batch n0 onwards ...
template <class S>
struct GradOutputs {
  const S* g;
  Positions outputs;
  Conv2dParams p;
  bool along_k;

  using Row = const S*;
  __device__ __forceinline__ Row row(int r) const { return g + r * p.output_stride_k; }
  __device__ __forceinline__ acc_t<S> at(Row g, int k) const {
    int n, o, q;
    outputs.split(k, n, o, q);
    return to_acc(g[n * p.output_stride_n + o * p.output_stride_p + q * p.output_stride_q]);
  }
};
// ... and a row of the other operand is an (input channel, tap).
template <class S>
struct Pixels {
  const S* x;
  Taps taps;
  Positions outputs;
  Conv2dParams p;
  bool along_k;

  struct Row {
    const S* x;
    int h0, w0;
  };
  __device__ __forceinline__ Row row(int i) const {
    int c, r, s;
    taps.split(i, c, r, s);
    return {x + c * p.input_stride_c, int(r * p.dilation_h - p.pad_h), int(s * p.dilation_w - p.pad_w)};
  }
  __device__ __forceinline__ acc_t<S> at(const Row& row, int k) const {
    int n, o, q;
    outputs.split(k, n, o, q);
    return pixel(row.x + n * p.input_stride_n, p, row.h0 + o * p.stride_h, row.w0 + q * p.stride_w);
  }
};

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class S, Multiply kMultiply>
__global__ void __launch_bounds__(kTileThreads)
    conv2d_forward_kernel(Weights<S> a, Windows<S> b, const __grid_constant__ Conv2dParams p,
                          const __grid_constant__ Epilogue e, Positions outputs) {
  const int group_k = int(p.K / p.groups), group_c = int(p.C / p.groups);
  const int positions = int(p.N * p.P * p.Q);
  const TileAt at = tile_at(group_k, positions);
  a.w += at.other * group_k * p.weight_stride_k;
  b.x += at.other * group_c * p.input_stride_c;
  const int64_t k0 = at.other * group_k;
  const S* const bias = static_cast<const S*>(p.bias);
  const S* const residual = e.residual ? static_cast<const S*>(e.residual) + k0 * p.output_stride_k : nullptr;
  S* const y = static_cast<S*>(p.output) + k0 * p.output_stride_k;
  product<S, kMultiply>(a, b, group_k, positions, at.row0, at.column0, 0, int(group_c * p.R * p.S),
                        p.output_stride_k == 1, [&](int k, int i, acc_t<S> sum) {
                          int n, o, q;
                          outputs.split(i, n, o, q);
                          const int64_t at = output_at(p, n, k, o, q);
                          if (bias) sum += to_acc(bias[k0 + k]);
                          if (residual) sum += to_acc(residual[at]);
                          y[at] = from_acc<S>(e.clamps ? clamp(sum, e) : sum);
                        });
}

template <class S, Multiply kMultiply>
__global__ void __launch_bounds__(kTileThreads)
    conv2d_grad_input_kernel(Weights<S> a, Covers<S> b, const __grid_constant__ Conv2dParams p, Positions inputs) {
  const int group_k = int(p.K / p.groups), group_c = int(p.C / p.groups);
  const int positions = int(p.N * p.H * p.W);
  const TileAt at = tile_at(group_c, positions);
  a.w += at.other * group_k * p.weight_stride_k;
  b.g += at.other * group_k * p.output_stride_k;
  S* const dx = static_cast<S*>(p.grad_input) + at.other * group_c * p.input_stride_c;
  product<S, kMultiply>(a, b, group_c, positions, at.row0, at.column0, 0, int(group_k * p.R * p.S),
                        p.input_stride_c == 1, [&](int c, int i, acc_t<S> sum) {
                          int n, h, w;
                          inputs.split(i, n, h, w);
                          dx[input_at(p, n, c, h, w)] = from_acc<S>(sum);
                        });
}

// Block `other` is (split, group); each split sums its own images into its own slice of `partial`, or writes the
// gradient itself when there is one split.
template <class S, Multiply kMultiply>
__global__ void __launch_bounds__(kTileThreads)
    conv2d_grad_weight_kernel(GradOutputs<S> a, Pixels<S> b, const __grid_constant__ Conv2dParams p, int splits,
                              int images, acc_t<S>* partial) {
  const int group_k = int(p.K / p.groups), columns = int(p.C / p.groups * p.R * p.S);
  const TileAt at = tile_at(group_k, columns);
  const int64_t group = at.other % p.groups, split = at.other / p.groups, n0 = split * images;
  const int count = int(n0 + images < p.N ? images : p.N - n0);
  a.g += n0 * p.output_stride_n + group * group_k * p.output_stride_k;
  b.x += n0 * p.input_stride_n + group * (p.C / p.groups) * p.input_stride_c;
  S* const dw = static_cast<S*>(p.grad_weight);
  product<S, kMultiply>(a, b, group_k, columns, at.row0, at.column0, 0, int(count * p.P * p.Q), false,
                        [&](int row, int column, acc_t<S> sum) {
                          const int64_t k = group * group_k + row;
                          if (splits > 1) {
                            partial[(split * p.K + k) * columns + column] = sum;
                            return;
                          }
                          int c, r, s;
                          b.taps.split(column, c, r, s);
                          dw[weight_at(p, k, c, r, s)] = from_acc<S>(sum);
                        });
}

// Adds the splits in their order.
template <class S>
__global__ void conv2d_add_splits_kernel(const acc_t<S>* partial, int splits, const __grid_constant__ Conv2dParams p,
                                         Taps taps) {
  const int64_t columns = p.C / p.groups * p.R * p.S, count = p.K * columns;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    acc_t<S> sum = 0;
    for (int split = 0; split < splits; ++split) sum += partial[split * count + i];
    int c, r, s;
    taps.split(int(i % columns), c, r, s);
    static_cast<S*>(p.grad_weight)[weight_at(p, i / columns, c, r, s)] = from_acc<S>(sum);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Images per split of the weights' gradient: enough blocks to fill a device, at least 512 positions each, and a
// workspace within bounds. Depends on the shape alone.
int64_t images_per_split(const Conv2dParams& p) {
  constexpr int64_t kWantedBlocks = 512, kLeastPositions = 512;
  const int64_t columns = p.C / p.groups * p.R * p.S, positions = max64(1, p.P * p.Q);
  const int64_t tiles = tiles_of(p.K / p.groups, columns) * p.groups;
  const int64_t bytes = p.K * columns * (p.dtype == DType::f64 ? 8 : 4);
  int64_t splits = min64(ceil_div(kWantedBlocks, tiles), p.N * positions / kLeastPositions);
  splits = max64(1, min64(min64(splits, p.N), kConv2dMaxWorkspace / max64(1, bytes)));
  return min64(ceil_div(p.N, splits), max64(1, kMaxIndex / positions));
}

// f(images, first) on runs of images short enough for 32-bit positions; the pointers of `part` move along.
template <class S, class F>
Status for_images(const Conv2dParams& p, int64_t positions, const F& f) {
  const int64_t most = max64(1, longest_run() / max64(1, positions));
  for (int64_t n = 0; n < p.N; n += most) {
    Conv2dParams part = p;
    part.N = min64(most, p.N - n);
    const int64_t input = n * p.input_stride_n * sizeof(S), output = n * p.output_stride_n * sizeof(S);
    advance(part.input, input), advance(part.grad_input, input);
    advance(part.output, output), advance(part.grad_output, output);
    if (const Status status = f(part, n); status != Status::ok) return status;
  }
  return Status::ok;
}

template <class S>
Epilogue from_image(Epilogue e, int64_t n, const Conv2dParams& p) {
  if (e.residual) e.residual = static_cast<const S*>(e.residual) + n * p.output_stride_n;
  return e;
}

template <class S, Multiply kMultiply>
Status forward(const Conv2dParams& whole, const Epilogue& epilogue, CUstream_st* stream) {
  return for_images<S>(whole, whole.P * whole.Q, [&](const Conv2dParams& p, int64_t first) {
    const Epilogue e = from_image<S>(epilogue, first, p);
    const bool channels_last = p.input_stride_c == 1;
    const Taps taps(p, p.C / p.groups, channels_last);
    const Positions outputs(p.P, p.Q);
    const Weights<S> a{static_cast<const S*>(p.weight),
                       taps,
                       p.weight_stride_k,
                       p.weight_stride_c,
                       p.weight_stride_r,
                       p.weight_stride_s,
                       true};
    const Windows<S> b{static_cast<const S*>(p.input), taps, outputs, p, channels_last};
    const int64_t tiles = tiles_of(p.K / p.groups, p.N * p.P * p.Q) * p.groups;
    return launch_tiles(conv2d_forward_kernel<S, kMultiply>, tiles, stream, a, b, p, e, outputs);
  });
}

template <class S, Multiply kMultiply>
Status grad_input(const Conv2dParams& whole, CUstream_st* stream) {
  return for_images<S>(whole, whole.H * whole.W, [&](const Conv2dParams& p, int64_t) {
    const bool channels_last = p.output_stride_k == 1;
    const Taps taps(p, p.K / p.groups, channels_last);
    const Positions inputs(p.H, p.W);
    const Weights<S> a{static_cast<const S*>(p.weight),
                       taps,
                       p.weight_stride_c,
                       p.weight_stride_k,
                       p.weight_stride_r,
                       p.weight_stride_s,
                       false};
    const Covers<S> b{
        static_cast<const S*>(p.grad_output), taps, inputs, Divisor(p.stride_h), Divisor(p.stride_w), p, channels_last};
    const int64_t tiles = tiles_of(p.C / p.groups, p.N * p.H * p.W) * p.groups;
    return launch_tiles(conv2d_grad_input_kernel<S, kMultiply>, tiles, stream, a, b, p, inputs);
  });
}

template <class S, Multiply kMultiply>
Status grad_weight(const Conv2dParams& p, CUstream_st* stream) {
  const int64_t columns = p.C / p.groups * p.R * p.S, images = images_per_split(p), splits = ceil_div(p.N, images);
  const bool channels_last = p.input_stride_c == 1;
  const Taps taps(p, p.C / p.groups, channels_last);
  const Positions outputs(p.P, p.Q);
  const GradOutputs<S> a{static_cast<const S*>(p.grad_output), outputs, p, p.output_stride_k != 1};
  const Pixels<S> b{static_cast<const S*>(p.input), taps, outputs, p, !channels_last};
  auto* partial = static_cast<acc_t<S>*>(p.workspace);
  const int64_t tiles = tiles_of(p.K / p.groups, columns) * p.groups * splits;
  const Status status =
      launch_tiles(conv2d_grad_weight_kernel<S, kMultiply>, tiles, stream, a, b, p, int(splits), int(images), partial);
  if (status != Status::ok || splits == 1) return status;
  return add_splits<S>(p, splits, channels_last, stream);
}

bool indexable(const Conv2dParams& p) {
  const int64_t group_c = p.C / p.groups, group_k = p.K / p.groups;
  return max64(group_c, group_k) * p.R * p.S <= kMaxIndex && p.H + p.pad_h <= kMaxIndex && p.W + p.pad_w <= kMaxIndex &&
         max64(p.H * p.W, p.P * p.Q) <= kMaxIndex && p.C > 0 && p.K > 0 && p.R > 0 && p.S > 0;
}

}  // namespace

template <class S>
Status add_splits(const Conv2dParams& p, int64_t splits, bool channels_fastest, CUstream_st* stream) {
  return launch(conv2d_add_splits_kernel<S>, strided_grid_of(p.K * (p.C / p.groups) * p.R * p.S, 256), dim3(256), 0,
                stream, static_cast<const acc_t<S>*>(p.workspace), int(splits), p,
                Taps(p, p.C / p.groups, channels_fastest));
}
template Status add_splits<float>(const Conv2dParams&, int64_t, bool, CUstream_st*);
template Status add_splits<double>(const Conv2dParams&, int64_t, bool, CUstream_st*);
template Status add_splits<bf16>(const Conv2dParams&, int64_t, bool, CUstream_st*);
template Status add_splits<f16>(const Conv2dParams&, int64_t, bool, CUstream_st*);

bool conv2d_few_channels(const Conv2dParams& p) {
  constexpr int64_t kFew = 4;  // tiles have 64
  return p.C / p.groups <= kFew && p.K / p.groups <= kFew;
}

Status conv2d_grad_bias(const Conv2dParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) { return direct_grad_bias<typename decltype(tag)::type>(p, stream); });
}

int64_t conv2d_workspace(const Conv2dParams& p) {
  if (depthwise_takes(p)) return depthwise_workspace(p);
  if (p.pass != Conv2dPass::grad_weight || conv2d_few_channels(p)) return 0;
  const int64_t splits = ceil_div(p.N, images_per_split(p));
  return splits == 1 ? 0 : splits * p.K * (p.C / p.groups) * p.R * p.S * (p.dtype == DType::f64 ? 8 : 4);
}

Status conv2d(const Conv2dParams& p, CUstream_st* stream) { return conv2d(p, Epilogue{}, stream); }

Status conv2d(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream) {
  if (!indexable(p)) return Status::invalid_argument;
  if (p.pass == Conv2dPass::grad_weight && p.grad_bias)
    if (const Status status = conv2d_grad_bias(p, stream); status != Status::ok) return status;
  if (depthwise_takes(p)) return depthwise(p, e, stream);
  if (conv2d_few_channels(p))
    return dispatch_dtype(p.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      if (p.pass == Conv2dPass::grad_weight) return direct<S>(p, e, stream);
      const int64_t items = p.pass == Conv2dPass::forward ? p.K * p.P * p.Q : p.C * p.H * p.W;
      return for_images<S>(p, items, [&](const Conv2dParams& part, int64_t first) {
        return direct<S>(part, from_image<S>(e, first, p), stream);
      });
    });
  const int64_t group_c = p.C / p.groups, group_k = p.K / p.groups, taps = p.R * p.S;
  const int64_t outputs = p.N * p.P * p.Q, inputs = p.N * p.H * p.W;
  const auto with_sizes = [&](int64_t rows, int64_t columns, int64_t depth, const auto& f) {
    return dispatch_product(p.dtype, p.tf32, rows, columns, depth, f);
  };
  switch (p.pass) {
    case Conv2dPass::forward:
      return with_sizes(group_k, outputs, group_c * taps, [&](auto tag, auto multiply) {
        return forward<typename decltype(tag)::type, decltype(multiply)::value>(p, e, stream);
      });
    case Conv2dPass::grad_input:
      return with_sizes(group_c, inputs, group_k * taps, [&](auto tag, auto multiply) {
        return grad_input<typename decltype(tag)::type, decltype(multiply)::value>(p, stream);
      });
    case Conv2dPass::grad_weight:
      return with_sizes(group_k, group_c * taps, outputs, [&](auto tag, auto multiply) {
        return grad_weight<typename decltype(tag)::type, decltype(multiply)::value>(p, stream);
      });
  }
  return Status::invalid_argument;
}

}  // namespace fastnn::cuda
