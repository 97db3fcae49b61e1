// Cross-entropy in one sweep over the logits forward and one backward: a warp per short row, a block per long one, a
// thread per column when the classes of a row do not lie together.
#include "../cross_entropy.h"

#include "device/loss.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpRowClasses = 1024;

// With eps = label_smoothing, w the class weights (1 without)
// and z_c = log_sum - (x_c - max) = -log p_c, a row's loss is
//   class index t:    (1 - eps) w_t z_t + eps / C sum_c w_c z_c
//   probabilities t:  sum_c w_c q_c z_c,  q_c = (1 - eps) t_c + eps / C
// and its gradient, times the row's scale,
//   (1 - eps) w_t (p_c - [c = t]) + eps / C (p_c sum_c w_c - w_c),  or  p_c sum_c w_c q_c - w_c q_c.
template <class S>
struct Problem {
  using A = acc_t<S>;
  CrossEntropyParams p;
  A keep, spread;

  explicit Problem(const CrossEntropyParams& p)
      : p(p), keep(A(1 - p.label_smoothing)), spread(A(p.label_smoothing / double(max64(1, p.classes)))) {}

  __device__ __forceinline__ bool probabilities() const { return p.target_kind == TargetKind::probabilities; }
  __device__ __forceinline__ bool smooth() const { return p.label_smoothing != 0; }
  __device__ __forceinline__ int64_t rows() const { return p.outer * p.inner; }
  __device__ __forceinline__ A* maximum() const { return static_cast<A*>(p.stats); }
  __device__ __forceinline__ A* log_sum() const { return maximum() + rows(); }
  __device__ __forceinline__ A* divisor() const { return maximum() + 2 * rows(); }
  __device__ __forceinline__ A x(int64_t i) const { return to_acc(static_cast<const S*>(p.input)[i]); }
  __device__ __forceinline__ A weight(int64_t c) const {
    return p.weight ? to_acc(static_cast<const S*>(p.weight)[c]) : A(1);
  }
  // w_c q_c, with q_c = 1 for class indices; i is where class c of the row lies.
  __device__ __forceinline__ A share(int64_t c, int64_t i) const {
    return probabilities() ? weight(c) * (keep * to_acc(static_cast<const S*>(p.target)[i]) + spread) : weight(c);
  }
  // What a row's loss is multiplied by in backward.
  __device__ __forceinline__ A scale(int64_t row) const {
    const S* const g = static_cast<const S*>(p.grad_output);
    if (p.reduction == Reduction::none) return to_acc(g[row]);
    return p.reduction == Reduction::mean ? to_acc(g[0]) / *divisor() : to_acc(g[0]);
  }
};

// ---- one row, its classes `step` apart from `at` on, shared by the threads of a group -------------------------------

// The loss of a row and its weight in a mean, the same in every thread of the group.
template <int N, class S, class Group>
__device__ __forceinline__ LossSums<acc_t<S>> forward_row(const Problem<S>& k, const Group& group, int64_t row,
                                                          int64_t at, int64_t step) {
  using A = acc_t<S>;
  const int64_t t = k.probabilities() ? 0 : class_of(k.p, row);
  if (t < 0) {
    if (group.rank() == 0) k.maximum()[row] = k.log_sum()[row] = 0;
    return {0, 0};
  }
  Online<A> online = kNothing<A>;
  for (int64_t c = group.rank() * N; c < k.p.classes; c += group.size() * N) {
    const Pack<S, N> pack = load_pack<N>(static_cast<const S*>(k.p.input) + at + c * step);
#pragma unroll
    for (int n = 0; n < N; ++n) online.add(to_acc(pack.at[n]));
  }
  online = group.reduce(online, kNothing<A>, Merge{});
  const A max = online.max, log_sum = log_of(online.denominator());
  if (group.rank() == 0) k.maximum()[row] = max, k.log_sum()[row] = log_sum;
  A shares = 0;
  if (k.probabilities() || k.smooth()) {
    for (int64_t c = group.rank(); c < k.p.classes; c += group.size())
      shares += k.share(c, at + c * step) * (log_sum - (k.x(at + c * step) - max));
    shares = group.reduce(shares, A(0), Add{});
  }
  if (k.probabilities()) return {shares, 1};
  const A w = k.weight(t);
  A loss = k.keep * w * (log_sum - (k.x(at + t * step) - max));
  if (k.smooth()) loss += k.spread * shares;
  return {loss, w};
}

template <int N, class S, class Group>
__device__ __forceinline__ void backward_row(const Problem<S>& k, const Group& group, int64_t row, int64_t at,
                                             int64_t step) {
  using A = acc_t<S>;
  const A max = k.maximum()[row], log_sum = k.log_sum()[row], g = k.scale(row);
  S *const dx = static_cast<S*>(k.p.grad_input), *const dt = static_cast<S*>(k.p.grad_target);
  if (k.probabilities()) {
    A sum = 0;
    for (int64_t c = group.rank(); c < k.p.classes; c += group.size()) sum += k.share(c, at + c * step);
    sum = g * group.reduce(sum, A(0), Add{});
    for (int64_t c = group.rank(); c < k.p.classes; c += group.size()) {
      const int64_t i = at + c * step;
      const A log_p = (k.x(i) - max) - log_sum;
      if (dx) dx[i] = from_acc<S>(exp_of(log_p) * sum - g * k.share(c, i));
      if (dt) dt[i] = from_acc<S>(-g * k.keep * k.weight(c) * log_p);
    }
    return;
  }
  A weight_sum = A(k.p.classes);
  if (k.p.weight && k.smooth()) {
    weight_sum = 0;
    for (int64_t c = group.rank(); c < k.p.classes; c += group.size()) weight_sum += k.weight(c);
    weight_sum = group.reduce(weight_sum, A(0), Add{});
  }
  const int64_t t = class_of(k.p, row);
  const A kept = t < 0 ? A(0) : g * k.keep * k.weight(t), spread = g * k.spread;
  const A of_p = k.smooth() ? kept + spread * weight_sum : kept;
  for (int64_t c = group.rank() * N; c < k.p.classes; c += group.size() * N) {
    Pack<S, N> pack = load_pack<N>(static_cast<const S*>(k.p.input) + at + c * step);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A p = exp_of((to_acc(pack.at[n]) - max) - log_sum);
      const bool here = c + n == t;
      A d = k.smooth() ? p * of_p - spread * k.weight(c + n) - (here ? kept : A(0)) : (here ? p - A(1) : p) * kept;
      pack.at[n] = from_acc<S>(t < 0 ? A(0) : d);
    }
    store_pack(dx + at + c * step, pack);
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class S, int N>
__global__ void __launch_bounds__(1024) cross_entropy_block_kernel(const __grid_constant__ Problem<S> k) {
  const int64_t row = blockIdx.x;
  const auto sums = forward_row<N>(k, BlockGroup{}, row, row * k.p.classes, 1);
  if (threadIdx.x == 0) keep_loss<S>(k.p, row, sums, sums);
}
template <class S>
__global__ void __launch_bounds__(kThreads) cross_entropy_warp_kernel(const __grid_constant__ Problem<S> k) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  LossSums<acc_t<S>> sums{0, 0};
  if (row < k.p.outer) sums = forward_row<1>(k, WarpGroup{}, row, row * k.p.classes, 1);
  const bool first = threadIdx.x % kWarp == 0;
  const LossSums<acc_t<S>> none{0, 0}, all = block_reduce(first ? sums : none, none, AddLoss{});
  if (first && row < k.p.outer) keep_loss<S>(k.p, row, sums, all);
}
template <class S>
__global__ void __launch_bounds__(kThreads) cross_entropy_columns_kernel(const __grid_constant__ Problem<S> k) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  LossSums<acc_t<S>> sums{0, 0};
  if (row < k.rows())
    sums =
        forward_row<1>(k, ThreadGroup{}, row, row / k.p.inner * k.p.classes * k.p.inner + row % k.p.inner, k.p.inner);
  const LossSums<acc_t<S>> none{0, 0}, all = block_reduce(sums, none, AddLoss{});
  if (row < k.rows()) keep_loss<S>(k.p, row, sums, all);
}

// Sums the blocks' losses, in their order, in one block.
template <class S>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_total_kernel(const __grid_constant__ Problem<S> k, int64_t blocks) {
  using A = acc_t<S>;
  const LossSums<double> all = total_loss(static_cast<const A*>(k.p.partials), blocks);
  if (threadIdx.x > 0) return;
  const double weight = k.probabilities() ? (k.p.classes == 0 ? 0 : double(k.rows())) : all.weight;
  *k.divisor() = A(weight);
  *static_cast<S*>(k.p.loss) = from_acc<S>(A(k.p.reduction == Reduction::mean ? all.loss / weight : all.loss));
}

template <class S, int N>
__global__ void __launch_bounds__(1024) cross_entropy_backward_block_kernel(const __grid_constant__ Problem<S> k) {
  const int64_t row = blockIdx.x;
  backward_row<N>(k, BlockGroup{}, row, row * k.p.classes, 1);
}
template <class S>
__global__ void __launch_bounds__(kThreads) cross_entropy_backward_warp_kernel(const __grid_constant__ Problem<S> k) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row < k.p.outer) backward_row<1>(k, WarpGroup{}, row, row * k.p.classes, 1);
}
template <class S>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_columns_kernel(const __grid_constant__ Problem<S> k) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < k.rows())
    backward_row<1>(k, ThreadGroup{}, row, row / k.p.inner * k.p.classes * k.p.inner + row % k.p.inner, k.p.inner);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

bool warp_rows(const CrossEntropyParams& p) { return p.inner == 1 && p.classes <= kWarpRowClasses; }
int block_threads(int64_t packs) { return int(min64(1024, round_up(max64(packs / 4, 128), kWarp))); }

}  // namespace

int64_t cross_entropy_blocks(const CrossEntropyParams& p) {
  if (p.inner > 1) return ceil_div(p.outer * p.inner, kThreads);
  return warp_rows(p) ? ceil_div(p.outer, kThreads / kWarp) : p.outer;
}

Status cross_entropy_forward(const CrossEntropyParams& p, CUstream_st* stream) {
  const int64_t blocks = cross_entropy_blocks(p);
  if (blocks > 0x7fffffff) return Status::invalid_argument;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int N = kPack<S>;
    const Problem<S> k(p);
    Status status = Status::ok;
    if (blocks > 0) {
      const dim3 grid = grid_of(blocks);
      if (p.inner > 1) {
        status = launch(cross_entropy_columns_kernel<S>, grid, dim3(kThreads), 0, stream, k);
      } else if (warp_rows(p)) {
        status = launch(cross_entropy_warp_kernel<S>, grid, dim3(kThreads), 0, stream, k);
      } else {
        const bool packed = p.classes % N == 0 && aligned16(p.input);
        auto* kernel = packed ? cross_entropy_block_kernel<S, N> : cross_entropy_block_kernel<S, 1>;
        status = launch(kernel, grid, dim3(block_threads(p.classes / (packed ? N : 1))), 0, stream, k);
      }
    }
    if (status != Status::ok || p.reduction == Reduction::none) return status;
    return launch(cross_entropy_total_kernel<S>, dim3(1), dim3(kThreads), 0, stream, k, blocks);
  });
}

Status cross_entropy_backward(const CrossEntropyParams& p, CUstream_st* stream) {
  const int64_t blocks = cross_entropy_blocks(p);
  if (blocks > 0x7fffffff) return Status::invalid_argument;
  if (blocks == 0 || p.classes == 0) return Status::ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int N = kPack<S>;
    const Problem<S> k(p);
    const dim3 grid = grid_of(blocks);
    if (p.inner > 1) return launch(cross_entropy_backward_columns_kernel<S>, grid, dim3(kThreads), 0, stream, k);
    if (warp_rows(p)) return launch(cross_entropy_backward_warp_kernel<S>, grid, dim3(kThreads), 0, stream, k);
    const bool packed = p.classes % N == 0 && aligned16(p.input, p.grad_input);
    auto* kernel = packed ? cross_entropy_backward_block_kernel<S, N> : cross_entropy_backward_block_kernel<S, 1>;
    return launch(kernel, grid, dim3(block_threads(p.classes / (packed ? N : 1))), 0, stream, k);
  });
}

}  // namespace fastnn::cuda
