// A graph's end at an input that a gradient is a function of by name alone.
#include "grad_node.h"

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/ops/zeros_like.h>

namespace fastnn::ops {
namespace {

// Its own gradient goes on, the input's is zero.
struct NoDerivative final : torch::autograd::Node {
  std::string name() const override { return "no_derivative"; }
  variable_list apply(variable_list&& grads) override {
    const Tensor& v = grads[0];
    return {v, v.defined() ? at::zeros_like(v) : v};
  }
};

}  // namespace

void depend_on(const Tensor& gradient, const torch::autograd::Edge& input) {
  Tensor value = gradient;  // under is_grads_batched the one inside, which is what leaves
  while (const auto* batched = at::maybeGetBatchedImpl(value)) value = batched->value();
  const auto node = make_node<NoDerivative>();
  node->set_next_edges({torch::autograd::impl::gradient_edge(value), input});
  torch::autograd::set_history(value, node);
}

}  // namespace fastnn::ops
