// fastnn::adam_step_ and its siblings: one step of an optimizer over lists of tensors, in place.
#include <cmath>

#include "optim.h"

namespace fastnn::ops {
namespace {

// Advances every counter and gives every tensor what depends on it: set(tensor, step), called with the same tensor
// values for equal counters, so that powers are computed once per age and not once per parameter.
template <class F>
void advance(StepTensors& tensors, const F& set) {
  double last = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const double step = tensors.next_step(i);
    if (i > 0 && step == last) {
      tensors[i].step_size = tensors[i - 1].step_size;
      tensors[i].denom_scale = tensors[i - 1].denom_scale;
    } else {
      set(tensors[i], step);
    }
    last = step;
  }
}

OptimParams common(OptimRule rule, double eps, double weight_decay, bool maximize) {
  OptimParams p{};
  p.rule = rule;
  p.eps = eps;
  p.weight_decay = weight_decay;
  p.param_scale = 1;
  p.maximize = maximize;
  return p;
}

// The lists that an op cannot do without.
void require(const char* op, TensorList params, std::initializer_list<TensorList> lists) {
  for (const TensorList& list : lists)
    TORCH_CHECK(list.size() == params.size(), "fastnn::", op,
                ": cannot step these tensors (lists of different lengths)");
}

// ---- Adam, AdamW, Yogi ---------------------------------------------------------------------------------------------

void adam_like(StepTensors& tensors, OptimParams p, double lr, double beta1, double beta2) {
  p.beta1 = beta1;
  p.beta2 = beta2;
  advance(tensors, [&](OptimTensor& t, double step) {
    t.step_size = lr / (1 - std::pow(beta1, step));
    t.denom_scale = 1 / std::sqrt(1 - std::pow(beta2, step));
  });
  tensors.run(p);
}

void adam_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList max_exp_avg_sqs, TensorList steps, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled_weight_decay, bool maximize) {
  require("adam_step_", params, {exp_avgs, exp_avg_sqs, steps});
  StepTensors tensors("adam_step_", params, grads, {exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, steps);
  OptimParams p = common(OptimRule::adam, eps, decoupled_weight_decay ? 0 : weight_decay, maximize);
  if (decoupled_weight_decay) p.param_scale = 1 - lr * weight_decay;
  adam_like(tensors, p, lr, beta1, beta2);
}

void yogi_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  require("yogi_step_", params, {exp_avgs, exp_avg_sqs, steps});
  StepTensors tensors("yogi_step_", params, grads, {exp_avgs, exp_avg_sqs}, steps);
  adam_like(tensors, common(OptimRule::yogi, eps, weight_decay, maximize), lr, beta1, beta2);
}

// ---- SGD, Adagrad, RMSprop, Adadelta -------------------------------------------------------------------------------

void sgd_step_(TensorList params, TensorList grads, TensorList momentum_buffers, double lr, double momentum,
               double dampening, double weight_decay, bool nesterov, bool maximize, bool first) {
  StepTensors tensors("sgd_step_", params, grads, {momentum_buffers}, {});
  OptimParams p = common(OptimRule::sgd, 0, weight_decay, maximize);
  p.beta1 = momentum;
  p.beta2 = 1 - dampening;
  p.nesterov = nesterov;
  p.first = first;
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].step_size = lr;
  tensors.run(p);
}

void adagrad_step_(TensorList params, TensorList grads, TensorList sums, TensorList steps, double lr, double lr_decay,
                   double eps, double weight_decay, bool maximize) {
  require("adagrad_step_", params, {sums, steps});
  StepTensors tensors("adagrad_step_", params, grads, {sums}, steps);
  advance(tensors, [&](OptimTensor& t, double step) { t.step_size = lr / (1 + (step - 1) * lr_decay); });
  tensors.run(common(OptimRule::adagrad, eps, weight_decay, maximize));
}

void rmsprop_step_(TensorList params, TensorList grads, TensorList square_avgs, TensorList momentum_buffers,
                   TensorList grad_avgs, TensorList steps, double lr, double alpha, double eps, double weight_decay,
                   double momentum, bool maximize) {
  require("rmsprop_step_", params, {square_avgs, steps});
  StepTensors tensors("rmsprop_step_", params, grads, {square_avgs, momentum_buffers, grad_avgs}, steps);
  OptimParams p = common(OptimRule::rmsprop, eps, weight_decay, maximize);
  p.beta1 = momentum;
  p.beta2 = alpha;
  advance(tensors, [&](OptimTensor& t, double) { t.step_size = lr; });
  tensors.run(p);
}

void adadelta_step_(TensorList params, TensorList grads, TensorList square_avgs, TensorList acc_deltas,
                    TensorList steps, double lr, double rho, double eps, double weight_decay, bool maximize) {
  require("adadelta_step_", params, {square_avgs, acc_deltas, steps});
  StepTensors tensors("adadelta_step_", params, grads, {square_avgs, acc_deltas}, steps);
  OptimParams p = common(OptimRule::adadelta, eps, weight_decay, maximize);
  p.beta2 = rho;
  advance(tensors, [&](OptimTensor& t, double) { t.step_size = lr; });
  tensors.run(p);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled_weight_decay, bool maximize) -> ()");
  m.def(
      "yogi_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> ()");
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()");
  m.def(
      "adagrad_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] sums, Tensor(c!)[] steps, float lr, "
      "float lr_decay, float eps, float weight_decay, bool maximize) -> ()");
  m.def(
      "rmsprop_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] momentum_buffers, "
      "Tensor(d!)[] grad_avgs, Tensor(e!)[] steps, float lr, float alpha, float eps, float weight_decay, "
      "float momentum, bool maximize) -> ()");
  m.def(
      "adadelta_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] acc_deltas, "
      "Tensor(d!)[] steps, float lr, float rho, float eps, float weight_decay, bool maximize) -> ()");
}

void register_kernels(torch::Library& m) {
  m.impl("adam_step_", adam_step_);
  m.impl("yogi_step_", yogi_step_);
  m.impl("sgd_step_", sgd_step_);
  m.impl("adagrad_step_", adagrad_step_);
  m.impl("rmsprop_step_", rmsprop_step_);
  m.impl("adadelta_step_", adadelta_step_);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("adam_step_", AdamStep::autograd);
  m.impl("yogi_step_", YogiStep::autograd);
  m.impl("sgd_step_", SgdStep::autograd);
  m.impl("adagrad_step_", AdagradStep::autograd);
  m.impl("rmsprop_step_", RmspropStep::autograd);
  m.impl("adadelta_step_", AdadeltaStep::autograd);
}
TORCH_LIBRARY_IMPL(fastnn, ADInplaceOrView, m) {
  m.impl("adam_step_", AdamStep::inplace);
  m.impl("yogi_step_", YogiStep::inplace);
  m.impl("sgd_step_", SgdStep::inplace);
  m.impl("adagrad_step_", AdagradStep::inplace);
  m.impl("rmsprop_step_", RmspropStep::inplace);
  m.impl("adadelta_step_", AdadeltaStep::inplace);
}

}  // namespace
}  // namespace fastnn::ops
