// Softmax and log-softmax over the middle dimension of [outer, classes, inner]: a warp per short row (kept in
// registers), a block per long row (online: two reads, one write), a thread or more per column when inner > 1.
#include "../softmax.h"

#include "device/online.h"

namespace fastnn::cuda {
namespace {

// One element of the result; tail is 1 / sum, or log(sum) for the log form.
template <class A>
__device__ __forceinline__ A forward_of(A x, A max, A tail, bool log) {
  return log ? (x - max) - tail : exp_of(x - max) * tail;
}
template <class A>
__device__ __forceinline__ A tail_of(A sum, bool log) {
  return log ? log_of(sum) : A(1) / sum;
}
// softmax: dx = y (g - sum(g y));  log_softmax: dx = g - exp(y) sum(g).
template <class A>
__device__ __forceinline__ A term_of(A g, A y, bool log) {
  return log ? g : g * y;
}
template <class A>
__device__ __forceinline__ A backward_of(A g, A y, A sum, bool log) {
  return log ? g - exp_of(y) * sum : y * (g - sum);
}

// ---- a warp per row ------------------------------------------------------------------------------------------------

constexpr int kRowsPerBlock = 4;

// K packs of N elements of a row in each lane; lanes past the end hold `fill`.
template <class S, int N, int K>
struct WarpRow {
  using A = acc_t<S>;
  A at[K][N];

  __device__ __forceinline__ void load(const S* row, int classes, A fill) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = (k * kWarp + int(threadIdx.x)) * N;
      if (i < classes) {
        const Pack<S, N> pack = load_pack<N>(row + i);
#pragma unroll
        for (int n = 0; n < N; ++n) at[k][n] = to_acc(pack.at[n]);
      } else {
#pragma unroll
        for (int n = 0; n < N; ++n) at[k][n] = fill;
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void store(S* row, int classes, const F& f) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = (k * kWarp + int(threadIdx.x)) * N;
      if (i < classes) {
        Pack<S, N> pack;
#pragma unroll
        for (int n = 0; n < N; ++n) pack.at[n] = from_acc<S>(f(k, n));
        store_pack(row + i, pack);
      }
    }
  }
};

template <class S, int N, int K>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    softmax_warp_kernel(const S* x, S* y, int64_t rows, int classes, bool log) {
  using A = acc_t<S>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  WarpRow<S, N, K> v;
  v.load(x + row * classes, classes, -kInf<A>);
  A max = -kInf<A>;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int n = 0; n < N; ++n) max = max_of(max, v.at[k][n]);
  max = warp_reduce(max, Max{});
  A sum = 0;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A e = exp_of(v.at[k][n] - max);  // 0 past the end
      const bool real = (k * kWarp + int(threadIdx.x)) * N < classes;
      sum += real ? e : A(0);
      if (!log) v.at[k][n] = e;
    }
  const A tail = tail_of(warp_reduce(sum, Add{}), log);
  v.store(y + row * classes, classes,
          [&](int k, int n) { return log ? (v.at[k][n] - max) - tail : v.at[k][n] * tail; });
}

template <class S, int N, int K>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    softmax_backward_warp_kernel(const S* grad, const S* y, S* dx, int64_t rows, int classes, bool log) {
  using A = acc_t<S>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  WarpRow<S, N, K> g, r;
  g.load(grad + row * classes, classes, A(0));
  r.load(y + row * classes, classes, A(0));
  A sum = 0;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int n = 0; n < N; ++n) sum += term_of(g.at[k][n], r.at[k][n], log);
  sum = warp_reduce(sum, Add{});
  g.store(dx + row * classes, classes, [&](int k, int n) { return backward_of(g.at[k][n], r.at[k][n], sum, log); });
}

// ---- a block per row -----------------------------------------------------------------------------------------------

// Calls f(offset) for the thread's packs of N elements in [0, classes); classes % N == 0.
template <int N, class F>
__device__ __forceinline__ void for_packs(int64_t classes, const F& f) {
  for (int64_t i = int64_t(threadIdx.x) * N; i < classes; i += int64_t(blockDim.x) * N) f(i);
}

template <class S, int N>
__global__ void softmax_block_kernel(const S* x, S* y, int64_t rows, int64_t classes, bool log) {
  using A = acc_t<S>;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const S* const xr = x + row * classes;
    S* const yr = y + row * classes;
    Online<A> mine = kNothing<A>;
    for_packs<N>(classes, [&](int64_t i) {
      const Pack<S, N> pack = load_pack<N>(xr + i);
#pragma unroll
      for (int n = 0; n < N; ++n) mine.add(to_acc(pack.at[n]));
    });
    const Online<A> all = block_reduce(mine, kNothing<A>, Merge{});
    const A tail = tail_of(all.denominator(), log);
    for_packs<N>(classes, [&](int64_t i) {
      Pack<S, N> pack = load_pack<N>(xr + i);
#pragma unroll
      for (int n = 0; n < N; ++n) pack.at[n] = from_acc<S>(forward_of(to_acc(pack.at[n]), all.max, tail, log));
      store_pack(yr + i, pack);
    });
  }
}

template <class S, int N>
__global__ void softmax_backward_block_kernel(const S* grad, const S* y, S* dx, int64_t rows, int64_t classes,
                                              bool log) {
  using A = acc_t<S>;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const S *const g = grad + row * classes, *const r = y + row * classes;
    A sum = 0;
    for_packs<N>(classes, [&](int64_t i) {
      const Pack<S, N> pg = load_pack<N>(g + i), pr = load_pack<N>(r + i);
#pragma unroll
      for (int n = 0; n < N; ++n) sum += term_of(to_acc(pg.at[n]), to_acc(pr.at[n]), log);
    });
    sum = block_reduce(sum, A(0), Add{});
    for_packs<N>(classes, [&](int64_t i) {
      Pack<S, N> pg = load_pack<N>(g + i);
      const Pack<S, N> pr = load_pack<N>(r + i);
#pragma unroll
      for (int n = 0; n < N; ++n) pg.at[n] = from_acc<S>(backward_of(to_acc(pg.at[n]), to_acc(pr.at[n]), sum, log));
      store_pack(dx + row * classes + i, pg);
    });
  }
}

// ---- columns: inner > 1 --------------------------------------------------------------------------------------------

constexpr int kColumnThreads = 256;

// blockDim.x neighbouring columns; blockDim.y threads share each column's classes. f(offset of the column's first
// element, whether the column exists); every thread of the block calls it.
template <class F>
__device__ __forceinline__ void for_columns(int64_t outer, int64_t classes, int64_t inner, const F& f) {
  const int64_t groups = (inner + blockDim.x - 1) / blockDim.x;
  for (int64_t b = blockIdx.x; b < outer * groups; b += gridDim.x) {
    const int64_t column = b % groups * blockDim.x + threadIdx.x;
    f(b / groups * classes * inner + column, column < inner);
  }
}
// Folds the values of the threads that share a column.
template <class A, class Op>
__device__ __forceinline__ A column_reduce(A x, const Op& op) {
  FASTNN_SHARED(partial, A[kColumnThreads]);
  __syncthreads();  // an earlier reduction may still be read
  partial[threadIdx.y * blockDim.x + threadIdx.x] = x;
  __syncthreads();
  x = partial[threadIdx.x];
  for (unsigned t = 1; t < blockDim.y; ++t) x = op(x, partial[t * blockDim.x + threadIdx.x]);
  return x;
}

template <class S>
__global__ void __launch_bounds__(kColumnThreads)
    softmax_columns_kernel(const S* x, S* y, int64_t outer, int64_t classes, int64_t inner, bool log) {
  using A = acc_t<S>;
  for_columns(outer, classes, inner, [&](int64_t at, bool real) {
    Online<A> mine = kNothing<A>;
    if (real)
      for (int64_t c = threadIdx.y; c < classes; c += blockDim.y) mine.add(to_acc(x[at + c * inner]));
    const Online<A> all = column_reduce(mine, Merge{});
    const A tail = tail_of(all.denominator(), log);
    if (real)
      for (int64_t c = threadIdx.y; c < classes; c += blockDim.y)
        y[at + c * inner] = from_acc<S>(forward_of(to_acc(x[at + c * inner]), all.max, tail, log));
  });
}

template <class S>
__global__ void __launch_bounds__(kColumnThreads)
    softmax_backward_columns_kernel(const S* grad, const S* y, S* dx, int64_t outer, int64_t classes, int64_t inner,
                                    bool log) {
  using A = acc_t<S>;
  for_columns(outer, classes, inner, [&](int64_t at, bool real) {
    A sum = 0;
    if (real)
      for (int64_t c = threadIdx.y; c < classes; c += blockDim.y)
        sum += term_of(to_acc(grad[at + c * inner]), to_acc(y[at + c * inner]), log);
    sum = column_reduce(sum, Add{});
    if (real)
      for (int64_t c = threadIdx.y; c < classes; c += blockDim.y) {
        const int64_t i = at + c * inner;
        dx[i] = from_acc<S>(backward_of(to_acc(grad[i]), to_acc(y[i]), sum, log));
      }
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

constexpr int64_t kWarpRowClasses = 1024;

// Calls f(Constant<N>, Constant<K>) for the fewest packs of N
// elements per lane that hold a row of at most 1024 classes.
template <class S, class F>
Status with_warp_shape(int64_t classes, bool packed, const F& f) {
  constexpr int N = kPack<S>;
  if (packed) {
    if (classes <= kWarp * N) return f(Constant<N>{}, Constant<1>{});
    if (classes <= kWarp * N * 4) return f(Constant<N>{}, Constant<4>{});
    return f(Constant<N>{}, Constant<(kWarpRowClasses + kWarp * N - 1) / (kWarp * N)>{});
  }
  if (classes <= kWarp) return f(Constant<1>{}, Constant<1>{});
  if (classes <= kWarp * 4) return f(Constant<1>{}, Constant<4>{});
  return f(Constant<1>{}, Constant<kWarpRowClasses / kWarp>{});
}

int threads_for_row(int64_t packs) { return int(min64(1024, round_up(max64(packs / 4, 128), kWarp))); }

// Few columns share a block's threads along classes; many take a thread each.
dim3 column_block(const SoftmaxParams& p) {
  constexpr int64_t kManyColumns = 1 << 17;
  return p.outer * p.inner >= kManyColumns || p.classes < 8 ? dim3(kColumnThreads, 1) : dim3(32, kColumnThreads / 32);
}

}  // namespace

Status softmax_forward(const SoftmaxParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* x = static_cast<const S*>(p.input);
    S* y = static_cast<S*>(p.output);
    if (p.inner > 1) {
      const dim3 block = column_block(p);
      return launch(softmax_columns_kernel<S>, grid_up_to(p.outer * ceil_div(p.inner, block.x)), block, 0, stream, x, y,
                    p.outer, p.classes, p.inner, p.log);
    }
    const bool packed = p.classes % kPack<S> == 0 && aligned16(x, y);
    if (p.classes <= kWarpRowClasses) {
      return with_warp_shape<S>(p.classes, packed, [&](auto n, auto k) {
        return launch(softmax_warp_kernel<S, n.value, k.value>, grid_of(ceil_div(p.outer, kRowsPerBlock)),
                      dim3(kWarp, kRowsPerBlock), 0, stream, x, y, p.outer, int(p.classes), p.log);
      });
    }
    auto* kernel = packed ? softmax_block_kernel<S, kPack<S>> : softmax_block_kernel<S, 1>;
    return launch(kernel, grid_up_to(p.outer), dim3(threads_for_row(p.classes / (packed ? kPack<S> : 1))), 0, stream, x,
                  y, p.outer, p.classes, p.log);
  });
}

Status softmax_backward(const SoftmaxParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* g = static_cast<const S*>(p.grad_output);
    const S* y = static_cast<const S*>(p.result);
    S* dx = static_cast<S*>(p.grad_input);
    if (p.inner > 1) {
      const dim3 block = column_block(p);
      return launch(softmax_backward_columns_kernel<S>, grid_up_to(p.outer * ceil_div(p.inner, block.x)), block, 0,
                    stream, g, y, dx, p.outer, p.classes, p.inner, p.log);
    }
    const bool packed = p.classes % kPack<S> == 0 && aligned16(g, y, dx);
    if (p.classes <= kWarpRowClasses) {
      return with_warp_shape<S>(p.classes, packed, [&](auto n, auto k) {
        return launch(softmax_backward_warp_kernel<S, n.value, k.value>, grid_of(ceil_div(p.outer, kRowsPerBlock)),
                      dim3(kWarp, kRowsPerBlock), 0, stream, g, y, dx, p.outer, int(p.classes), p.log);
      });
    }
    auto* kernel = packed ? softmax_backward_block_kernel<S, kPack<S>> : softmax_backward_block_kernel<S, 1>;
    return launch(kernel, grid_up_to(p.outer), dim3(threads_for_row(p.classes / (packed ? kPack<S> : 1))), 0, stream, g,
                  y, dx, p.outer, p.classes, p.log);
  });
}

}  // namespace fastnn::cuda
