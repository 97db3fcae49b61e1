// Batch norm in two stages: blocks sum chunks of a channel, a warp per channel joins the chunks in float64, then one
// sweep writes. Forward sums are Welford's: never a difference of large squares.
#include "../batch_norm.h"

#include "device/index.h"
#include "device/reduce.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 1 << 14;        // elements of a plane channel that one block takes
constexpr int64_t kChunkRows = 256;        // rows, in the rows layout
constexpr int64_t kMaxPartials = 1 << 20;  // chunks times channels: bounds the workspace

// ---- how the elements are cut --------------------------------------------------------------------------------------

// Block b takes channel b % channels (or tile of channels b % tiles) and chunk b / channels (b / tiles).
struct Cut {
  int64_t channels, inner;
  int64_t total;  // elements of a channel
  int64_t chunk, chunks, tiles;
  Divisor plane;  // packs in a plane

  __device__ __forceinline__ int64_t chunk_index() const { return int64_t(blockIdx.x) / tiles; }
  __device__ __forceinline__ int64_t count_of(int64_t k) const {
    const int64_t rest = total - k * chunk;
    return rest < chunk ? rest : chunk;
  }
  // The channel of this thread's first lane; in the rows layout lane n has the n-th channel after it.
  template <int N, bool kRows>
  __device__ __forceinline__ int64_t channel() const {
    const int64_t tile = int64_t(blockIdx.x) % tiles;
    return kRows ? (tile * blockDim.x + threadIdx.x) * N : tile;
  }
  // Calls f(offset) for every pack of this thread.
  template <int N, bool kRows, class F>
  __device__ __forceinline__ void for_packs(const F& f) const {
    const int64_t k = chunk_index(), from = k * chunk, c = channel<N, kRows>();
    const int count = int(count_of(k));
    if constexpr (kRows) {
      if (c >= channels) return;
      for (int r = threadIdx.y; r < count; r += blockDim.y) f((from + r) * channels + c);
    } else {
      const int64_t n0 = from / inner, stride = channels * inner;
      const int first = int((from - n0 * inner) / N);
      for (int j = threadIdx.x; j < count / N; j += blockDim.x) {
        int i;
        const int n = plane.divide(first + j, i);
        f((n0 + n) * stride + c * inner + int64_t(i) * N);
      }
    }
  }
};

// ---- parameters, one per channel -----------------------------------------------------------------------------------

__device__ double read_param(const void* p, DType dtype, int64_t i, double otherwise) {
  if (!p) return otherwise;
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return to_acc(static_cast<const bf16*>(p)[i]);
    case DType::f16: return to_acc(static_cast<const f16*>(p)[i]);
  }
  return otherwise;
}

__device__ void write_param(void* p, DType dtype, int64_t i, double value) {
  if (!p) return;
  switch (dtype) {
    case DType::f32: static_cast<float*>(p)[i] = float(value); return;
    case DType::f64: static_cast<double*>(p)[i] = value; return;
    case DType::bf16: static_cast<bf16*>(p)[i] = from_acc<bf16>(float(value)); return;
    case DType::f16: static_cast<f16*>(p)[i] = from_acc<f16>(float(value)); return;
  }
}

// N values: of consecutive channels in the rows layout, else N times the same one.
template <int N, bool kRows, class A>
__device__ __forceinline__ void load_channels(const A* p, int64_t c, A (&out)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) out[n] = p[kRows ? c + n : c];
}

// ---- sums of two numbers per channel -------------------------------------------------------------------------------

// Joins what the threads of a block found for their lanes, x[N] and y[N], and writes partial[chunk][2][channels].
// merge(a, b) joins two (x, y, count) triples.
template <class A>
struct Triple {
  A x, y, count;
};
template <class A>
__device__ __forceinline__ Triple<A> from_lane(Triple<A> t, int lanes) {
  return {__shfl_xor_sync(kFullWarp, t.x, lanes), __shfl_xor_sync(kFullWarp, t.y, lanes),
          __shfl_xor_sync(kFullWarp, t.count, lanes)};
}

// x: mean, y: sum of squared distances from it.
struct MergeMoments {
  template <class A>
  __device__ __forceinline__ Triple<A> operator()(Triple<A> a, Triple<A> b) const {
    const A count = a.count + b.count;
    if (!(count > A(0))) return a;
    const A share = b.count / count, distance = b.x - a.x;
    return {a.x + distance * share, a.y + b.y + distance * distance * a.count * share, count};
  }
};
struct AddBoth {
  template <class A>
  __device__ __forceinline__ Triple<A> operator()(Triple<A> a, Triple<A> b) const {
    return {a.x + b.x, a.y + b.y, a.count + b.count};
  }
};

template <int N, bool kRows, class A, class Merge>
__device__ __forceinline__ void keep_partial(const Cut& cut, const A (&x)[N], const A (&y)[N], A count,
                                             const Merge& merge, A* partial) {
  A* const to = partial + cut.chunk_index() * 2 * cut.channels;
  const int64_t c = cut.channel<N, kRows>();
  if constexpr (kRows) {
    FASTNN_SHARED(xs, A[N][kThreads]);
    FASTNN_SHARED(ys, A[N][kThreads]);
    FASTNN_SHARED(counts, A[kThreads]);
    const int me = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
    for (int n = 0; n < N; ++n) xs[n][me] = x[n], ys[n][me] = y[n];
    counts[me] = count;
    __syncthreads();
    if (threadIdx.y > 0 || c >= cut.channels) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Triple<A> all{x[n], y[n], count};
      for (int i = me + int(blockDim.x); i < kThreads; i += int(blockDim.x))
        all = merge(all, Triple<A>{xs[n][i], ys[n][i], counts[i]});
      to[c + n] = all.x;
      to[cut.channels + c + n] = all.y;
    }
  } else {
    Triple<A> all{x[0], y[0], count};
#pragma unroll
    for (int n = 1; n < N; ++n) all = merge(all, Triple<A>{x[n], y[n], count});
    all = block_reduce(all, Triple<A>{A(0), A(0), A(0)}, merge);
    if (threadIdx.x == 0) to[c] = all.x, to[cut.channels + c] = all.y;
  }
}

// One channel's chunks, joined by a warp; lane 0 has the result.
template <class A, class Merge>
__device__ __forceinline__ Triple<double> join_chunks(const Cut& cut, const A* partial, int64_t c, const Merge& merge) {
  Triple<double> all{0, 0, 0};
  for (int64_t k = threadIdx.x; k < cut.chunks; k += kWarp) {
    const A* const from = partial + k * 2 * cut.channels + c;
    all = merge(all, Triple<double>{double(from[0]), double(from[cut.channels]), double(cut.count_of(k))});
  }
  return warp_reduce(all, merge);
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class S, int N, bool kRows>
__global__ void __launch_bounds__(kThreads)
    batch_norm_moments_kernel(const S* x, acc_t<S>* partial, const __grid_constant__ Cut cut) {
  using A = acc_t<S>;
  A mean[N] = {}, m2[N] = {};
  int count = 0;
  cut.for_packs<N, kRows>([&](int64_t at) {
    const Pack<S, N> pack = load_pack<N>(x + at);
    const A share = A(1) / A(++count);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A v = to_acc(pack.at[n]), distance = v - mean[n];
      mean[n] += distance * share;
      m2[n] += distance * (v - mean[n]);
    }
  });
  keep_partial<N, kRows>(cut, mean, m2, A(count), MergeMoments{}, partial);
}

constexpr int kWarpsPerBlock = 8;

// A warp per channel: the statistics, and the coefficients of y = (x - shift) * scale + offset.
template <class A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    batch_norm_statistics_kernel(const A* partial, A* coefficients, const __grid_constant__ BatchNormParams p,
                                 const __grid_constant__ Cut cut) {
  const int64_t c = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (c >= p.channels) return;
  double mean, invstd;
  if (p.training) {
    const Triple<double> all = join_chunks(cut, partial, c, MergeMoments{});
    if (threadIdx.x > 0) return;
    const double count = double(cut.total);
    mean = all.x;
    invstd = 1 / sqrt(all.y / count + p.eps);
    const auto blend = [&](void* running, double value) {
      write_param(running, p.param_dtype, c,
                  p.momentum * value + (1 - p.momentum) * read_param(running, p.param_dtype, c, 0));
    };
    blend(p.running_mean, mean);
    blend(p.running_var, all.y / (count - 1));
  } else {
    if (threadIdx.x > 0) return;
    mean = read_param(p.running_mean, p.param_dtype, c, 0);
    invstd = 1 / sqrt(read_param(p.running_var, p.param_dtype, c, 1) + p.eps);
  }
  static_cast<A*>(p.mean)[c] = A(mean);
  static_cast<A*>(p.invstd)[c] = A(invstd);
  const double scale = invstd * read_param(p.weight, p.param_dtype, c, 1);
  const A shift = A(mean);  // what A cannot hold of the mean goes to the offset
  coefficients[c] = shift;
  coefficients[p.channels + c] = A(scale);
  coefficients[2 * p.channels + c] = A(read_param(p.bias, p.param_dtype, c, 0) - (mean - double(shift)) * scale);
}

template <class S, int N, bool kRows>
__global__ void __launch_bounds__(kThreads)
    batch_norm_normalise_kernel(const S* x, const S* residual, S* y, const acc_t<S>* coefficients, bool relu,
                                const __grid_constant__ Cut cut) {
  using A = acc_t<S>;
  const int64_t c = cut.channel<N, kRows>();
  if (c >= cut.channels) return;
  A shift[N], scale[N], offset[N];
  load_channels<N, kRows>(coefficients, c, shift);
  load_channels<N, kRows>(coefficients + cut.channels, c, scale);
  load_channels<N, kRows>(coefficients + 2 * cut.channels, c, offset);
  cut.for_packs<N, kRows>([&](int64_t at) {
    Pack<S, N> pack = load_pack<N>(x + at), added{};
    if (residual) added = load_pack<N>(residual + at);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      A v = (to_acc(pack.at[n]) - shift[n]) * scale[n] + offset[n];
      if (residual) v += to_acc(added.at[n]);
      if (relu && v < A(0)) v = 0;  // NaN passes
      pack.at[n] = from_acc<S>(v);
    }
    store_pack(y + at, pack);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The gradient behind the ReLU, whose output y stops it where it is not above 0.
template <class S, int N>
__device__ __forceinline__ Pack<S, N> gradient_at(const S* g, const S* y, int64_t at) {
  Pack<S, N> pack = load_pack<N>(g + at);
  if (!y) return pack;
  const Pack<S, N> result = load_pack<N>(y + at);
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (to_acc(result.at[n]) <= acc_t<S>(0)) pack.at[n] = S{};
  return pack;
}

// x: the sum of g, y: the sum of g (x - mean).
template <class S, int N, bool kRows>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_sums_kernel(const S* g, const S* x, const S* y, const acc_t<S>* means, acc_t<S>* partial,
                                    const __grid_constant__ Cut cut) {
  using A = acc_t<S>;
  const int64_t c = cut.channel<N, kRows>();
  A mean[N] = {}, sum[N] = {}, dot[N] = {};
  if (c < cut.channels) load_channels<N, kRows>(means, c, mean);
  cut.for_packs<N, kRows>([&](int64_t at) {
    const Pack<S, N> grads = gradient_at<S, N>(g, y, at), inputs = load_pack<N>(x + at);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A v = to_acc(grads.at[n]);
      sum[n] += v;
      dot[n] += v * (to_acc(inputs.at[n]) - mean[n]);
    }
  });
  keep_partial<N, kRows>(cut, sum, dot, A(0), AddBoth{}, partial);
}

// grad_input = g * scale - (x - mean) * slope - offset; in evaluation slope and offset are 0.
template <class A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    batch_norm_backward_statistics_kernel(const A* partial, A* coefficients, const __grid_constant__ BatchNormParams p,
                                          const __grid_constant__ Cut cut, bool has_sums) {
  const int64_t c = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (c >= p.channels) return;
  Triple<double> all{0, 0, 0};
  if (has_sums) all = join_chunks(cut, partial, c, AddBoth{});
  if (threadIdx.x > 0) return;
  const double invstd = static_cast<const A*>(p.invstd)[c], count = double(cut.total);
  const double scale = invstd * read_param(p.weight, p.param_dtype, c, 1);
  write_param(p.grad_weight, p.param_dtype, c, all.y * invstd);
  write_param(p.grad_bias, p.param_dtype, c, all.x);
  coefficients[c] = A(scale);
  coefficients[p.channels + c] = p.training ? A(scale * invstd * invstd * all.y / count) : A(0);
  coefficients[2 * p.channels + c] = p.training ? A(scale * all.x / count) : A(0);
}

template <class S, int N, bool kRows>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_kernel(const S* g, const S* x, const S* y, S* dx, S* dr, const acc_t<S>* means,
                               const acc_t<S>* coefficients, bool training, const __grid_constant__ Cut cut) {
  using A = acc_t<S>;
  const int64_t c = cut.channel<N, kRows>();
  if (c >= cut.channels) return;
  A mean[N], scale[N], slope[N], offset[N];
  load_channels<N, kRows>(means, c, mean);
  load_channels<N, kRows>(coefficients, c, scale);
  load_channels<N, kRows>(coefficients + cut.channels, c, slope);
  load_channels<N, kRows>(coefficients + 2 * cut.channels, c, offset);
  cut.for_packs<N, kRows>([&](int64_t at) {
    Pack<S, N> grads = gradient_at<S, N>(g, y, at);
    if (dr) store_pack(dr + at, grads);
    if (!dx) return;
    Pack<S, N> inputs{};
    if (training) inputs = load_pack<N>(x + at);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      A v = to_acc(grads.at[n]) * scale[n];
      if (training) v = v - offset[n] - (to_acc(inputs.at[n]) - mean[n]) * slope[n];
      grads.at[n] = from_acc<S>(v);
    }
    store_pack(dx + at, grads);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

bool in_rows(const BatchNormParams& p) { return p.inner == 1; }

// Depends on the shape alone, as do the bits of every sum.
int64_t chunk_of(const BatchNormParams& p) {
  if (!in_rows(p)) return kChunk;
  return max64(kChunkRows, ceil_div(p.batch * p.channels, kMaxPartials));
}
int64_t chunks_of(const BatchNormParams& p) { return ceil_div(p.batch * p.inner, chunk_of(p)); }

struct Geometry {
  Cut cut;
  dim3 grid, block;
};
Geometry geometry(const BatchNormParams& p, int lanes) {
  Geometry g;
  const int64_t chunk = chunk_of(p), total = p.batch * p.inner;
  int64_t tiles = p.channels;
  if (in_rows(p)) {
    int64_t width = 1;
    while (width < kWarp && width * lanes < p.channels) width *= 2;
    g.block = dim3(unsigned(width), unsigned(kThreads / width));
    tiles = ceil_div(p.channels, width * lanes);
  } else {
    g.block = dim3(unsigned(min64(kThreads, round_up(ceil_div(min64(chunk, total), lanes), kWarp))));
  }
  g.cut = {p.channels, p.inner, total, chunk, chunks_of(p), tiles, Divisor(max64(1, p.inner / lanes))};
  g.grid = grid_of(tiles * g.cut.chunks);
  return g;
}

bool indexable(const BatchNormParams& p) {
  constexpr int64_t kMaxPlane = kMaxIndex - kChunk;
  return p.inner <= kMaxPlane && chunk_of(p) <= kMaxIndex && chunks_of(p) * p.channels <= kMaxIndex;
}

// Calls f(Tag<S>, Constant<N>, Constant<rows>): N elements at
// a time where all pointers and sizes allow 16-byte accesses.
template <class F, class... P>
Status with_layout(const BatchNormParams& p, const F& f, const P*... pointers) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    constexpr int N = kPack<typename decltype(tag)::type>;
    const bool packed = (in_rows(p) ? p.channels : p.inner) % N == 0 && aligned16(pointers...);
    if (in_rows(p)) return packed ? f(tag, Constant<N>{}, Constant<true>{}) : f(tag, Constant<1>{}, Constant<true>{});
    return packed ? f(tag, Constant<N>{}, Constant<false>{}) : f(tag, Constant<1>{}, Constant<false>{});
  });
}

dim3 statistics_grid(const BatchNormParams& p) { return grid_of(ceil_div(p.channels, kWarpsPerBlock)); }

}  // namespace

int64_t batch_norm_workspace(const BatchNormParams& p) {
  return (3 + 2 * chunks_of(p)) * p.channels * (p.dtype == DType::f64 ? 8 : 4);
}

Status batch_norm_forward(const BatchNormParams& p, CUstream_st* stream) {
  if (!indexable(p)) return Status::invalid_argument;
  const auto run = [&](auto tag, auto n, auto rows) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    constexpr int N = decltype(n)::value;
    constexpr bool kRows = decltype(rows)::value;
    const Geometry g = geometry(p, N);
    A* const coefficients = static_cast<A*>(p.workspace);
    A* const partial = coefficients + 3 * p.channels;
    const S* const x = static_cast<const S*>(p.input);
    Status status = Status::ok;
    if (p.training)
      status = launch(batch_norm_moments_kernel<S, N, kRows>, g.grid, g.block, 0, stream, x, partial, g.cut);
    if (status == Status::ok)
      status = launch(batch_norm_statistics_kernel<A>, statistics_grid(p), dim3(kWarp, kWarpsPerBlock), 0, stream,
                      partial, coefficients, p, g.cut);
    if (status != Status::ok) return status;
    return launch(batch_norm_normalise_kernel<S, N, kRows>, g.grid, g.block, 0, stream, x,
                  static_cast<const S*>(p.residual), static_cast<S*>(p.output), coefficients, p.relu, g.cut);
  };
  return with_layout(p, run, p.input, p.residual, p.output);
}

Status batch_norm_backward(const BatchNormParams& p, CUstream_st* stream) {
  if (!indexable(p)) return Status::invalid_argument;
  const auto run = [&](auto tag, auto n, auto rows) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    constexpr int N = decltype(n)::value;
    constexpr bool kRows = decltype(rows)::value;
    const Geometry geo = geometry(p, N);
    A* const coefficients = static_cast<A*>(p.workspace);
    A* const partial = coefficients + 3 * p.channels;
    const S *const x = static_cast<const S*>(p.input), *const g = static_cast<const S*>(p.grad_output);
    const S* const y = static_cast<const S*>(p.result);
    const A* const mean = static_cast<const A*>(p.mean);
    const bool sums = p.grad_weight || p.grad_bias || (p.training && p.grad_input);
    Status status = Status::ok;
    if (sums)
      status = launch(batch_norm_backward_sums_kernel<S, N, kRows>, geo.grid, geo.block, 0, stream, g, x, y, mean,
                      partial, geo.cut);
    if (status == Status::ok)
      status = launch(batch_norm_backward_statistics_kernel<A>, statistics_grid(p), dim3(kWarp, kWarpsPerBlock), 0,
                      stream, partial, coefficients, p, geo.cut, sums);
    if (status != Status::ok || !(p.grad_input || p.grad_residual)) return status;
    return launch(batch_norm_backward_kernel<S, N, kRows>, geo.grid, geo.block, 0, stream, g, x, y,
                  static_cast<S*>(p.grad_input), static_cast<S*>(p.grad_residual), mean, coefficients, p.training,
                  geo.cut);
  };
  return with_layout(p, run, p.input, p.grad_output, p.result, p.grad_input, p.grad_residual);
}

}  // namespace fastnn::cuda
