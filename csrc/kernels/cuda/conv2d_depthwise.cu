// Depthwise convolution with square kernels of 3 or 5, by tiles of outputs whose inputs lie in shared memory:
// every input is read once from memory (and once more along the edges of tiles), and a thread keeps four outputs
// of a column, or the kernel's gradient, in registers. Other kernels, dilations and strides: conv2d_direct.cu.
#include "conv2d_direct.h"

#include "device/index.h"
#include "device/reduce.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 4;        // outputs of a thread, one below the other
constexpr int kChannels = 32;  // of a tile where channels lie together in memory: one per lane

// Sizes and places of tiles of outputs and the inputs under them, in shared memory as they lie in the tensors: channels
// fastest, or columns fastest.
struct Tiles {
  int channels, rows, columns;  // outputs of a tile; rows are a multiple of kRun
  int in_rows, in_columns;
  int out_h, out_w, in_h, in_w, pad_h, pad_w;  // of the tensors; the input's with `spread - 1` zeros between neighbours
  int row_tiles, column_tiles, channel_tiles;
  int all_channels;
  bool channels_last;
  Divisor spread, fast_in, middle_in, fast_item, middle_item;
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;
  int64_t output_stride_n, output_stride_c, output_stride_h, output_stride_w;

  int64_t count(int64_t images) const { return images * channel_tiles * row_tiles * column_tiles; }
  int inputs() const { return channels * in_rows * in_columns; }
  __device__ __forceinline__ int items() const { return channels * columns * (rows / kRun); }
};

struct Place {
  int c, h, w;
};
// i counts channels x heights x widths, what lies together in memory fastest.
__device__ __forceinline__ Place place_of(int i, bool channels_last, const Divisor& fast, const Divisor& middle) {
  Place at;
  if (channels_last) at.h = middle.divide(fast.divide(i, at.c), at.w);
  else at.c = middle.divide(fast.divide(i, at.w), at.h);
  return at;
}

// Fills `tile` with the inputs under the outputs from (row0, column0) on, zeros outside of the image and between spread
// inputs. All threads call it.
template <class S, int kStep>
__device__ __forceinline__ void load_tile(acc_t<S>* tile, const S* image, const Tiles& t, int channel0, int row0,
                                          int column0) {
  const int count = t.channels * t.in_rows * t.in_columns;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Place at = place_of(i, t.channels_last, t.fast_in, t.middle_in);
    const int h = row0 * kStep - t.pad_h + at.h, w = column0 * kStep - t.pad_w + at.w, c = channel0 + at.c;
    acc_t<S> value = 0;
    if (unsigned(h) < unsigned(t.in_h) && unsigned(w) < unsigned(t.in_w) && c < t.all_channels) {
      int rest_h, rest_w;
      const int y = t.spread.divide(h, rest_h), x = t.spread.divide(w, rest_w);
      if (!(rest_h | rest_w)) value = to_acc(image[c * t.input_stride_c + y * t.input_stride_h + x * t.input_stride_w]);
    }
    tile[i] = value;
  }
}

// Where an item's inputs begin in the tile, and the strides there.
struct Walk {
  int at, stride_h, stride_w;
};
template <int kStep>
__device__ __forceinline__ Walk walk_of(const Place& item, const Tiles& t) {
  const int stride_w = t.channels_last ? t.channels : 1, stride_h = stride_w * t.in_columns;
  const int channel = t.channels_last ? item.c : item.c * t.in_rows * t.in_columns;
  return {channel + item.h * kRun * kStep * stride_h + item.w * kStep * stride_w, stride_h, stride_w};
}

struct Tile {
  int64_t image;
  int channel0, row0, column0;
};
__device__ __forceinline__ Tile tile_of(int64_t i, const Tiles& t) {
  Tile at;
  at.column0 = int(i % t.column_tiles) * t.columns, i /= t.column_tiles;
  at.row0 = int(i % t.row_tiles) * t.rows, i /= t.row_tiles;
  at.channel0 = int(i % t.channel_tiles) * t.channels;
  at.image = i / t.channel_tiles;
  return at;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// The output, or the input's gradient: that is the same sum over the gradient, spread by the stride, with the kernel
// turned round.
template <class S, int K, int kStep>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2, ptxas saves registers until it spills (sm_80)
    conv2d_depthwise_kernel(const S* x, S* y, const __grid_constant__ Conv2dParams p,
                            const __grid_constant__ Epilogue e, const __grid_constant__ Tiles t, bool turned,
                            int64_t tiles) {
  using A = acc_t<S>;
  FASTNN_DYNAMIC_SHARED(tile, A);
  const S* const weight = static_cast<const S*>(p.weight);
  const S* const bias = static_cast<const S*>(turned ? nullptr : p.bias);
  const S* const residual = static_cast<const S*>(e.residual);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile at = tile_of(i, t);
    __syncthreads();  // the tile before may still be read
    load_tile<S, kStep>(tile, x + at.image * t.input_stride_n, t, at.channel0, at.row0, at.column0);
    __syncthreads();
#pragma unroll 1
    for (int j = threadIdx.x; j < t.items(); j += kThreads) {
      const Place item = place_of(j, t.channels_last, t.fast_item, t.middle_item);
      const int c = at.channel0 + item.c, row = at.row0 + item.h * kRun, column = at.column0 + item.w;
      if (c >= t.all_channels || column >= t.out_w || row >= t.out_h) continue;
      A taps[K][K], sum[kRun] = {};
#pragma unroll
      for (int r = 0; r < K; ++r)
#pragma unroll
        for (int s = 0; s < K; ++s)
          taps[r][s] = to_acc(weight[c * p.weight_stride_k + (turned ? K - 1 - r : r) * p.weight_stride_r +
                                     (turned ? K - 1 - s : s) * p.weight_stride_s]);
      const Walk walk = walk_of<kStep>(item, t);
#pragma unroll
      for (int h = 0; h < (kRun - 1) * kStep + K; ++h) {
        A v[K];
#pragma unroll
        for (int s = 0; s < K; ++s) v[s] = tile[walk.at + h * walk.stride_h + s * walk.stride_w];
#pragma unroll
        for (int o = 0; o < kRun; ++o)
          if (h - o * kStep >= 0 && h - o * kStep < K)
#pragma unroll
            for (int s = 0; s < K; ++s) sum[o] += v[s] * taps[h - o * kStep][s];
      }
      const A add = bias ? to_acc(bias[c]) : A(0);
#pragma unroll
      for (int o = 0; o < kRun; ++o) {
        if (row + o >= t.out_h) break;
        const int64_t to = at.image * t.output_stride_n + c * t.output_stride_c + (row + o) * t.output_stride_h +
                           column * t.output_stride_w;
        A out = sum[o] + add;
        if (residual) out += to_acc(residual[to]);
        y[to] = from_acc<S>(e.clamps ? clamp(out, e) : out);
      }
    }
  }
}

// Block (split, channel tile) sums its images' part of the kernel's gradient into partial[split][channel][tap].
template <class S, int K, int kStep>
__global__ void __launch_bounds__(kThreads)
    conv2d_depthwise_grad_weight_kernel(const S* x, const S* g, const __grid_constant__ Tiles t, int64_t images,
                                        int64_t images_per_split, acc_t<S>* partial) {
  using A = acc_t<S>;
  FASTNN_DYNAMIC_SHARED(tile, A);
  const int channel0 = int(blockIdx.x % t.channel_tiles) * t.channels;
  const int64_t split = blockIdx.x / t.channel_tiles, n0 = split * images_per_split;
  const int64_t n1 = n0 + images_per_split < images ? n0 + images_per_split : images;
  A sum[K][K] = {};
#pragma unroll 1
  for (int64_t n = n0; n < n1; ++n)
#pragma unroll 1
    for (int at = 0; at < t.row_tiles * t.column_tiles; ++at) {
      const int row0 = at / t.column_tiles * t.rows, column0 = at % t.column_tiles * t.columns;
      __syncthreads();
      load_tile<S, kStep>(tile, x + n * t.input_stride_n, t, channel0, row0, column0);
      __syncthreads();
#pragma unroll 1
      for (int j = threadIdx.x; j < t.items(); j += kThreads) {  // a thread's items are all of one channel
        const Place item = place_of(j, t.channels_last, t.fast_item, t.middle_item);
        const int c = channel0 + item.c, row = row0 + item.h * kRun, column = column0 + item.w;
        if (c >= t.all_channels || column >= t.out_w) continue;
        A grad[kRun];
#pragma unroll
        for (int o = 0; o < kRun; ++o)
          grad[o] = row + o < t.out_h ? to_acc(g[n * t.output_stride_n + c * t.output_stride_c +
                                                 (row + o) * t.output_stride_h + column * t.output_stride_w])
                                      : A(0);
        const Walk walk = walk_of<kStep>(item, t);
#pragma unroll
        for (int h = 0; h < (kRun - 1) * kStep + K; ++h) {
          A v[K];
#pragma unroll
          for (int s = 0; s < K; ++s) v[s] = tile[walk.at + h * walk.stride_h + s * walk.stride_w];
#pragma unroll
          for (int o = 0; o < kRun; ++o)
            if (h - o * kStep >= 0 && h - o * kStep < K)
#pragma unroll
              for (int s = 0; s < K; ++s) sum[h - o * kStep][s] += grad[o] * v[s];
        }
      }
    }
  FASTNN_SHARED(lanes, A[kThreads / kWarp][kWarp]);
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
    A total = sum[tap / K][tap % K];
    if (t.channels_last) {  // a lane per channel
      __syncthreads();
      lanes[threadIdx.x / kWarp][threadIdx.x % kWarp] = total;
      __syncthreads();
      total = 0;
      if (threadIdx.x < kWarp)
        for (int w = 0; w < kThreads / kWarp; ++w) total += lanes[w][threadIdx.x];
    } else {
      total = block_reduce(total, A(0), Add{});
    }
    const int c = channel0 + int(threadIdx.x);
    if (int(threadIdx.x) < t.channels && c < t.all_channels)
      partial[(split * t.all_channels + c) * (K * K) + tap] = total;
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

Tiles tiles_of(const Conv2dParams& p) {
  const bool to_input = p.pass == Conv2dPass::grad_input;
  const int kernel = int(p.R), step = to_input ? 1 : int(p.stride_h);
  Tiles t{};
  t.all_channels = int(p.C);
  t.out_h = int(to_input ? p.H : p.P), t.out_w = int(to_input ? p.W : p.Q);
  t.pad_h = int(to_input ? kernel - 1 - p.pad_h : p.pad_h), t.pad_w = int(to_input ? kernel - 1 - p.pad_w : p.pad_w);
  t.spread = Divisor(to_input ? p.stride_h : 1);
  t.in_h = int(to_input ? (p.P - 1) * p.stride_h + 1 : p.H), t.in_w = int(to_input ? (p.Q - 1) * p.stride_w + 1 : p.W);
  t.input_stride_n = p.input_stride_n, t.input_stride_c = p.input_stride_c;
  t.input_stride_h = p.input_stride_h, t.input_stride_w = p.input_stride_w;
  t.output_stride_n = p.output_stride_n, t.output_stride_c = p.output_stride_k;
  t.output_stride_h = p.output_stride_p, t.output_stride_w = p.output_stride_q;
  if (to_input) {
    const auto exchange = [](int64_t& a, int64_t& b) {
      const int64_t before = a;
      a = b, b = before;
    };
    exchange(t.input_stride_n, t.output_stride_n), exchange(t.input_stride_c, t.output_stride_c);
    exchange(t.input_stride_h, t.output_stride_h), exchange(t.input_stride_w, t.output_stride_w);
  }
  t.channels_last = p.input_stride_c == 1 && p.C > 1;
  if (t.channels_last) {
    t.channels = kChannels, t.rows = 8, t.columns = 8 / step;
  } else {
    t.rows = int(min64(32, round_up(t.out_h, kRun))), t.columns = int(min64(32, t.out_w));
    t.channels =
        p.pass == Conv2dPass::grad_weight ? 1 : int(max64(1, min64(min64(16, p.C), 1024 / (t.rows * t.columns))));
  }
  t.in_rows = (t.rows - 1) * step + kernel, t.in_columns = (t.columns - 1) * step + kernel;
  t.row_tiles = int(ceil_div(t.out_h, t.rows)), t.column_tiles = int(ceil_div(t.out_w, t.columns));
  t.channel_tiles = int(ceil_div(p.C, t.channels));
  const int runs = t.rows / kRun;
  t.fast_in = Divisor(t.channels_last ? t.channels : t.in_columns);
  t.middle_in = Divisor(t.channels_last ? t.in_columns : t.in_rows);
  t.fast_item = Divisor(t.channels_last ? t.channels : t.columns);
  t.middle_item = Divisor(t.channels_last ? t.columns : runs);
  return t;
}

int64_t images_per_split(const Conv2dParams& p, const Tiles& t) {
  constexpr int64_t kWantedBlocks = 132 * 4;
  return ceil_div(p.N, max64(1, min64(p.N, kWantedBlocks / t.channel_tiles)));
}

template <class S, int K, int kStep>
Status run(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream) {
  const Tiles t = tiles_of(p);
  const size_t shared = size_t(t.inputs()) * sizeof(acc_t<S>);
  if (p.pass == Conv2dPass::grad_weight) {
    const int64_t images = images_per_split(p, t), splits = ceil_div(p.N, images);
    const Status status =
        launch(conv2d_depthwise_grad_weight_kernel<S, K, kStep>, grid_of(splits * t.channel_tiles), dim3(kThreads),
               shared, stream, static_cast<const S*>(p.input), static_cast<const S*>(p.grad_output), t, p.N, images,
               static_cast<acc_t<S>*>(p.workspace));
    return status != Status::ok ? status : add_splits<S>(p, splits, false, stream);
  }
  const bool turned = p.pass == Conv2dPass::grad_input;
  return launch(conv2d_depthwise_kernel<S, K, kStep>, grid_up_to(t.count(p.N)), dim3(kThreads), shared, stream,
                static_cast<const S*>(turned ? p.grad_output : p.input),
                static_cast<S*>(turned ? p.grad_input : p.output), p, e, t, turned, t.count(p.N));
}

}  // namespace

bool depthwise_takes(const Conv2dParams& p) {
  return p.groups == p.C && p.K == p.C && p.R == p.S && (p.R == 3 || p.R == 5) && p.stride_h == p.stride_w &&
         p.stride_h <= 2 && p.dilation_h == 1 && p.dilation_w == 1 && p.pad_h < p.R && p.pad_w < p.S &&
         max64(p.H, p.W) < kMaxIndex / 4;
}

int64_t depthwise_workspace(const Conv2dParams& p) {
  if (p.pass != Conv2dPass::grad_weight) return 0;
  return ceil_div(p.N, images_per_split(p, tiles_of(p))) * p.K * p.R * p.S * (p.dtype == DType::f64 ? 8 : 4);
}

Status depthwise(const Conv2dParams& p, const Epilogue& e, CUstream_st* stream) {
  const bool steps = p.stride_h == 2 && p.pass != Conv2dPass::grad_input;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.R == 3) return steps ? run<S, 3, 2>(p, e, stream) : run<S, 3, 1>(p, e, stream);
    return steps ? run<S, 5, 2>(p, e, stream) : run<S, 5, 1>(p, e, stream);
  });
}

}  // namespace fastnn::cuda
