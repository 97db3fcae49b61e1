// Optimizer steps over a list of tensors: the list travels in the kernel's parameters, so a model of a few hundred
// tensors is one launch. A block takes a fixed piece of one tensor.
#include "../optim.h"

#include "device/dtype.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 4096;  // elements of one block

// One tensor of a launch. `packed`: all its arrays can be accessed 16 bytes at a time.
struct Item {
  void* param;
  const void* grad;
  void* state[3];
  int64_t size;
  double step_size, denom_scale;
  bool packed;
};

template <int kItems>
struct ItemList {
  Item items[kItems];
  int first_block[kItems + 1];  // of each item
  int count;
};
constexpr int kFewItems = 16, kManyItems = 256;
static_assert(sizeof(ItemList<kManyItems>) + sizeof(OptimParams) < 32000, "a kernel's parameters are at most 32764 bytes");

// ---- rules: one element --------------------------------------------------------------------------------------------

// The gradient a rule works on: its sign, and the L2 penalty.
template <class A>
__device__ __forceinline__ A gradient_of(const OptimParams& o, A g, A param) {
  if (o.maximize) g = -g;
  return o.weight_decay != 0 ? A(o.weight_decay) * param + g : g;
}

struct Adam {
  static constexpr int kStates = 3;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item& t, A& param, A g, A (&state)[3]) {
    if (o.param_scale != 1) param *= A(o.param_scale);
    g = gradient_of(o, g, param);
    A &m = state[0], &v = state[1];
    m = A(1 - o.beta1) * (g - m) + m;
    v = A(1 - o.beta2) * g * g + A(o.beta2) * v;
    A largest = v;
    if (t.state[2]) {
      largest = !(state[2] >= v) && state[2] == state[2] ? v : state[2];  // NaN in either gives NaN
      state[2] = largest;
    }
    param -= A(t.step_size) * (m / (sqrt_of(largest) * A(t.denom_scale) + A(o.eps)));
  }
};

struct Sgd {
  static constexpr int kStates = 1;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item& t, A& param, A g, A (&state)[3]) {
    g = gradient_of(o, g, param);
    if (t.state[0]) {
      const A buffer = o.first ? g : A(o.beta2) * g + A(o.beta1) * state[0];
      state[0] = buffer;
      g = o.nesterov ? A(o.beta1) * buffer + g : buffer;
    }
    param -= A(t.step_size) * g;
  }
};

// ---- kernel --------------------------------------------------------------------------------------------------------

// Elements [from, to) of one tensor, N at a time; to - from is a multiple of N but for a tensor's tail when N is 1.
template <class S, class Rule, int N>
__device__ __forceinline__ void step_piece(const OptimParams& o, const Item& t, int64_t from, int64_t to) {
  using A = acc_t<S>;
  S* const param = static_cast<S*>(t.param);
  const S* const grad = static_cast<const S*>(t.grad);
  for (int64_t i = from + int64_t(threadIdx.x) * N; i < to; i += kThreads * N) {
    Pack<S, N> p = load_pack<N>(param + i);
    const Pack<S, N> g = load_pack<N>(grad + i);
    Pack<S, N> states[Rule::kStates];
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s)
      if (t.state[s]) states[s] = load_pack<N>(static_cast<const S*>(t.state[s]) + i);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      A value = to_acc(p.at[n]), state[3] = {};
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s)
        if (t.state[s]) state[s] = to_acc(states[s].at[n]);
      Rule::step(o, t, value, to_acc(g.at[n]), state);
      p.at[n] = from_acc<S>(value);
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s)
        if (t.state[s]) states[s].at[n] = from_acc<S>(state[s]);
    }
    store_pack(param + i, p);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s)
      if (t.state[s]) store_pack(static_cast<S*>(t.state[s]) + i, states[s]);
  }
}

template <class S, class Rule, int kItems>
__global__ void __launch_bounds__(kThreads)
    optim_kernel(const __grid_constant__ ItemList<kItems> list, const __grid_constant__ OptimParams o) {
  int low = 0, high = list.count - 1;  // the item whose blocks include this one
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (list.first_block[mid] <= int(blockIdx.x)) low = mid;
    else high = mid - 1;
  }
  const Item& t = list.items[low];
  const int64_t from = (int64_t(blockIdx.x) - list.first_block[low]) * kPiece;
  const int64_t to = from + kPiece < t.size ? from + kPiece : t.size;
  constexpr int N = sizeof(S) == 2 ? 4 : kPack<S>;  // 16 bytes of 16-bit elements spill registers
  if (!t.packed) return step_piece<S, Rule, 1>(o, t, from, to);
  const int64_t whole = from + (to - from) / N * N;
  step_piece<S, Rule, N>(o, t, from, whole);
  step_piece<S, Rule, 1>(o, t, whole, to);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

template <class S, class Rule, int kItems>
Status launch_items(const OptimParams& p, const OptimTensor* const* tensors, int count, CUstream_st* stream) {
  ItemList<kItems> list{};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const OptimTensor& t = *tensors[i];
    const bool packed = aligned16(t.param, t.grad, t.state[0], t.state[1], t.state[2]);
    list.items[i] = {t.param, t.grad, {t.state[0], t.state[1], t.state[2]}, t.size, t.step_size, t.denom_scale, packed};
    list.first_block[i] = int(blocks);
    blocks += ceil_div(t.size, kPiece);
  }
  list.first_block[count] = int(blocks);
  list.count = count;
  if (blocks > 0x7fffffff) return Status::invalid_argument;
  return launch(optim_kernel<S, Rule, kItems>, grid_of(blocks), dim3(kThreads), 0, stream, list, p);
}

template <class S, class Rule>
Status step_all(const OptimParams& p, DType dtype, CUstream_st* stream) {
  const OptimTensor* tensors[kManyItems];
  int count = 0;
  const int most = p.serial ? 1 : kManyItems;  // tensors that share memory: one launch each, in order
  for (int64_t i = 0; i <= p.count; ++i) {
    if (count == most || (i == p.count && count > 0)) {
      const Status status = count <= kFewItems ? launch_items<S, Rule, kFewItems>(p, tensors, count, stream)
                                               : launch_items<S, Rule, kManyItems>(p, tensors, count, stream);
      if (status != Status::ok) return status;
      count = 0;
    }
    if (i < p.count && p.tensors[i].dtype == dtype && p.tensors[i].size > 0) tensors[count++] = &p.tensors[i];
  }
  return Status::ok;
}

}  // namespace

Status optim_step(const OptimParams& p, CUstream_st* stream) {
  bool present[4] = {};
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.tensors[i].dtype > DType::f16) return Status::unsupported_dtype;
    present[int(p.tensors[i].dtype)] = true;
  }
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    if (!present[int(dtype)]) continue;
    const Status status = dispatch_dtype(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      switch (p.rule) {
        case OptimRule::adam: return step_all<S, Adam>(p, dtype, stream);
        case OptimRule::sgd: return step_all<S, Sgd>(p, dtype, stream);
        default: return Status::invalid_argument;
      }
    });
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace fastnn::cuda
