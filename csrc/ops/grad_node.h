// An autograd node at the price of torch's own: tensors and numbers saved in place. torch::autograd::Function
// costs about 0.5 us more for a forward and as much for a backward, most of a tiny layer.
#pragma once
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "common.h"

namespace fastnn::ops {

using torch::autograd::variable_list;

// Calls an op's kernel, below autograd and what tracks views.
template <class Return, class... Args>
Return below_autograd(const c10::TypedOperatorHandle<Return(Args...)>& op, std::type_identity_t<Args>... args) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Args>(args)...);
}

// What a node's backward reads: the saved tensors and numbers, and which inputs' gradients are wanted.
struct Saved {
  const Tensor* tensors;
  c10::ArrayRef<c10::IValue> data;
  uint64_t wanted;
  bool again = false;  // another call reads the same tensors

  bool wants(size_t input) const { return wanted >> input & 1; }
  OptTensor optional(size_t i) const { return tensors[i].defined() ? OptTensor(tensors[i]) : std::nullopt; }
};

// The gradient of `input`, fresh from a backward op, made a function of it as torch's are also where it is none:
// a second derivative then is zero, not an error. Nothing of the input is kept for it.
void depend_on(const Tensor& gradient, const torch::autograd::Edge& input);

// F: kName; kTensors, how many are saved; backward(Saved, gradient of the one differentiable output), a gradient for
// every recorded input; names_input(that gradient), where it is there: whether torch's first gradient is a function of
// the first input although no value of it enters; kLinear, where the gradients read no value that is differentiated;
// kAhead and ahead(what is saved there, that gradient): whether backward does not read the first tensor, the input,
// which may have changed since.
template <class F>
struct GradNode final : torch::autograd::Node {
  std::array<torch::autograd::SavedVariable, F::kTensors> saved;
  c10::SmallVector<c10::IValue, 8> data;

  void keep(size_t i, const Tensor& t, bool is_output = false) {
    if (t.defined()) saved[i] = torch::autograd::SavedVariable(t, is_output, is_output && t.is_view());
  }

  std::string name() const override { return F::kName; }
  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (auto& t : saved) t.reset_data();
    released = true;
  }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(num_outputs());
    std::array<Tensor, F::kTensors> tensors;
    {
      const std::lock_guard lock(mutex_);
      TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
      size_t i = 0;
      if constexpr (requires { F::kAhead; }) {
        tensors[F::kAhead] = saved[F::kAhead].unpack(getptr());
        i = F::ahead(tensors[F::kAhead], grads[0]);
      }
      for (; i < F::kTensors; ++i)
        if (!tensors[i].defined()) tensors[i] = saved[i].unpack(getptr());
    }
    const Saved all{tensors.data(), data, wanted()};
    variable_list results = splits(grads[0]) ? with_tangents(all, grads[0]) : F::backward(all, grads[0]);
    if constexpr (requires { F::names_input(grads[0]); }) {
      if (at::GradMode::is_enabled() && F::names_input(grads[0])) depend_on(results[0], next_edge(0));
    }
    return results;
  }

  // Compiled autograd takes the node's state apart and calls `functional` while its graph runs.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (const auto& t : saved) args.collect(t, true);  // as apply() unpacks them
    for (const auto& v : data) args.collect(v);
    args.collect(wanted());
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& t : saved) swap.before(t);
    for (auto& v : data) swap.before(v);
    torch::dynamo::autograd::PackedArgs packed;
    variable_list tensors;
    for (auto& t : saved) tensors.push_back(t.unpack(getptr()));
    packed.pack(tensors);
    packed.pack(wanted());
    packed.pack(static_cast<uint64_t>(num_outputs()));
    std::vector<c10::IValue> args = std::move(packed).vec();
    args.insert(args.end(), data.begin(), data.end());
    std::vector<at::TypePtr> schema;
    for (const auto& v : args) schema.emplace_back(v.isTensor() ? at::TypePtr(at::TensorType::get()) : v.type());
    const auto& interface = torch::dynamo::autograd::getPyCompilerInterface();
    const auto function = interface->bind_function(swap.get_py_compiler(), name(), functional, schema, true, false);
    const auto metadata =
        torch::dynamo::autograd::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges()));
    auto results =
        interface->call_function(swap.get_py_compiler(), "apply_functional", function, grads, args, metadata);
    for (auto& t : saved) swap.after(t);
    for (auto& v : data) swap.after(v);
    return results;
  }

 private:
  bool released = false;

  // Whether a dual number's two parts go through the kernels one after the other. Not where a second derivative may
  // read the gradient of the output again, and with it its tangent: F::backward then is torch's.
  static bool splits(const Tensor& grad) {
    return has_tangent(grad) && (!at::GradMode::is_enabled() || requires { F::kLinear; });
  }
  // Every gradient is linear in that of the output, and what is saved has no tangents: such a call was torch's.
  static variable_list with_tangents(Saved all, const Tensor& grad) {
    all.again = true;
    variable_list results = F::backward(all, grad._fw_primal(0));
    const variable_list tangents = F::backward(all, grad._fw_grad(0));
    for (size_t i = 0; i < results.size(); ++i)
      if (results[i].defined()) results[i]._set_fw_grad(tangents[i], 0, false);
    return results;
  }

  uint64_t wanted() const {
    uint64_t bits = 0;
    for (size_t i = 0; i < num_outputs(); ++i) bits |= uint64_t(task_should_compute_output(i)) << i;
    return bits;
  }
  static variable_list functional(const variable_list& grads, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const auto tensors = packed.unpack<variable_list>();
    const auto wanted = packed.unpack<uint64_t>(), outputs = packed.unpack<uint64_t>();
    if (!grads[0].defined()) return variable_list(outputs);
    return F::backward(Saved{tensors.data(), c10::ArrayRef<c10::IValue>(args).slice(3), wanted}, grads[0]);
  }
};

// torch holds nodes by shared_ptr up to some release and by intrusive_ptr from then on.
template <class N, class Held = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<N>(new N, [](auto* node) { deleteNode(node); });
  else return c10::make_intrusive<N>();
}

// A node F with the numbers `data`, between `inputs` (undefined ones count too) and what attach() names.
template <class F, class... Inputs>
auto record(std::initializer_list<c10::IValue> data, const Inputs&... inputs) {
  auto node = make_node<GradNode<F>>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  node->data.append(data.begin(), data.end());
  return node;
}
template <class NodePtr>
void attach(const Tensor& output, const NodePtr& node) {
  torch::autograd::set_history(output, node);
}

}  // namespace fastnn::ops
