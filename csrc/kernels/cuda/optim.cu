// Optimizer steps and the norm of all gradients, over a list of tensors: the list travels in the kernel's
// parameters, so a model of a few hundred tensors is one launch. A block takes a fixed piece of one tensor.
#include "../optim.h"

#include "device/reduce.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;     // at least two blocks: the bound under which no call of a division spills registers
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
static_assert(sizeof(ItemList<kManyItems>) + sizeof(OptimParams) < 32000,
              "a kernel's parameters are at most 32764 bytes");

// ---- rules: one element --------------------------------------------------------------------------------------------

// The gradient a rule works on: its sign, and the L2 penalty.
template <class A>
__device__ __forceinline__ A gradient_of(const OptimParams& o, A g, A param) {
  if (o.maximize) g = -g;
  return o.weight_decay != 0 ? A(o.weight_decay) * param + g : g;
}

// Every rule: param and state[] in place, `step` being the tensor's step size.
template <bool kYogi>
struct AdamRule {
  static constexpr int kStates = kYogi ? 2 : 3;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item& t, A step, A& param, A g,
                                              A (&state)[3]) {
    if (o.param_scale != 1) param *= A(o.param_scale);
    g = gradient_of(o, g, param);
    A &m = state[0], &v = state[1];
    m = A(1 - o.beta1) * (g - m) + m;
    if constexpr (kYogi) {  // v moves by a fixed share of g^2 towards it, whatever the distance
      const A square = g * g, distance = v - square;
      v -= A(1 - o.beta2) * (distance > A(0) ? square : distance < A(0) ? -square : distance);
    } else {
      v = A(1 - o.beta2) * g * g + A(o.beta2) * v;
    }
    A largest = v;
    if (!kYogi && t.state[2]) {
      largest = !(state[2] >= v) && state[2] == state[2] ? v : state[2];  // NaN in either gives NaN
      state[2] = largest;
    }
    param -= step * (m / (sqrt_of(largest) * A(t.denom_scale) + A(o.eps)));
  }
};
using Adam = AdamRule<false>;
using Yogi = AdamRule<true>;

struct Sgd {
  static constexpr int kStates = 1;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item& t, A step, A& param, A g,
                                              A (&state)[3]) {
    g = gradient_of(o, g, param);
    if (t.state[0]) {
      const A buffer = o.first ? g : A(o.beta2) * g + A(o.beta1) * state[0];
      state[0] = buffer;
      g = o.nesterov ? A(o.beta1) * buffer + g : buffer;
    }
    param -= step * g;
  }
};

struct Adagrad {
  static constexpr int kStates = 1;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item&, A step, A& param, A g, A (&state)[3]) {
    g = gradient_of(o, g, param);
    state[0] += g * g;
    param -= step * g / (sqrt_of(state[0]) + A(o.eps));
  }
};

struct Rmsprop {
  static constexpr int kStates = 3;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item& t, A step, A& param, A g,
                                              A (&state)[3]) {
    g = gradient_of(o, g, param);
    const A rest = A(1 - o.beta2);
    state[0] = rest * g * g + A(o.beta2) * state[0];
    A v = state[0];
    if (t.state[2]) {
      state[2] = rest * (g - state[2]) + state[2];
      v -= state[2] * state[2];
    }
    A update = g / (sqrt_of(v) + A(o.eps));
    if (t.state[1]) {
      update += A(o.beta1) * state[1];
      state[1] = update;
    }
    param -= step * update;
  }
};

struct Adadelta {
  static constexpr int kStates = 2;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams& o, const Item&, A step, A& param, A g, A (&state)[3]) {
    g = gradient_of(o, g, param);
    const A rest = A(1 - o.beta2), rho = A(o.beta2), eps = A(o.eps);
    state[0] = rest * g * g + rho * state[0];
    const A delta = sqrt_of(state[1] + eps) / sqrt_of(state[0] + eps) * g;
    state[1] = rest * delta * delta + rho * state[1];
    param -= step * delta;
  }
};

struct Scale {
  static constexpr int kStates = 1;
  template <class A>
  static __device__ __forceinline__ void step(const OptimParams&, const Item&, A step, A& param, A, A (&)[3]) {
    param *= step;
  }
};

// The step size of a tensor; for Scale beside a norm on the device, the factor that brings the norm down to it.
template <class S, class Rule>
__device__ __forceinline__ acc_t<S> step_size_of(const OptimParams& o, const Item& t) {
  if constexpr (__is_same(Rule, Scale)) {
    if (o.norm) {
      const double factor = t.step_size / (double(to_acc(*static_cast<const S*>(o.norm))) + 1e-6);
      return acc_t<S>(factor > 1 ? 1 : factor);  // NaN stays
    }
  }
  return acc_t<S>(t.step_size);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// The item whose blocks include this one.
__device__ __forceinline__ int item_of_block(const int* first_block, int count) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (first_block[mid] <= int(blockIdx.x)) low = mid;
    else high = mid - 1;
  }
  return low;
}

// Elements [from, to) of one tensor, N at a time; to - from is a multiple of N but for a tensor's tail when N is 1.
template <class S, class Rule, int N>
__device__ __forceinline__ void step_piece(const OptimParams& o, const Item& t, acc_t<S> step, int64_t from,
                                           int64_t to) {
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
      Rule::step(o, t, step, value, to_acc(g.at[n]), state);
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
__global__ void __launch_bounds__(kThreads, 2)
    optim_kernel(const __grid_constant__ ItemList<kItems> list, const __grid_constant__ OptimParams o) {
  const int at = item_of_block(list.first_block, list.count);
  const Item& t = list.items[at];
  const int64_t from = (int64_t(blockIdx.x) - list.first_block[at]) * kPiece;
  const int64_t to = from + kPiece < t.size ? from + kPiece : t.size;
  constexpr int N = sizeof(S) == 2 ? 4 : kPack<S>;  // 16 bytes of 16-bit elements spill registers
  const acc_t<S> step = step_size_of<S, Rule>(o, t);
  if (!t.packed) return step_piece<S, Rule, 1>(o, t, step, from, to);
  const int64_t whole = from + (to - from) / N * N;
  step_piece<S, Rule, N>(o, t, step, from, whole);
  step_piece<S, Rule, 1>(o, t, step, whole, to);
}

struct NormItem {
  const void* data;
  int64_t size;
  bool packed;
};
struct NormList {
  NormItem items[kManyItems];
  int first_block[kManyItems + 1];
  int64_t first_chunk[kManyItems];
  int count;
};

struct MaxOrNan {
  __device__ __forceinline__ double operator()(double a, double b) const { return a != a || a > b ? a : b; }
};
template <class A>
__device__ __forceinline__ A add_to_norm(A sum, A x, NormKind kind) {
  const A magnitude = x < A(0) ? -x : x;
  if (kind == NormKind::two) return x * x + sum;
  if (kind == NormKind::one) return sum + magnitude;
  return sum != sum || sum > magnitude ? sum : magnitude;
}
__device__ __forceinline__ double join_norms(double sum, NormKind kind) {
  if (kind == NormKind::inf) return block_reduce(sum, 0.0, MaxOrNan{});
  return block_reduce(sum, 0.0, Add{});
}

// A block per chunk of one tensor.
template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    partial_norm_kernel(const __grid_constant__ NormList list, double* partial, NormKind kind) {
  using A = acc_t<S>;
  constexpr int N = kPack<S>;
  const int at = item_of_block(list.first_block, list.count);
  const NormItem& t = list.items[at];
  const int64_t chunk = int64_t(blockIdx.x) - list.first_block[at];
  const S* const x = static_cast<const S*>(t.data) + chunk * kNormChunk;
  const int64_t rest = t.size - chunk * kNormChunk;
  const int count = int(rest < kNormChunk ? rest : kNormChunk), packed = t.packed ? count / N * N : 0;
  A sum = 0;
  for (int i = int(threadIdx.x) * N; i < packed; i += kThreads * N) {
    const Pack<S, N> pack = load_pack<N>(x + i);
#pragma unroll
    for (int n = 0; n < N; ++n) sum = add_to_norm(sum, to_acc(pack.at[n]), kind);
  }
  for (int i = packed + int(threadIdx.x); i < count; i += kThreads) sum = add_to_norm(sum, to_acc(x[i]), kind);
  const double total = join_norms(double(sum), kind);
  if (threadIdx.x == 0) partial[list.first_chunk[at] + chunk] = total;
}

// One block joins the chunks.
template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    total_norm_kernel(const double* partial, int64_t chunks, NormKind kind, S* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads)
    sum = kind == NormKind::inf ? MaxOrNan{}(sum, partial[i]) : sum + partial[i];
  sum = join_norms(sum, kind);
  if (kind == NormKind::two) sum = sqrt(sum);
  if (threadIdx.x == 0) *total = from_acc<S>(acc_t<S>(sum));
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
        case OptimRule::yogi: return step_all<S, Yogi>(p, dtype, stream);
        case OptimRule::sgd: return step_all<S, Sgd>(p, dtype, stream);
        case OptimRule::adagrad: return step_all<S, Adagrad>(p, dtype, stream);
        case OptimRule::rmsprop: return step_all<S, Rmsprop>(p, dtype, stream);
        case OptimRule::adadelta: return step_all<S, Adadelta>(p, dtype, stream);
        case OptimRule::scale: return step_all<S, Scale>(p, dtype, stream);
      }
      return Status::invalid_argument;
    });
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

Status total_norm(const NormParams& p, CUstream_st* stream) {
  if (p.kind > NormKind::inf) return Status::invalid_argument;
  NormList list;
  for (int64_t begin = 0; begin < p.count;) {  // one launch for each run of tensors of one dtype
    const DType dtype = p.tensors[begin].dtype;
    list.count = 0;
    int64_t blocks = 0, i = begin;
    for (; i < p.count && p.tensors[i].dtype == dtype && list.count < kManyItems; ++i) {
      const NormTensor& t = p.tensors[i];
      if (t.size == 0) continue;
      if (blocks + ceil_div(t.size, kNormChunk) > 0x7fffffff) break;
      list.items[list.count] = {t.data, t.size, aligned16(t.data)};
      list.first_chunk[list.count] = t.first_chunk;
      list.first_block[list.count++] = int(blocks);
      blocks += ceil_div(t.size, kNormChunk);
    }
    if (i == begin) return Status::invalid_argument;
    begin = i;
    if (blocks == 0) continue;
    const Status status = dispatch_dtype(dtype, [&](auto tag) {
      return launch(partial_norm_kernel<typename decltype(tag)::type>, grid_of(blocks), dim3(kThreads), 0, stream, list,
                    p.partial, p.kind);
    });
    if (status != Status::ok) return status;
  }
  return dispatch_dtype(p.total_dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return launch(total_norm_kernel<S>, dim3(1), dim3(kThreads), 0, stream, p.partial, p.chunks, p.kind,
                  static_cast<S*>(p.total));
  });
}

}  // namespace fastnn::cuda
