// fastnn::nll_loss: torch's nll_loss on the kernels of kernels/nll_loss.h.
#include "kernels/nll_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nll_loss_nd.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "common.h"
#include "loss.h"
#include "grad_node.h"
#include "memory.h"
#include "python_entry.h"

namespace fastnn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;

using Results = std::tuple<Tensor, Tensor>;  // the loss, and the divisor of a mean
using Forward = Results(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t);
using Backward = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const Tensor&, int64_t, int64_t);

const auto& forward_op() {
  static const auto op = handle<Forward>("nll_loss");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<Backward>("nll_loss_backward");
  return op;
}

// What the kernels compute; torch's own function judges the rest, and raises.
bool fits(const Tensor& input, const Tensor& target, const Tensor& weight, int64_t reduction) {
  return reduction >= 0 && reduction <= 2 && has_classes(input) && valid_indices(input, target, weight);
}
bool takes(const Tensor& input, const Tensor& target, const Tensor& weight, int64_t reduction) {
  return fits(input, target, weight, reduction) && native("nll_loss", {&input, &weight}, true);
}

NllLossParams params(const Tensor& x, const Tensor& target, const Tensor& weight, int64_t reduction,
                     int64_t ignore_index) {
  NllLossParams p{};
  set_shape(p, x);
  p.dtype = dtype_of(x);
  p.target = target.const_data_ptr();
  p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  p.reduction = Reduction(reduction);
  p.ignore_index = ignore_index;
  p.target_kind = target.scalar_type() == at::kByte ? TargetKind::uint8 : TargetKind::int64;
  return p;
}

// One element of every row is read: from where it lies, unless the rows have more dimensions than the kernels count.
Tensor strided_rows(NllLossParams& p, const Tensor& input) {
  int64_t sizes[] = {1, 1, 1}, strides[] = {0, 0, 0};
  int used = 0;  // from the innermost
  for (int64_t d = input.dim() - 1; d >= 0; --d) {
    if (d == class_dim(input) || input.size(d) == 1) continue;
    if (used > 0 && input.stride(d) == sizes[used - 1] * strides[used - 1]) {
      sizes[used - 1] *= input.size(d);
    } else if (used < 3) {
      sizes[used] = input.size(d);
      strides[used++] = input.stride(d);
    } else {
      return strided_rows(p, contiguous(input));
    }
  }
  p.width = sizes[0];
  p.height = sizes[1];
  p.x_stride_w = strides[0];
  p.x_stride_h = strides[1];
  p.x_stride_n = strides[2];
  p.x_stride_class = input.stride(class_dim(input));
  p.input = input.const_data_ptr();
  return input;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

Results forward(const Tensor& input, const Tensor& target_, const OptTensor& weight_, int64_t reduction,
                int64_t ignore_index) {
  const Tensor& w = or_undefined(weight_);
  if (!takes(input, target_, w, reduction)) {
    return {at::nll_loss_nd(input, target_, weight_, reduction, ignore_index), at::empty({0}, input.options())};
  }
  const Tensor target = target_.contiguous();
  const Tensor weight = w.defined() ? w.contiguous() : w;
  NllLossParams p = params(input, target, weight, reduction, ignore_index);
  const Tensor x = strided_rows(p, input);
  Tensor loss = p.reduction == Reduction::none ? fresh(row_sizes(x), x.options()) : at::empty({}, x.options());
  Tensor total = at::empty({}, x.options().dtype(accumulator(x)));
  p.loss = loss.mutable_data_ptr();
  p.total_weight = total.mutable_data_ptr();
  bool out_of_range = false;
  if (x.is_cpu()) p.out_of_range = &out_of_range;
  launch("nll_loss", x, [&] { return cpu::nll_loss_forward(p); }, [&](auto s) { return cuda::nll_loss_forward(p, s); });
  if (out_of_range) raise_out_of_range(target, p.classes, ignore_index);
  return {loss, total};
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& target_, const OptTensor& weight_,
                const Tensor& total_weight, int64_t reduction, int64_t ignore_index) {
  const Tensor& w = or_undefined(weight_);
  const Tensor weight = w.defined() ? w.contiguous() : w;
  const Tensor g = grad_output.contiguous(), target = target_.contiguous();
  TORCH_CHECK(have_kernels("nll_loss_backward", {&g, &input, &weight}, true) &&
                  fits(input, target, weight, reduction) && total_weight.numel() == 1 &&
                  total_weight.scalar_type() == accumulator(input),
              "fastnn::nll_loss_backward: arguments of no forward call");
  Tensor dx = classes_last(input) ? fresh_like(input) : fresh(input.sizes(), input.options());
  NllLossParams p = params(dx, target, weight, reduction, ignore_index);
  TORCH_CHECK(g.numel() == (reduction == 0 ? p.outer * p.inner : 1),
              "fastnn::nll_loss_backward: gradient of another call");
  p.grad_output = g.const_data_ptr();
  p.grad_input = dx.mutable_data_ptr();
  p.total_weight = const_cast<void*>(total_weight.const_data_ptr());
  launch(
      "nll_loss_backward", dx, [&] { return cpu::nll_loss_backward(p); },
      [&](auto s) { return cuda::nll_loss_backward(p, s); });
  return dx;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

struct NllLossGrad {
  static constexpr const char* kName = "nll_loss";
  static constexpr size_t kTensors = 4;
  static constexpr bool kLinear = true;
  static variable_list backward(const Saved& s, const Tensor& g) {
    return {backward_op().call(g, s.tensors[0], s.tensors[1], s.optional(2), s.tensors[3], s.data[0].toInt(),
                               s.data[1].toInt())};
  }
};

// The gradient is linear in grad_output: its derivative is the loss of v itself, without the division of a mean done
// twice.
struct NllLossBackwardFunction : Function<NllLossBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& target,
                        const OptTensor& weight, const Tensor& total_weight, int64_t reduction, int64_t ignore_index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({target, or_undefined(weight)});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    return backward_op().call(grad_output, input, target, weight, total_weight, reduction, ignore_index);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptTensor weight = saved[1].defined() ? OptTensor(saved[1]) : OptTensor();
    const auto& v = grads[0];
    Tensor grad_g, grad_input;
    if (ctx->needs_input_grad(0))
      grad_g = std::get<0>(forward_op().call(v, saved[0], weight, ctx->saved_data["reduction"].toInt(),
                                             ctx->saved_data["ignore_index"].toInt()));
    if (ctx->needs_input_grad(1)) grad_input = at::zeros_like(v);
    return {grad_g, grad_input, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Results forward_autograd(const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction,
                         int64_t ignore_index) {
  if (!takes(input, target, or_undefined(weight), reduction)) {
    return {at::nll_loss_nd(input, target, weight, reduction, ignore_index), at::empty({0}, input.options())};
  }
  const bool differentiable = needs_grad({&input});
  Results out = below_autograd(forward_op(), input, target, weight, reduction, ignore_index);
  if (differentiable) {
    const auto node = record<NllLossGrad>({reduction, ignore_index}, input);
    attach(std::get<0>(out), node);
    node->keep(0, input);
    node->keep(1, target);
    node->keep(2, or_undefined(weight));
    node->keep(3, std::get<1>(out));
  }
  return out;
}

Tensor backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptTensor& weight,
                         const Tensor& total_weight, int64_t reduction, int64_t ignore_index) {
  if (needs_grad({&grad_output, &input})) {
    return NllLossBackwardFunction::apply(grad_output, input, target, weight, total_weight, reduction, ignore_index);
  }
  return below_autograd(backward_op(), grad_output, input, target, weight, total_weight, reduction, ignore_index);
}

// ---- autocast: float32, as torch's own policy for the losses --------------------------------------------------------

template <c10::DeviceType kDevice>
Results forward_autocast(const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction,
                         int64_t ignore_index) {
  const NoAutocast guard(kDevice);
  return forward_op().call(autocast_fp32(input, kDevice), target,
                           weight ? OptTensor(autocast_fp32(*weight, kDevice)) : weight, reduction, ignore_index);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "nll_loss(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index) "
      "-> (Tensor loss, Tensor total_weight)");
  m.def(
      "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor total_weight, "
      "int reduction, int ignore_index) -> Tensor");
}

void register_kernels(torch::Library& m) {
  m.impl("nll_loss", forward);
  m.impl("nll_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("nll_loss", forward_autograd);
  m.impl("nll_loss_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) { m.impl("nll_loss", forward_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) { m.impl("nll_loss", forward_autocast<at::kCUDA>); }

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("nll_loss",
         [](const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction,
            int64_t ignore_index) -> Results {
           note_fallback("nll_loss", kTransform);
           return {at::nll_loss_nd(input, target, weight, reduction, ignore_index), at::empty({0}, input.options())};
         });
}

void bind(pybind11::module_& m) {
  def(m, "nll_loss",
      [](const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index) {
        return std::get<0>(forward_op().call(input, target, weight, reduction, ignore_index));
      });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
