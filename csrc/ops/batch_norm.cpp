// fastnn::batch_norm_train, batch_norm_eval and their backward, each with an optional residual and ReLU behind it.
#include "kernels/batch_norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/relu.h>
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
using Two = std::tuple<Tensor, Tensor>;                   // output, statistics
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // gradients of input, weight, bias, residual
using Mask = std::array<bool, 4>;                         // which of them are needed

using TrainSignature = Two(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                           double, double, const OptTensor&, bool);
using EvalSignature = Two(const Tensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&, double,
                          const OptTensor&, bool);
using BackwardSignature = Four(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const OptTensor&, bool,
                               Mask);

const auto& train_op() {
  static const auto op = handle<TrainSignature>("batch_norm_train");
  return op;
}
const auto& eval_op() {
  static const auto op = handle<EvalSignature>("batch_norm_eval");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<BackwardSignature>("batch_norm_backward");
  return op;
}

// ---- checks --------------------------------------------------------------------------------------------------------

struct Arguments {
  const Tensor &input, &weight, &bias, &running_mean, &running_var, &residual;
  bool training, relu;
  double momentum, eps;
};

at::ScalarType acc_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

bool is_16_bit(const Tensor& t) { return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf; }

// True when the arguments are ones torch takes and the kernels know. What torch refuses is left to torch to refuse.
bool takes(const Arguments& a) {
  if (a.input.dim() < 2 || a.input.sym_size(1) == 0) return false;
  if (a.running_mean.defined() != a.running_var.defined() || (!a.training && !a.running_mean.defined())) return false;
  const Tensor* first = nullptr;
  for (const Tensor* t : {&a.weight, &a.bias, &a.running_mean, &a.running_var}) {
    if (!t->defined()) continue;
    if (t->dim() != 1 || t->sym_numel() != a.input.sym_size(1)) return false;
    if (!first) first = t;
    if (t->scalar_type() != first->scalar_type() || t->device() != a.input.device() || why_not_native(*t, true))
      return false;
  }
  if (first && first->scalar_type() != a.input.scalar_type() &&
      !(is_16_bit(a.input) && first->scalar_type() == at::kFloat))
    return false;
  if (a.residual.defined() && a.residual.sym_sizes() != a.input.sym_sizes()) return false;
  return true;
}

bool native_arguments(const Arguments& a) {
  if (!native("batch_norm", {&a.input, &a.residual}, true)) return false;
  if (takes(a)) return true;
  note_fallback("batch_norm", "arguments");
  return false;
}

Two aten_forward(const Arguments& a) {
  Tensor y = at::batch_norm(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.training, a.momentum, a.eps,
                            /*cudnn_enabled=*/true);
  if (a.residual.defined()) y = at::add(y, a.residual);
  if (a.relu) y = at::relu(y);
  return {y, at::empty({0, 0}, a.input.options().dtype(acc_type(a.input)))};
}

// With the variance that invstd came from, and no eps to add.
Four aten_backward(const Tensor& grad_output, const Tensor& input, const OptTensor& weight, const Tensor& statistics,
                   const OptTensor& result, bool training, Mask mask) {
  const Tensor &y = or_undefined(result), g = y.defined() ? grad_output.masked_fill(y <= 0, 0) : grad_output;
  const Tensor mean = statistics[0], invstd = statistics[1];
  const auto [dx, dw, db] = at::native_batch_norm_backward(g, input, weight, mean, invstd.pow(-2), mean, invstd,
                                                           training, 0, {mask[0], mask[1], mask[2]});
  return {dx, dw, db, g};
}

// ---- kernels -------------------------------------------------------------------------------------------------------

Tensor contiguous_or_undefined(const Tensor& t) { return t.defined() ? t.contiguous() : t; }
const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

at::MemoryFormat format_of(const Tensor& input) {
  return format_as_it_lies(input).value_or(input.suggest_memory_format());
}

// For results and gradients. An empty one lies as torch's does: as the input.
Tensor empty_image(const Tensor& x, at::MemoryFormat format) {
  return x.numel() == 0 ? at::empty_like(x) : fresh_like(x, format);
}

// The statistics, one row each: mean and invstd; scale and offset of the output too where backward takes the ReLU's
// mask from them (fake kernels count the same rows). 16-bit outputs are rounded: only they themselves have the mask.
constexpr int64_t kMoments = 2, kMomentsAndAffine = 4;
int64_t statistics_rows(const Arguments& a) {
  return a.relu && !a.residual.defined() && a.input.is_cpu() && !is_16_bit(a.input) ? kMomentsAndAffine : kMoments;
}
void set_statistics(BatchNormParams& p, const Tensor& statistics) {
  const auto row = [&](int64_t i) {
    return static_cast<char*>(statistics.mutable_data_ptr()) + i * p.channels * statistics.element_size();
  };
  p.mean = row(0);
  p.invstd = row(1);
  if (statistics.size(0) == kMomentsAndAffine) p.affine = row(2);
}

// Sizes as the tensor lies in memory: [batch, channels, inner], or rows of channels with inner == 1.
BatchNormParams shape_params(const Tensor& x, const Tensor& param) {
  BatchNormParams p{};
  p.channels = x.size(1);
  p.batch = x.size(0);
  p.inner = p.batch && p.channels ? x.numel() / (p.batch * p.channels) : 1;
  if (!x.is_contiguous()) {
    p.batch *= p.inner;
    p.inner = 1;
  }
  p.dtype = dtype_of(x);
  p.param_dtype = param.defined() ? dtype_of(param) : p.dtype;
  return p;
}

Tensor workspace(BatchNormParams& p, const Tensor& x) {
  int64_t bytes = batch_norm_workspace(p);
#ifdef FASTNN_CUDA
  if (x.is_cuda()) bytes = cuda::batch_norm_workspace(p);
#endif
  Tensor w = fresh({bytes}, x.options().dtype(at::kByte));
  p.workspace = w.mutable_data_ptr();
  return w;
}

Two forward(const Arguments& a) {
  const at::MemoryFormat format = format_of(a.input);
  const Tensor x = contiguous(a.input, format);
  const Tensor r = a.residual.defined() ? contiguous(a.residual, format) : a.residual;
  const Tensor w = contiguous_or_undefined(a.weight), b = contiguous_or_undefined(a.bias);
  const Tensor running_mean = contiguous_or_undefined(a.running_mean);
  const Tensor running_var = contiguous_or_undefined(a.running_var);
  Tensor y = empty_image(x, format);
  Tensor statistics = at::empty({statistics_rows(a), x.size(1)}, x.options().dtype(acc_type(x)));
  if (x.numel() == 0) return {y, statistics.zero_()};
  BatchNormParams p = shape_params(x, w.defined() ? w : b.defined() ? b : running_mean);
  p.input = x.const_data_ptr();
  p.residual = data_or_null(r);
  p.output = y.mutable_data_ptr();
  p.weight = data_or_null(w);
  p.bias = data_or_null(b);
  p.running_mean = mutable_or_null(running_mean);
  p.running_var = mutable_or_null(running_var);
  set_statistics(p, statistics);
  p.momentum = a.momentum;
  p.eps = a.eps;
  p.training = a.training;
  p.relu = a.relu;
  const Tensor keep = workspace(p, x);
  launch(
      "batch_norm", x, [&] { return cpu::batch_norm_forward(p); },
      [&](auto stream) { return cuda::batch_norm_forward(p, stream); });
  if (a.training && a.running_mean.defined()) {
    if (!running_mean.is_same(a.running_mean)) a.running_mean.copy_(running_mean);
    if (!running_var.is_same(a.running_var)) a.running_var.copy_(running_var);
  }
  return {y, statistics};
}

Two train(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
          const OptTensor& running_var, double momentum, double eps, const OptTensor& residual, bool relu) {
  const Arguments a{input,
                    or_undefined(weight),
                    or_undefined(bias),
                    or_undefined(running_mean),
                    or_undefined(running_var),
                    or_undefined(residual),
                    true,
                    relu,
                    momentum,
                    eps};
  return native_arguments(a) ? forward(a) : aten_forward(a);
}

Two evaluate(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const Tensor& running_mean,
             const Tensor& running_var, double eps, const OptTensor& residual, bool relu) {
  const Arguments a{input,
                    or_undefined(weight),
                    or_undefined(bias),
                    running_mean,
                    running_var,
                    or_undefined(residual),
                    false,
                    relu,
                    0,
                    eps};
  return native_arguments(a) ? forward(a) : aten_forward(a);
}

Four backward(const Tensor& grad_output, const Tensor& input, const OptTensor& weight, const Tensor& statistics,
              const OptTensor& result, bool training, Mask mask) {
  const Tensor& weight_given = or_undefined(weight);
  TORCH_CHECK(input.dim() >= 2 && input.size(1) > 0 && grad_output.sizes() == input.sizes() && statistics.dim() == 2 &&
                  statistics.size(1) == input.size(1) &&
                  (statistics.size(0) == kMoments || statistics.size(0) == kMomentsAndAffine) &&
                  statistics.scalar_type() == acc_type(input) && statistics.is_contiguous() &&
                  (!weight_given.defined() || weight_given.numel() == input.size(1)) &&
                  (!result.has_value() || !result->defined() || result->sizes() == input.sizes()),
              "fastnn::batch_norm_backward: arguments that batch_norm did not save");
  TORCH_CHECK(have_kernels("batch_norm_backward", {&input, &grad_output, &or_undefined(result)}, true),
              "fastnn::batch_norm_backward: not a tensor of the kernels");
  const at::MemoryFormat format = format_of(input);
  const Tensor x = contiguous(input, format), g = contiguous(grad_output, format);
  const Tensor y = result.has_value() && result->defined() ? contiguous(*result, format) : Tensor();
  const Tensor w = contiguous_or_undefined(weight_given);
  const auto params = (w.defined() ? w : statistics).options();
  const auto none = [&] { return at::empty({0}, x.options()); };
  Tensor dx = mask[0] ? empty_image(x, format) : none();
  Tensor dw = mask[1] ? at::empty({x.size(1)}, params) : none(), db = mask[2] ? at::empty({x.size(1)}, params) : none();
  Tensor dr = !mask[3] ? none() : y.defined() ? empty_image(x, format) : g.clone();
  if (x.numel() == 0) {
    if (mask[1]) dw.zero_();
    if (mask[2]) db.zero_();
    return {dx, dw, db, dr};
  }
  BatchNormParams p = shape_params(x, w.defined() ? w : statistics);
  p.input = x.const_data_ptr();
  p.grad_output = g.const_data_ptr();
  p.result = data_or_null(y);
  p.weight = data_or_null(w);
  set_statistics(p, statistics);
  if (mask[0]) p.grad_input = dx.mutable_data_ptr();
  if (mask[1]) p.grad_weight = dw.mutable_data_ptr();
  if (mask[2]) p.grad_bias = db.mutable_data_ptr();
  if (mask[3] && y.defined()) p.grad_residual = dr.mutable_data_ptr();
  p.training = training;
  const Tensor keep = workspace(p, x);
  launch(
      "batch_norm_backward", x, [&] { return cpu::batch_norm_backward(p); },
      [&](auto stream) { return cuda::batch_norm_backward(p, stream); });
  return {dx, dw, db, dr};
}

// ---- autograd ------------------------------------------------------------------------------------------------------

struct BatchNormGrad {
  static constexpr const char* kName = "batch_norm";
  static constexpr size_t kTensors = 4;
  static variable_list backward(const Saved& s, const Tensor& g) {
    const Mask mask{s.wants(0), s.wants(1), s.wants(2), s.wants(3)};
    const auto [dx, dw, db, dr] =
        backward_op().call(g, s.tensors[0], s.optional(1), s.tensors[2], s.optional(3), s.data[0].toBool(), mask);
    const auto wanted = [&](const Tensor& t, size_t i) { return mask[i] ? t : Tensor(); };
    return {wanted(dx, 0), wanted(dw, 1), wanted(db, 2), wanted(dr, 3)};
  }
};

// With z = (x - mean) invstd, P(t) = t - mean(t) - z mean(t z) in training and P(t) = t in evaluation, g the gradient
// behind the ReLU: dx = w invstd P(g), dw = sum g z, db = sum g, dr = g. Below, v are the cotangents of those four.
struct BatchNormBackwardFunction : Function<BatchNormBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptTensor& weight, const Tensor& statistics, const OptTensor& result,
                               bool training, Mask mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, input, or_undefined(weight), statistics, or_undefined(result)});
    ctx->saved_data["training"] = training;
    ctx->saved_data["mask"] = c10::List<bool>({mask[0], mask[1], mask[2], mask[3]});
    ctx->set_materialize_grads(false);
    auto [dx, dw, db, dr] = backward_op().call(grad_output, input, weight, statistics, result, training, mask);
    return {dx, dw, db, dr};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2], &result = saved[4];
    const bool training = ctx->saved_data["training"].toBool();
    const auto mask = ctx->saved_data["mask"].toBoolList();
    const auto wanted = [&](size_t i) { return mask[i] && v[i].defined(); };
    const auto acc = acc_type(input);
    std::vector<int64_t> per_channel(input.dim() - 1, 1), dims{0};
    per_channel[0] = -1;
    for (int64_t d = 2; d < input.dim(); ++d) dims.push_back(d);
    const auto wide = [&](const Tensor& t) { return t.to(acc).reshape(per_channel); };  // [C] against [N, C, ...]
    const auto sum = [&](const Tensor& t) { return t.sum(dims, true); };
    const auto mean = [&](const Tensor& t) { return t.mean(dims, true); };
    const Tensor stopped = result.defined() ? result <= 0 : Tensor();
    const Tensor g = stopped.defined() ? grad_output.to(acc).masked_fill(stopped, 0) : grad_output.to(acc);
    // In training mean and invstd are functions of the input: their derivatives are inside P.
    const Tensor s = wide(saved[3][1]), z = (input.to(acc) - wide(saved[3][0])) * s;
    const Tensor ws = weight.defined() ? wide(weight) * s : s;
    const auto project = [&](const Tensor& t) { return training ? t - mean(t) - z * mean(t * z) : t; };
    Tensor grad_g, grad_x, grad_w;
    const auto add = [](Tensor& to, const Tensor& t) { to = to.defined() ? to + t : t; };
    if (wanted(0)) {
      const Tensor v0 = v[0].to(acc), pv = project(v0), pg = project(g);
      add(grad_g, ws * pv);
      if (weight.defined()) grad_w = sum(v0 * pg) * s;
      if (training) add(grad_x, -ws * s * (z * mean(v0 * pg) + mean(v0 * z) * pg + mean(g * z) * pv));
    }
    if (wanted(1)) {
      const Tensor vw = wide(v[1]);
      add(grad_g, vw * z);
      add(grad_x, vw * s * project(g));
    }
    if (wanted(2)) add(grad_g, wide(v[2]).expand_as(input));
    if (wanted(3)) add(grad_g, v[3].to(acc));
    if (grad_g.defined() && stopped.defined()) grad_g = grad_g.masked_fill(stopped, 0);
    variable_list out(7);
    if (grad_g.defined() && ctx->needs_input_grad(0)) out[0] = grad_g.to(grad_output.scalar_type());
    if (grad_x.defined() && ctx->needs_input_grad(1)) out[1] = grad_x.to(input.scalar_type());
    if (grad_w.defined() && ctx->needs_input_grad(2)) out[2] = grad_w.reshape({-1}).to(weight.scalar_type());
    return out;
  }
};

Two forward_autograd(const Arguments& a) {
  if (!native_arguments(a)) return aten_forward(a);
  const bool differentiable = needs_grad({&a.input, &a.weight, &a.bias, &a.residual});
  // torch saves the running statistics, too, and refuses those of inference mode.
  if (differentiable && a.running_mean.defined() && (a.running_mean.is_inference() || a.running_var.is_inference()))
    return aten_forward(a);
  Two out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = a.training
              ? train_op().call(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.momentum, a.eps, a.residual,
                                a.relu)
              : eval_op().call(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.eps, a.residual, a.relu);
  }
  if (differentiable) {
    const auto& [y, statistics] = out;
    const auto node = record<BatchNormGrad>({a.training}, a.input, a.weight, a.bias, a.residual);
    attach(y, node);
    node->keep(0, a.input);
    node->keep(1, a.weight);
    node->keep(2, statistics);
    if (a.relu) node->keep(3, y, true);
  }
  return out;
}

Two train_autograd(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                   const OptTensor& running_var, double momentum, double eps, const OptTensor& residual, bool relu) {
  return forward_autograd({input, or_undefined(weight), or_undefined(bias), or_undefined(running_mean),
                           or_undefined(running_var), or_undefined(residual), true, relu, momentum, eps});
}
Two eval_autograd(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const Tensor& running_mean,
                  const Tensor& running_var, double eps, const OptTensor& residual, bool relu) {
  return forward_autograd({input, or_undefined(weight), or_undefined(bias), running_mean, running_var,
                           or_undefined(residual), false, relu, 0, eps});
}

Four backward_autograd(const Tensor& grad_output, const Tensor& input, const OptTensor& weight,
                       const Tensor& statistics, const OptTensor& result, bool training, Mask mask) {
  if (has_tangent(grad_output) || has_tangent(input) || has_tangent(or_undefined(weight))) {
    note_fallback("batch_norm_backward", kForwardMode);
    return aten_backward(grad_output, input, weight, statistics, result, training, mask);
  }
  if (needs_grad({&grad_output, &input, &or_undefined(weight)})) {
    const auto out = BatchNormBackwardFunction::apply(grad_output, input, weight, statistics, result, training, mask);
    return {out[0], out[1], out[2], out[3]};
  }
  return below_autograd(backward_op(), grad_output, input, weight, statistics, result, training, mask);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum, float eps, Tensor? residual, bool relu) -> (Tensor output, Tensor statistics)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, "
      "Tensor? residual, bool relu) -> (Tensor output, Tensor statistics)");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor statistics, "
      "Tensor? result, bool training, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

void register_kernels(torch::Library& m) {
  m.impl("batch_norm_train", train);
  m.impl("batch_norm_eval", evaluate);
  m.impl("batch_norm_backward", backward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("batch_norm_train", train_autograd);
  m.impl("batch_norm_eval", eval_autograd);
  m.impl("batch_norm_backward", backward_autograd);
}
// No kernel at ADInplaceOrView: torch's batch_norm does not count the running statistics' versions up either, and a
// checkpoint that was given them would refuse to run again.

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("batch_norm_train",
         [](const Tensor& input, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
            const OptTensor& running_var, double momentum, double eps, const OptTensor& residual, bool relu) {
           note_fallback("batch_norm", kTransform);
           return aten_forward({input, or_undefined(weight), or_undefined(bias), or_undefined(running_mean),
                                or_undefined(running_var), or_undefined(residual), true, relu, momentum, eps});
         });
  m.impl("batch_norm_eval",
         [](const Tensor& input, const OptTensor& weight, const OptTensor& bias, const Tensor& running_mean,
            const Tensor& running_var, double eps, const OptTensor& residual, bool relu) {
           note_fallback("batch_norm", kTransform);
           return aten_forward({input, or_undefined(weight), or_undefined(bias), running_mean, running_var,
                                or_undefined(residual), false, relu, 0, eps});
         });
}

void bind(pybind11::module_& m) {
  def(m, "batch_norm_train",
      [](const Tensor& input, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
         const OptTensor& running_var, double momentum, double eps, const OptTensor& residual, bool relu) {
        return std::get<0>(
            train_op().call(input, weight, bias, running_mean, running_var, momentum, eps, residual, relu));
      });
  def(m, "batch_norm_eval",
      [](const Tensor& input, const OptTensor& weight, const OptTensor& bias, const Tensor& running_mean,
         const Tensor& running_var, double eps, const OptTensor& residual, bool relu) {
        return std::get<0>(eval_op().call(input, weight, bias, running_mean, running_var, eps, residual, relu));
      });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
