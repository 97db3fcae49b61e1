// What the optimizer ops share: the check of a step's tensors, the layout they are walked in, and in-place op handles.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>

#include "common.h"
#include "kernels/optim.h"

namespace fastnn::ops {

using at::TensorList;
using StateLists = std::initializer_list<TensorList>;

// Why the kernels cannot step these parameters, or null when they can: dense tensors of one native dtype and shape per
// parameter, all on one device (a CUDA device in a build with CUDA kernels), states of `states` empty or as long as
// `params`, counters of one float element on the CPU. Sparse gradients and overlapping memory are reasons.
const char* why_not_steppable(TensorList params, TensorList grads, StateLists states, TensorList steps);

// Fills the kernel's list: pointers into the tensors, or into copies where a gradient or state does not lie in memory
// as its parameter does; finish() copies what the kernel wrote back.
class StepTensors {
 public:
  StepTensors(const char* op, TensorList params, TensorList grads, StateLists states, TensorList steps);

  // Adds 1 to the i-th counter, in its dtype, and returns it.
  double next_step(size_t i) const;
  size_t size() const { return tensors_.size(); }
  OptimTensor& operator[](size_t i) { return tensors_[i]; }
  void run(OptimParams params);

 private:
  void* written(const Tensor& t, const Tensor& param);
  const void* read(const Tensor& t, const Tensor& param);
  bool share_memory() const;

  const char* op_;
  TensorList params_, steps_;
  std::vector<OptimTensor> tensors_;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> write_back_;
};

// ---- in-place ops over lists of tensors ----------------------------------------------------------------------------

template <size_t N>
struct OpName {
  char text[N];
  constexpr OpName(const char (&s)[N]) { std::copy_n(s, N, text); }
};

void check_not_leaves(TensorList written);
void bump_versions(TensorList written);

// "fastnn::<Name>", which writes to every list of tensors it takes but the second one (the gradients) and returns
// nothing: its Autograd kernel refuses leaves that want a gradient, as torch's in-place ops do; its ADInplaceOrView
// kernel bumps the version counters.
template <OpName Name, class... Args>
struct StepOp {
  static const auto& handle() {
    static const auto op = ops::handle<void(Args...)>(Name.text);
    return op;
  }
  static void autograd(Args... args) {
    each_written([](TensorList list) { check_not_leaves(list); }, args...);
    at::AutoDispatchBelowAutograd guard;
    handle().call(args...);
  }
  static void inplace(Args... args) {
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      handle().call(args...);
    }
    each_written([](TensorList list) { bump_versions(list); }, args...);
  }

 private:
  template <class F>
  static void each_written(const F& f, const Args&... args) {
    int position = 0;
    const auto visit = [&](const auto& arg) {
      if constexpr (std::is_same_v<std::decay_t<decltype(arg)>, TensorList>)
        if (position != 1) f(arg);
      ++position;
    };
    (visit(args), ...);
  }
};

// Lists and numbers in the order of the schemas in optim_steps.cpp; a list whose option is off is empty.
using AdamStep = StepOp<"adam_step_", TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, double,
                        double, double, double, double, bool, bool>;
using YogiStep = StepOp<"yogi_step_", TensorList, TensorList, TensorList, TensorList, TensorList, double, double,
                        double, double, double, bool>;
using SgdStep =
    StepOp<"sgd_step_", TensorList, TensorList, TensorList, double, double, double, double, bool, bool, bool>;
using AdagradStep =
    StepOp<"adagrad_step_", TensorList, TensorList, TensorList, TensorList, double, double, double, double, bool>;
using RmspropStep = StepOp<"rmsprop_step_", TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
                           double, double, double, double, double, bool>;
using AdadeltaStep = StepOp<"adadelta_step_", TensorList, TensorList, TensorList, TensorList, TensorList, double,
                            double, double, double, bool>;

}  // namespace fastnn::ops
