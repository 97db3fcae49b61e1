// fastnn::softmax and fastnn::log_softmax: torch.softmax / torch.log_softmax on the kernels of kernels/softmax.h.
#include "kernels/softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "common.h"
#include "grad_node.h"
#include "memory.h"
#include "python_entry.h"

namespace fastnn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;

template <bool kLog>
constexpr const char* kName = kLog ? "log_softmax" : "softmax";
template <bool kLog>
constexpr const char* kBackwardName = kLog ? "log_softmax_backward" : "softmax_backward";

template <bool kLog>
const auto& forward_op() {
  static const auto op = handle<Tensor(const Tensor&, int64_t)>(kName<kLog>);
  return op;
}
template <bool kLog>
const auto& backward_op() {
  static const auto op = handle<Tensor(const Tensor&, const Tensor&, int64_t)>(kBackwardName<kLog>);
  return op;
}

template <bool kLog>
Tensor aten_forward(const Tensor& input, int64_t dim) {
  return kLog ? at::log_softmax(input, dim) : at::softmax(input, dim);
}

template <bool kLog>
Tensor aten_backward(const Tensor& grad_output, const Tensor& result, int64_t dim) {
  return kLog ? at::_log_softmax_backward_data(grad_output, result, dim, result.scalar_type())
              : at::_softmax_backward_data(grad_output, result, dim, result.scalar_type());
}

bool valid_dim(const Tensor& t, int64_t dim) {
  const int64_t rank = std::max<int64_t>(t.dim(), 1);
  return dim >= -rank && dim < rank;
}

// [outer, classes, inner] of a contiguous tensor.
SoftmaxParams shape_params(const Tensor& t, int64_t dim) {
  SoftmaxParams p{};
  p.outer = p.classes = p.inner = 1;
  p.dtype = dtype_of(t);
  if (t.dim() == 0) return p;
  dim = dim < 0 ? dim + t.dim() : dim;
  for (int64_t i = 0; i < dim; ++i) p.outer *= t.size(i);
  p.classes = t.size(dim);
  for (int64_t i = dim + 1; i < t.dim(); ++i) p.inner *= t.size(i);
  return p;
}

// ---- kernels (CPU and CUDA) ----------------------------------------------------------------------------------------

template <bool kLog>
Tensor forward(const Tensor& input, int64_t dim) {
  if (!valid_dim(input, dim) || !native(kName<kLog>, {&input}, true)) return aten_forward<kLog>(input, dim);
  const Tensor x = contiguous(input);  // as torch's result is, of channels_last tensors too
  Tensor y = fresh_like(x);
  if (x.numel() == 0) return y;
  SoftmaxParams p = shape_params(x, dim);
  p.input = x.const_data_ptr();
  p.output = y.mutable_data_ptr();
  p.log = kLog;
  launch(kName<kLog>, x, [&] { return cpu::softmax_forward(p); }, [&](auto s) { return cuda::softmax_forward(p, s); });
  return y;
}

template <bool kLog>
Tensor backward(const Tensor& grad_output, const Tensor& result, int64_t dim) {
  if (!valid_dim(result, dim) || grad_output.sizes() != result.sizes() ||
      !native(kBackwardName<kLog>, {&grad_output, &result}, true))
    return aten_backward<kLog>(grad_output, result, dim);
  const Tensor y = contiguous(result), g = contiguous(grad_output);
  Tensor dx = fresh_like(y);
  if (y.numel() == 0) return dx;
  SoftmaxParams p = shape_params(y, dim);
  p.grad_output = g.const_data_ptr();
  p.result = y.const_data_ptr();
  p.grad_input = dx.mutable_data_ptr();
  p.log = kLog;
  launch(
      kBackwardName<kLog>, y, [&] { return cpu::softmax_backward(p); },
      [&](auto s) { return cuda::softmax_backward(p, s); });
  return dx;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

template <bool kLog>
struct SoftmaxGrad {
  static constexpr const char* kName = ops::kName<kLog>;
  static constexpr size_t kTensors = 1;
  static variable_list backward(const Saved& s, const Tensor& g) {
    return {backward_op<kLog>().call(g, s.tensors[0], s.data[0].toInt())};
  }
};

// Derivatives of dx = y (g - sum(g y)), or dx = g - exp(y) sum(g) for the log form, in the direction v = d/d(dx).
template <bool kLog>
struct SoftmaxBackwardFunction : Function<SoftmaxBackwardFunction<kLog>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& result, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, result});
    ctx->saved_data["dim"] = dim;
    return backward_op<kLog>().call(grad_output, result, dim);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& v = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &y = saved[1];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    Tensor grad_g, grad_y;
    if constexpr (kLog) {
      const Tensor vp = v * y.exp();
      const Tensor vp_sum = vp.sum(dim, true);
      if (ctx->needs_input_grad(0)) grad_g = v - vp_sum;
      if (ctx->needs_input_grad(1)) grad_y = -vp * g.sum(dim, true);
    } else {
      const Tensor vy_sum = (v * y).sum(dim, true);
      if (ctx->needs_input_grad(0)) grad_g = y * (v - vy_sum);
      if (ctx->needs_input_grad(1)) grad_y = v * (g - (g * y).sum(dim, true)) - g * vy_sum;
    }
    return {grad_g, grad_y, Tensor()};
  }
};

template <bool kLog>
Tensor forward_autograd(const Tensor& input, int64_t dim) {
  if (!valid_dim(input, dim) || !native(kName<kLog>, {&input}, true)) return aten_forward<kLog>(input, dim);
  const bool differentiable = needs_grad({&input});
  Tensor result = below_autograd(forward_op<kLog>(), input, dim);
  if (differentiable) {
    const auto node = record<SoftmaxGrad<kLog>>({dim}, input);
    attach(result, node);
    node->keep(0, result, true);
  }
  return result;
}

template <bool kLog>
Tensor backward_autograd(const Tensor& grad_output, const Tensor& result, int64_t dim) {
  if (has_tangent(grad_output) || has_tangent(result)) {
    note_fallback(kBackwardName<kLog>, kForwardMode);
    return aten_backward<kLog>(grad_output, result, dim);
  }
  if (needs_grad({&grad_output, &result})) {
    return SoftmaxBackwardFunction<kLog>::apply(grad_output, result, dim);
  }
  return below_autograd(backward_op<kLog>(), grad_output, result, dim);
}

// ---- autocast: float32 on CUDA and nothing on the CPU, as torch's own policy for softmax ----------------------------

template <bool kLog>
Tensor forward_autocast(const Tensor& input, int64_t dim) {
  const NoAutocast guard(at::kCUDA);
  return forward_op<kLog>().call(autocast_fp32(input, at::kCUDA), dim);
}

// ---- torch.func ----------------------------------------------------------------------------------------------------

template <bool kLog>
Tensor forward_transformed(const Tensor& input, int64_t dim) {
  note_fallback(kName<kLog>, kTransform);
  return aten_forward<kLog>(input, dim);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("softmax(Tensor input, int dim) -> Tensor");
  m.def("log_softmax(Tensor input, int dim) -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor result, int dim) -> Tensor");
  m.def("log_softmax_backward(Tensor grad_output, Tensor result, int dim) -> Tensor");
}

void register_kernels(torch::Library& m) {
  m.impl("softmax", forward<false>);
  m.impl("log_softmax", forward<true>);
  m.impl("softmax_backward", backward<false>);
  m.impl("log_softmax_backward", backward<true>);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("softmax", forward_autograd<false>);
  m.impl("log_softmax", forward_autograd<true>);
  m.impl("softmax_backward", backward_autograd<false>);
  m.impl("log_softmax_backward", backward_autograd<true>);
}

TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) {
  m.impl("softmax", forward_autocast<false>);
  m.impl("log_softmax", forward_autocast<true>);
}

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("softmax", forward_transformed<false>);
  m.impl("log_softmax", forward_transformed<true>);
}

void bind(pybind11::module_& m) {
  def(m, "softmax", [](const Tensor& input, int64_t dim) { return forward_op<false>().call(input, dim); });
  def(m, "log_softmax", [](const Tensor& input, int64_t dim) { return forward_op<true>().call(input, dim); });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
