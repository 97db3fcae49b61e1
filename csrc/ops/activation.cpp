// fastnn::relu, relu6, leaky_relu, sigmoid, tanh, gelu and silu on the kernels of kernels/activation.h.
#include "kernels/activation.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "common.h"
#include "grad_node.h"
#include "memory.h"
#include "python_entry.h"
#include "strided_lines.h"

namespace fastnn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using Act = Activation;

// ---- what differs between the kinds --------------------------------------------------------------------------------

// kSavesOutput: backward needs the output (so that the input may be overwritten), not the input.
// kInplace: what backward of the in-place form reads. aten, aten_inplace, aten_backward: torch's own.
// second(v, g, s): v times d(grad_input)/d(saved).
enum class InplaceSaves {
  output,
  copy,    // of the output: where torch keeps the input, the result may be changed afterwards
  nothing  // the input is needed, and a copy of it would cost what in place saves: torch's own, if a gradient is needed
};
template <Act K>
struct Kind;

template <>
struct Kind<Act::relu> {
  static constexpr const char* name = "relu";
  static constexpr bool kSavesOutput = true;
  static constexpr const char* inplace_name = "relu_";
  static constexpr InplaceSaves kInplace = InplaceSaves::output;
  static Tensor aten(const Tensor& x) { return at::relu(x); }
  static Tensor& aten_inplace(Tensor& x) { return at::relu_(x); }
  static Tensor aten_backward(const Tensor& g, const Tensor& y) { return at::threshold_backward(g, y, 0); }
  static Tensor second(const Tensor& v, const Tensor&, const Tensor&) { return at::zeros_like(v); }
};
template <>
struct Kind<Act::relu6> {
  static constexpr const char* name = "relu6";
  static constexpr const char* inplace_name = "relu6_";
  static constexpr InplaceSaves kInplace = InplaceSaves::copy;
  static constexpr bool kSavesOutput = false;
  static Tensor aten(const Tensor& x) { return at::relu6(x); }
  static Tensor& aten_inplace(Tensor& x) { return at::relu6_(x); }
  static Tensor aten_backward(const Tensor& g, const Tensor& y) { return at::hardtanh_backward(g, y, 0, 6); }
  static Tensor second(const Tensor& v, const Tensor&, const Tensor&) { return at::zeros_like(v); }
};
template <>
struct Kind<Act::leaky_relu> {
  static constexpr const char* name = "leaky_relu";
  static constexpr bool kSavesOutput = false;
  static constexpr const char* inplace_name = "leaky_relu_";
  static constexpr InplaceSaves kInplace = InplaceSaves::output;  // of a slope >= 0
  static Tensor aten(const Tensor& x, double slope) { return at::leaky_relu(x, slope); }
  static Tensor& aten_inplace(Tensor& x, double slope) { return at::leaky_relu_(x, slope); }
  static Tensor aten_backward(const Tensor& g, const Tensor& x, double slope) {
    return at::leaky_relu_backward(g, x, slope, false);
  }
  static Tensor second(const Tensor& v, const Tensor&, const Tensor&) { return at::zeros_like(v); }
};
template <>
struct Kind<Act::sigmoid> {
  static constexpr const char* name = "sigmoid";
  static constexpr bool kSavesOutput = true;
  static Tensor aten(const Tensor& x) { return at::sigmoid(x); }
  static Tensor aten_backward(const Tensor& g, const Tensor& y) { return at::sigmoid_backward(g, y); }
  static Tensor second(const Tensor& v, const Tensor& g, const Tensor& y) { return v * g * (1 - 2 * y); }
};
template <>
struct Kind<Act::tanh> {
  static constexpr const char* name = "tanh";
  static constexpr bool kSavesOutput = true;
  static Tensor aten(const Tensor& x) { return at::tanh(x); }
  static Tensor aten_backward(const Tensor& g, const Tensor& y) { return at::tanh_backward(g, y); }
  static Tensor second(const Tensor& v, const Tensor& g, const Tensor& y) { return -2 * v * g * y; }
};
template <>
struct Kind<Act::gelu> {
  static constexpr const char* name = "gelu";
  static constexpr bool kSavesOutput = false;
  static Tensor aten(const Tensor& x) { return at::gelu(x); }
  static Tensor aten_backward(const Tensor& g, const Tensor& x) { return at::gelu_backward(g, x); }
  static Tensor second(const Tensor& v, const Tensor& g, const Tensor& x) {
    const Tensor square = x * x;
    return v * g * (2 - square) * (square * -0.5).exp() / std::sqrt(2 * M_PI);
  }
};
template <>
struct Kind<Act::gelu_tanh> {
  static constexpr const char* name = "gelu_tanh";
  static constexpr bool kSavesOutput = false;
  static Tensor aten(const Tensor& x) { return at::gelu(x, "tanh"); }
  static Tensor aten_backward(const Tensor& g, const Tensor& x) { return at::gelu_backward(g, x, "tanh"); }
  // With u = k (x + c x^3): gelu = x (1 + tanh u) / 2, gelu'' = (1 - t^2) (u' + x u'' / 2 - x t u'^2).
  static Tensor second(const Tensor& v, const Tensor& g, const Tensor& x) {
    const double k = kSqrt2OverPi, c = kGeluCubic;
    const Tensor square = x * x;
    const Tensor t = at::tanh(k * (x + c * square * x));
    const Tensor u1 = k * (1 + 3 * c * square), u2 = 6 * k * c * x;
    return v * g * (1 - t * t) * (u1 + 0.5 * x * u2 - x * t * u1 * u1);
  }
};
template <>
struct Kind<Act::silu> {
  static constexpr const char* name = "silu";
  static constexpr bool kSavesOutput = false;
  static constexpr const char* inplace_name = "silu_";
  static constexpr InplaceSaves kInplace = InplaceSaves::nothing;
  static Tensor aten(const Tensor& x) { return at::silu(x); }
  static Tensor& aten_inplace(Tensor& x) { return at::silu_(x); }
  static Tensor aten_backward(const Tensor& g, const Tensor& x) {
    if (!has_tangent(g) && !has_tangent(x)) return at::silu_backward(g, x);
    const Tensor s = at::sigmoid(x);  // as torch's second derivatives: its operator takes no dual numbers
    return g * (s * (1 + x * (1 - s)));
  }
  static Tensor second(const Tensor& v, const Tensor& g, const Tensor& x) {
    const Tensor s = at::sigmoid(x);
    return v * g * s * (1 - s) * (2 + x * (1 - 2 * s));
  }
};

template <Act K>
std::string backward_name() {
  return std::string(Kind<K>::name) + "_backward";
}

// A... is what follows the tensors in the op's schema: nothing, or leaky_relu's slope.
template <Act K, class... A>
const auto& forward_op() {
  static const auto op = handle<Tensor(const Tensor&, A...)>(Kind<K>::name);
  return op;
}
template <Act K, class... A>
const auto& backward_op() {
  static const auto op = handle<Tensor(const Tensor&, const Tensor&, A...)>(backward_name<K>().c_str());
  return op;
}
template <Act K, class... A>
const auto& inplace_op() {
  static const auto op = handle<Tensor&(Tensor&, A...)>(Kind<K>::inplace_name);
  return op;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

double slope_of() { return 0; }
double slope_of(double slope) { return slope; }

// torch's relu6 copies strides of dimensions of size 1 too, which say nothing; the others do not.
std::optional<at::MemoryFormat> strides_of_result(Act kind) {
  return kind == Act::relu6 ? std::optional(at::MemoryFormat::Preserve) : std::nullopt;
}

ActivationParams params(Act kind, const Tensor& t, double slope) {
  ActivationParams p{};
  p.size = t.numel();
  p.slope = slope;
  p.kind = kind;
  p.dtype = dtype_of(t);
  return p;
}

void launch_forward(const char* op, const Tensor& x, const ActivationParams& p) {
  launch(
      op, x, [&] { return cpu::activation_forward(p); },
      [&](auto stream) { return cuda::activation_forward(p, stream); });
}

// The lines of the result and of what it is computed from.
void set_lines(ActivationParams& p, const Lines& lines) {
  p.height = lines.height;
  p.width = lines.width;
  p.of_y = lines.of[0];
  p.of_x = lines.of[1];
  p.of_g = lines.of[2];
}

// A copy that lies as `dense` does.
Tensor copy_like(const Tensor& dense, const Tensor& t) { return fresh_like(dense).copy_(t); }

template <Act K, class... A>
Tensor forward(const Tensor& input, A... args) {
  if (!native(Kind<K>::name, {&input}, true)) return Kind<K>::aten(input, args...);
  ActivationParams p = params(K, input, slope_of(args...));
  Tensor y = fresh_like(input, has_no_gaps(input) ? strides_of_result(K) : std::nullopt);
  const auto lines = lines_of({&y, &input, &input});
  set_lines(p, lines ? *lines : *lines_of({&y, &y, &y}));
  p.output = y.mutable_data_ptr();
  p.input = lines ? input.const_data_ptr() : y.copy_(input).const_data_ptr();
  launch_forward(Kind<K>::name, input, p);
  return y;
}

template <Act K, class... A>
Tensor backward(const Tensor& grad_output, const Tensor& saved, A... args) {
  if (grad_output.sizes() != saved.sizes() || !native(Kind<K>::name, {&grad_output, &saved}, true))
    return Kind<K>::aten_backward(grad_output, saved, args...);
  Tensor dx = fresh_like(saved), s = saved, g = grad_output;
  auto lines = lines_of({&dx, &s, &g});
  if (!lines && !lines_of({&dx, &s})) s = copy_like(dx, s), lines = lines_of({&dx, &s, &g});
  if (!lines) g = copy_like(dx, g), lines = lines_of({&dx, &s, &g});
  ActivationParams p = params(K, saved, slope_of(args...));
  set_lines(p, *lines);
  p.grad_output = g.const_data_ptr();
  p.saved = s.const_data_ptr();
  p.grad_input = dx.mutable_data_ptr();
  launch(
      Kind<K>::name, s, [&] { return cpu::activation_backward(p); },
      [&](auto stream) { return cuda::activation_backward(p, stream); });
  return dx;
}

// False for elements that may share memory: copy_ refuses some of those, as torch does.
bool apart(const Lines& lines) {
  const LineStrides& of = lines.of[0];
  const int64_t line = (lines.width - 1) * of.element + 1, plane = (lines.height - 1) * of.line + line;
  return of.element > 0 && (lines.height == 1 || of.line >= line) && (of.plane == 0 || of.plane >= plane);
}

template <Act K, class... A>
Tensor& inplace(Tensor& self, A... args) {
  if (!native(Kind<K>::inplace_name, {&self}, true)) return Kind<K>::aten_inplace(self, args...);
  const auto lines = lines_of({&self, &self, &self});
  if (!lines || !apart(*lines)) return self.copy_(forward<K, A...>(self, args...));
  ActivationParams p = params(K, self, slope_of(args...));
  set_lines(p, *lines);
  p.input = p.output = self.mutable_data_ptr();
  launch_forward(Kind<K>::inplace_name, self, p);
  return self;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

double saved_slope(const AutogradContext* ctx) {
  const auto it = ctx->saved_data.find("slope");
  return it == ctx->saved_data.end() ? 0 : it->second.toDouble();
}
void save_slope(AutogradContext*) {}
void save_slope(AutogradContext* ctx, double slope) { ctx->saved_data["slope"] = slope; }

template <Act K, class... A>
Tensor call_backward(AutogradContext* ctx, const Tensor& g, const Tensor& s) {
  if constexpr (sizeof...(A) == 0) return backward_op<K>().call(g, s);
  else return backward_op<K, A...>().call(g, s, saved_slope(ctx));
}

template <Act K, class... A>
struct ActivationGrad {
  static constexpr const char* kName = Kind<K>::name;
  static constexpr size_t kTensors = 1;
  static variable_list backward(const Saved& s, const Tensor& g) {
    if constexpr (sizeof...(A) == 0) return {backward_op<K>().call(g, s.tensors[0])};
    else return {backward_op<K, A...>().call(g, s.tensors[0], s.data[0].toDouble())};
  }
};

template <Act K, class... A>
struct ActivationBackwardFunction : Function<ActivationBackwardFunction<K, A...>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& saved, A... args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, saved});
    save_slope(ctx, args...);
    return backward_op<K, A...>().call(grad_output, saved, args...);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto tensors = ctx->get_saved_variables();
    Tensor grad_g, grad_s;
    if (ctx->needs_input_grad(0)) grad_g = call_backward<K, A...>(ctx, grads[0], tensors[1]);
    if (ctx->needs_input_grad(1)) grad_s = Kind<K>::second(grads[0], tensors[0], tensors[1]);
    if constexpr (sizeof...(A) == 0) return {grad_g, grad_s};
    else return {grad_g, grad_s, Tensor()};
  }
};

template <Act K, class... A>
Tensor forward_autograd(const Tensor& input, A... args) {
  if (!native(Kind<K>::name, {&input}, true)) return Kind<K>::aten(input, args...);
  const bool differentiable = needs_grad({&input});
  Tensor output = below_autograd(forward_op<K, A...>(), input, args...);
  if (differentiable) {
    const auto node = record<ActivationGrad<K, A...>>({args...}, input);
    attach(output, node);
    if (Kind<K>::kSavesOutput) node->keep(0, output, true);
    else node->keep(0, input);
  }
  return output;
}

template <Act K, class... A>
Tensor backward_autograd(const Tensor& grad_output, const Tensor& saved, A... args) {
  if (has_tangent(grad_output) || has_tangent(saved)) {
    note_fallback(Kind<K>::name, kForwardMode);
    return Kind<K>::aten_backward(grad_output, saved, args...);
  }
  if (needs_grad({&grad_output, &saved})) {
    return ActivationBackwardFunction<K, A...>::apply(grad_output, saved, args...);
  }
  return below_autograd(backward_op<K, A...>(), grad_output, saved, args...);
}

template <Act K, class... A>
Tensor& inplace_autograd(Tensor& self, A... args) {
  if (!native(Kind<K>::inplace_name, {&self}, true)) return Kind<K>::aten_inplace(self, args...);
  if (needs_grad({&self})) {
    if (Kind<K>::kInplace == InplaceSaves::nothing || !(slope_of(args...) >= 0)) {
      note_fallback(Kind<K>::inplace_name, "in place with a gradient");
      return Kind<K>::aten_inplace(self, args...);
    }
    torch::autograd::check_inplace(self, true);
    const auto node = record<ActivationGrad<K, A...>>({args...}, self);
    {
      const at::AutoDispatchBelowAutograd guard;  // bumps the version
      inplace_op<K, A...>().call(self, args...);
      if (Kind<K>::kInplace == InplaceSaves::copy) node->keep(0, self.clone());
    }
    torch::autograd::rebase_history(self, node);
    if (Kind<K>::kInplace == InplaceSaves::output) node->keep(0, self, true);
    return self;
  }
  at::AutoDispatchBelowAutograd guard;
  return inplace_op<K, A...>().call(self, args...);
}

template <Act K, class... A>
Tensor& inplace_bump(Tensor& self, A... args) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    inplace_op<K, A...>().call(self, args...);
  }
  torch::autograd::increment_version(self);
  return self;
}

// Under functionalization the in-place form is the other one, and a replaced value.
template <Act K, class... A>
Tensor& inplace_functionalize(Tensor& self, A... args) {
  namespace functional = at::functionalization::impl;
  if (!functional::isFunctionalTensor(self)) {
    at::AutoDispatchSkipFunctionalize guard;
    return inplace_op<K, A...>().call(self, args...);
  }
  functional::sync(self);
  const Tensor value = functional::from_functional_tensor(self);
  Tensor result;
  {
    at::AutoDispatchSkipFunctionalize guard;
    result = forward_op<K, A...>().call(value, args...);
  }
  functional::replace_(self, result);
  functional::commit_update(self);
  functional::sync(self);
  return self;
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  for (const char* name : {"relu", "relu6", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu"}) {
    m.def((std::string(name) + "(Tensor input) -> Tensor").c_str());
    m.def((std::string(name) + "_backward(Tensor grad_output, Tensor saved) -> Tensor").c_str());
  }
  for (const char* name : {"relu_", "relu6_", "silu_"})
    m.def((std::string(name) + "(Tensor(a!) self) -> Tensor(a!)").c_str());
  m.def("leaky_relu_(Tensor(a!) self, float negative_slope) -> Tensor(a!)");
  m.def("leaky_relu(Tensor input, float negative_slope) -> Tensor");
  m.def("leaky_relu_backward(Tensor grad_output, Tensor saved, float negative_slope) -> Tensor");
}

// Calls f.operator()<kind, A...>() for every kind.
template <class F>
void for_kinds(const F& f) {
  f.template operator()<Act::relu>();
  f.template operator()<Act::relu6>();
  f.template operator()<Act::leaky_relu, double>();
  f.template operator()<Act::sigmoid>();
  f.template operator()<Act::tanh>();
  f.template operator()<Act::gelu>();
  f.template operator()<Act::gelu_tanh>();
  f.template operator()<Act::silu>();
}
// Those with a form in place.
template <class F>
void for_inplace_kinds(const F& f) {
  f.template operator()<Act::relu>();
  f.template operator()<Act::relu6>();
  f.template operator()<Act::leaky_relu, double>();
  f.template operator()<Act::silu>();
}

void register_kernels(torch::Library& m) {
  for_kinds([&]<Act K, class... A>() {
    m.impl(Kind<K>::name, forward<K, A...>);
    m.impl(backward_name<K>().c_str(), backward<K, A...>);
  });
  for_inplace_kinds([&]<Act K, class... A>() { m.impl(Kind<K>::inplace_name, inplace<K, A...>); });
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  for_kinds([&]<Act K, class... A>() {
    m.impl(Kind<K>::name, forward_autograd<K, A...>);
    m.impl(backward_name<K>().c_str(), backward_autograd<K, A...>);
  });
  for_inplace_kinds([&]<Act K, class... A>() { m.impl(Kind<K>::inplace_name, inplace_autograd<K, A...>); });
}
TORCH_LIBRARY_IMPL(fastnn, ADInplaceOrView, m) {
  for_inplace_kinds([&]<Act K, class... A>() { m.impl(Kind<K>::inplace_name, inplace_bump<K, A...>); });
}
TORCH_LIBRARY_IMPL(fastnn, Functionalize, m) {
  for_inplace_kinds([&]<Act K, class... A>() { m.impl(Kind<K>::inplace_name, inplace_functionalize<K, A...>); });
}

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  for_kinds([&]<Act K, class... A>() {
    m.impl(Kind<K>::name, [](const Tensor& input, A... args) {
      note_fallback(Kind<K>::name, kTransform);
      return Kind<K>::aten(input, args...);
    });
  });
  for_inplace_kinds([&]<Act K, class... A>() {
    m.impl(Kind<K>::inplace_name, [](Tensor& self, A... args) -> Tensor& {
      note_fallback(Kind<K>::inplace_name, kTransform);
      return Kind<K>::aten_inplace(self, args...);
    });
  });
}

void bind(pybind11::module_& m) {
  for_kinds([&]<Act K, class... A>() {
    def(m, Kind<K>::name, [](const Tensor& input, A... args) { return forward_op<K, A...>().call(input, args...); });
  });
  for_inplace_kinds([&]<Act K, class... A>() {
    def(m, Kind<K>::inplace_name, [](const Tensor& input, A... args) {
      Tensor self = input;
      return inplace_op<K, A...>().call(self, args...);
    });
  });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
