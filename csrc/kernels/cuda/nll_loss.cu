// Negative log likelihood: a gather forward, one write of every gradient element backward.
#include "../nll_loss.h"

#include "device/index.h"
#include "device/loss.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;

template <class S>
__device__ __forceinline__ acc_t<S> weight_of(const NllLossParams& p, int64_t t) {
  return p.weight ? to_acc(static_cast<const S*>(p.weight)[t]) : acc_t<S>(1);
}
template <class S>
__device__ __forceinline__ LossSums<acc_t<S>> row_loss(const NllLossParams& p, int64_t row) {
  const int64_t t = class_of(p, row);
  if (t < 0) return {0, 0};
  const acc_t<S> w = weight_of<S>(p, t);
  const int64_t line = row / p.width, n = p.height == 1 ? line : line / p.height;
  const int64_t at = n * p.x_stride_n + (line - n * p.height) * p.x_stride_h + (row - line * p.width) * p.x_stride_w +
                     t * p.x_stride_class;
  return {-w * to_acc(static_cast<const S*>(p.input)[at]), w};
}

template <class S>
__global__ void __launch_bounds__(kThreads) nll_loss_kernel(const __grid_constant__ NllLossParams p, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row == 0) *static_cast<acc_t<S>*>(p.total_weight) = 0;
  if (row < rows) static_cast<S*>(p.loss)[row] = from_acc<S>(row_loss<S>(p, row).loss);
}

// One block: a few nanoseconds a row, and the order of the sum is fixed.
template <class S>
__global__ void __launch_bounds__(kThreads)
    nll_loss_reduced_kernel(const __grid_constant__ NllLossParams p, int64_t rows) {
  using A = acc_t<S>;
  LossSums<double> sums{0, 0};
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    const LossSums<A> mine = row_loss<S>(p, row);
    sums.loss += double(mine.loss);
    sums.weight += double(mine.weight);
  }
  sums = block_reduce(sums, LossSums<double>{0, 0}, AddLoss{});
  if (threadIdx.x > 0) return;
  *static_cast<A*>(p.total_weight) = A(sums.weight);
  *static_cast<S*>(p.loss) = from_acc<S>(A(p.reduction == Reduction::mean ? sums.loss / sums.weight : sums.loss));
}

// A thread per element of images [first, first + count / (classes * inner)).
template <class S>
__global__ void __launch_bounds__(kThreads)
    nll_loss_backward_kernel(const __grid_constant__ NllLossParams p, Divisor classes, Divisor inner, int64_t first,
                             int count) {
  using A = acc_t<S>;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  int i, c;
  const int outer = classes.divide(inner.divide(int(item), i), c);
  const int64_t row = (first + outer) * p.inner + i, t = class_of(p, row);
  A d = 0;
  if (t == c) {
    const S* const g = static_cast<const S*>(p.grad_output);
    A scale = to_acc(g[p.reduction == Reduction::none ? row : 0]);
    if (p.reduction == Reduction::mean) scale /= *static_cast<const A*>(p.total_weight);
    d = -weight_of<S>(p, t) * scale;
  }
  static_cast<S*>(p.grad_input)[first * p.classes * p.inner + item] = from_acc<S>(d);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

Status nll_loss_forward(const NllLossParams& p, CUstream_st* stream) {
  const int64_t rows = p.outer * p.inner;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.reduction != Reduction::none)
      return launch(nll_loss_reduced_kernel<S>, dim3(1), dim3(kThreads), 0, stream, p, rows);
    return launch(nll_loss_kernel<S>, grid_of(max64(1, ceil_div(rows, kThreads))), dim3(kThreads), 0, stream, p, rows);
  });
}

Status nll_loss_backward(const NllLossParams& p, CUstream_st* stream) {
  const int64_t image = p.classes * p.inner;
  if (image > kMaxIndex) return Status::invalid_argument;
  if (image == 0) return Status::ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t most = max64(1, longest_run() / image);
    for (int64_t first = 0; first < p.outer; first += most) {
      const int64_t count = min64(most, p.outer - first) * image;
      const Status status = launch(nll_loss_backward_kernel<S>, grid_of(ceil_div(count, kThreads)), dim3(kThreads), 0,
                                   stream, p, Divisor(p.classes), Divisor(p.inner), first, int(count));
      if (status != Status::ok) return status;
    }
    return Status::ok;
  });
}

}  // namespace fastnn::cuda
