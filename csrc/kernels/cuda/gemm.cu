// Matrix products over any strides, and column sums.
#include "../epilogue.h"

#include "device/clamp.h"
#include "device/index.h"
#include "device/reduce.h"
#include "device/tile.h"

namespace fastnn::cuda {
namespace {

// ---- C = act(alpha A B + bias + beta D) -----------------------------------------------------------------------------

template <class S>
struct Strided {
  const S* p;
  int64_t stride_row, stride_k;
  bool along_k;

  using Row = const S*;
  __device__ __forceinline__ Row row(int r) const { return p + r * stride_row; }
  __device__ __forceinline__ acc_t<S> at(Row row, int k) const { return to_acc(row[k * stride_k]); }
};

template <class S, Multiply kMultiply>
__global__ void __launch_bounds__(kTileThreads)
    gemm_kernel(Strided<S> a, Strided<S> b, const __grid_constant__ GemmParams p, const __grid_constant__ Epilogue e) {
  using A = acc_t<S>;
  const TileAt at = tile_at(int(p.m), int(p.n));
  a.p += at.other * p.a_stride_batch;
  b.p += at.other * p.b_stride_batch;
  S* const c = static_cast<S*>(p.c) + at.other * p.c_stride_batch;
  const S* const d = p.d ? static_cast<const S*>(p.d) + at.other * p.d_stride_batch : nullptr;
  const S* const bias = static_cast<const S*>(e.bias);
  const A alpha = A(p.alpha), beta = A(p.beta);
  product<S, kMultiply>(a, b, int(p.m), int(p.n), at.row0, at.column0, 0, int(p.k),
                        p.c_stride_m == 1 && p.c_stride_n != 1, [&](int m, int n, A sum) {
                          A y = alpha * sum;
                          if (bias) y += to_acc(bias[n]);
                          if (d) y += beta * to_acc(d[m * p.d_stride_m + n * p.d_stride_n]);
                          if (p.relu && y < A(0)) y = 0;
                          c[m * p.c_stride_m + n * p.c_stride_n] = from_acc<S>(e.clamps ? clamp(y, e) : y);
                        });
}

// ---- column sums ---------------------------------------------------------------------------------------------------

constexpr int kSumColumns = 32, kSumRows = 16;

// Neighbouring columns lie together: a block sums 32 of them, 16 rows at a time.
template <class S>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    column_sum_wide_kernel(const __grid_constant__ ColumnSumParams p) {
  using A = acc_t<S>;
  FASTNN_SHARED(partial, A[kSumRows][kSumColumns]);
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  A sum = 0;
  if (column < p.columns)
    for (int64_t r = threadIdx.y; r < p.rows; r += kSumRows)
      sum += to_acc(static_cast<const S*>(p.x)[r * p.x_stride_row + column * p.x_stride_column]);
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= p.columns) return;
  for (int r = 1; r < kSumRows; ++r) sum += partial[r][threadIdx.x];
  static_cast<S*>(p.y)[column] = from_acc<S>(sum);
}

// Neighbouring rows lie together: a block per column.
template <class S>
__global__ void __launch_bounds__(256) column_sum_tall_kernel(const __grid_constant__ ColumnSumParams p) {
  using A = acc_t<S>;
  for (int64_t column = blockIdx.x; column < p.columns; column += gridDim.x) {
    A sum = 0;
    for (int64_t r = threadIdx.x; r < p.rows; r += blockDim.x)
      sum += to_acc(static_cast<const S*>(p.x)[r * p.x_stride_row + column * p.x_stride_column]);
    sum = block_reduce(sum, A(0), Add{});
    if (threadIdx.x == 0) static_cast<S*>(p.y)[column] = from_acc<S>(sum);
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t gemm_workspace(const GemmParams&) { return 0; }

Status gemm(const GemmParams& p, CUstream_st* stream) { return gemm(p, Epilogue{}, stream); }

Status gemm(const GemmParams& p, const Epilogue& e, CUstream_st* stream) {
  if (max64(max64(p.m, p.n), p.k) > kMaxIndex - kTile) return Status::invalid_argument;
  if (p.batch * p.m * p.n == 0) return Status::ok;
  return dispatch_product(p.dtype, p.tf32, p.m, p.n, p.k, [&](auto tag, auto multiply) {
    using S = typename decltype(tag)::type;
    const int64_t tiles = tiles_of(p.m, p.n), most = max64(1, longest_run() / tiles);
    for (int64_t first = 0; first < p.batch; first += most) {
      GemmParams part = p;
      part.c = static_cast<S*>(p.c) + first * p.c_stride_batch;
      if (p.d) part.d = static_cast<const S*>(p.d) + first * p.d_stride_batch;
      const Strided<S> a{static_cast<const S*>(p.a) + first * p.a_stride_batch, p.a_stride_m, p.a_stride_k,
                         p.a_stride_m != 1};
      const Strided<S> b{static_cast<const S*>(p.b) + first * p.b_stride_batch, p.b_stride_n, p.b_stride_k,
                         p.b_stride_n != 1};
      const Status status =
          launch_tiles(gemm_kernel<S, multiply.value>, tiles * min64(most, p.batch - first), stream, a, b, part, e);
      if (status != Status::ok) return status;
    }
    return Status::ok;
  });
}

Status column_sum(const ColumnSumParams& p, CUstream_st* stream) {
  if (p.columns == 0) return Status::ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.x_stride_row == 1) return launch(column_sum_tall_kernel<S>, grid_up_to(p.columns), dim3(256), 0, stream, p);
    return launch(column_sum_wide_kernel<S>, grid_of(ceil_div(p.columns, kSumColumns)), dim3(kSumColumns, kSumRows), 0,
                  stream, p);
  });
}

}  // namespace fastnn::cuda
