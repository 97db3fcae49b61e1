// fastnn::linear: y = x W^T + b and its three gradients, each one matrix product.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "cuda_choice.h"
#include "gemm.h"
#include "grad_node.h"
#include "kernels/epilogue.h"
#include "python_entry.h"
#include "memory.h"

namespace fastnn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using Mask = std::array<bool, 3>;
using Grads = std::tuple<Tensor, Tensor, Tensor>;

const auto& forward_op() {
  static const auto op = handle<Tensor(const Tensor&, const Tensor&, const OptTensor&)>("linear");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<Grads(const Tensor&, const Tensor&, const Tensor&, Mask)>("linear_backward");
  return op;
}
const auto& matmul_op() {
  static const auto op = handle<Tensor(const Tensor&, const Tensor&)>("matmul");
  return op;
}

// input [..., in], weight [out, in], bias [out] or undefined.
bool valid(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return input.dim() >= 1 && weight.dim() == 2 && input.sym_size(-1) == weight.sym_size(1) &&
         (!bias.defined() || (bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(0)));
}

Tensor forward(const Tensor& input, const Tensor& weight, const OptTensor& bias);

bool takes(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (!native("linear", {&input, &weight, &bias}, true)) return false;
  if (valid(input, weight, bias))
    return own_product("linear", {&input, &weight, &bias}, [&] { forward(input, weight, bias); });
  note_fallback("linear", "shapes");
  return false;
}

Tensor empty_rows(const Tensor& like, int64_t last) {
  c10::SmallVector<int64_t, 6> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return fresh(sizes, like.options());
}

Grads aten_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, Mask mask) {
  const Tensor g = as_rows(grad_output);
  Tensor grad_input, grad_weight, grad_bias;
  if (mask[0]) grad_input = grad_output.matmul(weight);
  if (mask[1]) grad_weight = g.t().mm(as_rows(input));
  if (mask[2]) grad_bias = g.sum(0);
  return {grad_input, grad_weight, grad_bias};
}

// ---- kernels -------------------------------------------------------------------------------------------------------

Tensor forward(const Tensor& input, const Tensor& weight, const OptTensor& bias_) {
  const Tensor& bias = or_undefined(bias_);
  if (!takes(input, weight, bias)) return at::linear(input, weight, bias_);
  Tensor output = empty_rows(input, weight.size(0)), keep;
  if (output.numel() == 0) return output;
  Product p{rows_of(input, keep), matrix_of(weight).t(), output.mutable_data_ptr(), dtype_of(input)};
  if (bias.defined()) {
    p.d = bias.const_data_ptr();
    p.d_col_stride = bias.size(0) == 1 ? 1 : bias.stride(0);
  }
  p.run("linear", input);
  return output;
}

Grads backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, Mask mask) {
  TORCH_CHECK(valid(input, weight, {}) && grad_output.dim() == input.dim() && grad_output.size(-1) == weight.size(0) &&
                  grad_output.sizes().slice(0, grad_output.dim() - 1) == input.sizes().slice(0, input.dim() - 1),
              "linear_backward: shapes do not match");
  const int64_t wanted[] = {mask[0], mask[1], mask[2]};
  const auto again = [&] { backward(grad_output, input, weight, mask); };
  if (!native("linear_backward", {&grad_output, &input, &weight}, true) ||
      !own_product("linear_backward", {&grad_output, &input, &weight}, again, wanted))
    return aten_backward(grad_output, input, weight, mask);
  Grads grads;
  auto& [grad_input, grad_weight, grad_bias] = grads;
  const DType dtype = dtype_of(weight);
  Tensor keep_g, keep_x;
  const Matrix g = rows_of(grad_output, keep_g);
  if (mask[0]) {
    grad_input = empty_rows(grad_output, weight.size(1));
    if (grad_input.numel())
      Product{g, matrix_of(weight), grad_input.mutable_data_ptr(), dtype}.run("linear_backward", input);
  }
  if (mask[1]) {
    grad_weight = fresh(weight.sizes(), weight.options());
    if (grad_weight.numel())
      Product{g.t(), rows_of(input, keep_x), grad_weight.mutable_data_ptr(), dtype}.run("linear_backward", input);
  }
  if (mask[2]) {
    grad_bias = at::empty({weight.size(0)}, weight.options());
    const ColumnSumParams p{g.data, grad_bias.mutable_data_ptr(), g.rows, g.cols, g.row_stride, g.col_stride, dtype};
    if (g.cols)
      launch(
          "linear_backward", weight, [&] { return cpu::column_sum(p); },
          [&](auto s) { return cuda::column_sum(p, s); });
  }
  return grads;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

// Stands for a factor that was not kept, of which backward reads the shape: one element seen as many.
Tensor shape_alone(const Tensor& like, const c10::SymDimVector& sizes) {
  return at::empty_strided_symint(sizes, c10::SymDimVector(sizes.size(), 0), like.options());
}

struct LinearGrad {
  static constexpr const char* kName = "linear";
  static constexpr size_t kTensors = 2;
  static variable_list backward(const Saved& s, const Tensor& g) {
    Tensor input = s.tensors[0], weight = s.tensors[1];
    if (!weight.defined()) weight = shape_alone(g, {g.sym_size(-1), input.defined() ? input.sym_size(-1) : 0});
    if (!input.defined()) {
      c10::SymDimVector sizes(g.sym_sizes());
      sizes.back() = weight.sym_size(1);
      input = shape_alone(g, sizes);
    }
    auto [x, w, b] = backward_op().call(g, input, weight, {s.wants(0), s.wants(1), s.wants(2)});
    return {std::move(x), std::move(w), std::move(b)};
  }
};

// grad_input = g W, grad_weight = g^T x, grad_bias = sum g: derivatives in the directions v_x, v_w, v_b.
struct LinearBackwardFunction : Function<LinearBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const Tensor& weight, Mask mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, input, weight});
    ctx->set_materialize_grads(false);
    for (int i = 0; i < 3; ++i) ctx->saved_data[std::string(1, char('0' + i))] = bool(mask[i]);
    auto [x, w, b] = backward_op().call(grad_output, input, weight, mask);
    variable_list outputs;  // only defined tensors may leave
    for (const Tensor& t : {x, w, b})
      if (t.defined()) outputs.push_back(t);
    if (b.defined() && !grad_output.requires_grad()) ctx->mark_non_differentiable({b});
    return outputs;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    Tensor v[3];
    for (int i = 0, next = 0; i < 3; ++i)
      if (ctx->saved_data[std::string(1, char('0' + i))].toBool()) v[i] = grads[next++];
    const Tensor &g = saved[0], &x = saved[1], &w = saved[2];
    Tensor grad_g, grad_x, grad_w;
    if (ctx->needs_input_grad(0)) {
      if (v[1].defined()) grad_g = forward_op().call(x, v[1], v[2].defined() ? OptTensor(v[2]) : std::nullopt);
      else if (v[2].defined()) grad_g = v[2].expand_as(g);
      if (v[0].defined()) {
        const Tensor part = forward_op().call(v[0], w, std::nullopt);
        grad_g = grad_g.defined() ? grad_g + part : part;
      }
    }
    if (ctx->needs_input_grad(1) && v[1].defined()) grad_x = matmul_op().call(g, v[1]);
    if (ctx->needs_input_grad(2) && v[0].defined()) grad_w = matmul_op().call(as_rows(g).t(), as_rows(v[0]));
    return {grad_g, grad_x, grad_w, Tensor()};
  }
};

Tensor forward_autograd(const Tensor& input, const Tensor& weight, const OptTensor& bias_) {
  const Tensor& bias = or_undefined(bias_);
  const bool differentiable = needs_grad({&input, &weight, &bias});
  if (differentiable && !takes(input, weight, bias)) return at::linear(input, weight, bias_);
  Tensor output = below_autograd(forward_op(), input, weight, bias_);
  if (differentiable) {
    const auto node = record<LinearGrad>({}, input, weight, bias);
    attach(output, node);
    if (weight.requires_grad()) node->keep(0, input);  // each gradient reads the other factor alone
    if (input.requires_grad()) node->keep(1, weight);
  }
  return output;
}

Grads backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& weight, Mask mask) {
  if (has_tangent(grad_output) || (mask[1] && has_tangent(input)) || (mask[0] && has_tangent(weight))) {
    note_fallback("linear_backward", kForwardMode);
    return aten_backward(grad_output, input, weight, mask);
  }
  const Tensor none;  // what the wanted gradients are functions of
  if (needs_grad({&grad_output, mask[1] ? &input : &none, mask[0] ? &weight : &none})) {
    const variable_list g = LinearBackwardFunction::apply(grad_output, input, weight, mask);
    Tensor out[3];
    for (int i = 0, next = 0; i < 3; ++i)
      if (mask[i]) out[i] = g[next++];
    return {out[0], out[1], out[2]};
  }
  return below_autograd(backward_op(), grad_output, input, weight, mask);
}

template <c10::DeviceType kDevice>
Tensor forward_autocast(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  const NoAutocast guard(kDevice);
  const Tensor b = autocast_lower(or_undefined(bias), kDevice);
  return forward_op().call(autocast_lower(input, kDevice), autocast_lower(weight, kDevice),
                           b.defined() ? OptTensor(b) : std::nullopt);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_backward(Tensor grad_output, Tensor input, Tensor weight, bool[3] mask) -> (Tensor, Tensor, Tensor)");
}

void register_kernels(torch::Library& m) {
  m.impl("linear", forward);
  m.impl("linear_backward", backward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("linear", forward_autograd);
  m.impl("linear_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) { m.impl("linear", forward_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) { m.impl("linear", forward_autocast<at::kCUDA>); }

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("linear", [](const Tensor& input, const Tensor& weight, const OptTensor& bias) {
    note_fallback("linear", kTransform);
    return at::linear(input, weight, bias);
  });
}

// clamp(linear(input, weight, bias) + residual, low, high) on CUDA, for frozen layers, without gradients: in one kernel
// where fastnn's is the choice, else by torch's operators. nullopt where the kernels do not take the call.
OptTensor linear_epilogue([[maybe_unused]] const Tensor& input, [[maybe_unused]] const Tensor& weight,
                          [[maybe_unused]] const OptTensor& bias_, [[maybe_unused]] const OptTensor& residual_,
                          [[maybe_unused]] double low, [[maybe_unused]] double high) {
#ifdef FASTNN_CUDA
  const Tensor &bias = or_undefined(bias_), &residual = or_undefined(residual_);
  if (!input.is_cuda() || at::autocast::is_autocast_enabled(at::kCUDA) ||
      !native("linear", {&input, &weight, &bias, &residual}, true) || !valid(input, weight, bias))
    return std::nullopt;
  Tensor output = empty_rows(input, weight.size(0)), keep;
  if (output.numel() == 0 || (residual.defined() && residual.sizes() != output.sizes())) return std::nullopt;
  const bool clamps = low > -INFINITY || high < INFINITY;
  const auto again = [&] { linear_epilogue(input, weight, bias_, residual_, low, high); };
  const int64_t options[] = {clamps};
  const CudaCall call{CudaFamily::matmul, "linear fused", {&input, &weight, &bias, &residual}, options};
  if (const CudaChoice choice = choose_cuda(call, again); !choice.own) {
    note_fallback("linear", choice.reason);
    output = at::linear(input, weight, bias_);
    if (residual.defined()) output.add_(residual);
    return clamps ? output.clamp_(low, high) : output;
  }
  Product product{rows_of(input, keep), matrix_of(weight).t(), output.mutable_data_ptr(), dtype_of(input)};
  const Tensor b = bias.defined() ? bias.contiguous() : bias, r = residual.defined() ? residual.contiguous() : residual;
  if (r.defined()) product.d = r.const_data_ptr(), product.d_row_stride = weight.size(0), product.d_col_stride = 1;
  GemmParams p = product.params();
  p.tf32 = allows_tf32(CudaFamily::matmul);
  const Epilogue e{b.defined() ? b.const_data_ptr() : nullptr, nullptr, clamps, float(low), float(high)};
  const auto none = [] { return Status::invalid_argument; };
  launch("linear", input, none, [&](auto s) { return cuda::gemm(p, e, s); });
  return output;
#else
  return std::nullopt;
#endif
}

void bind(pybind11::module_& m) {
  m.def("linear_epilogue", linear_epilogue, pybind11::call_guard<pybind11::gil_scoped_release>());
  def(m, "linear", [](const Tensor& input, const Tensor& weight, const OptTensor& bias) {
    return forward_op().call(input, weight, bias);
  });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
