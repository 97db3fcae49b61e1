// fastnn::cross_entropy: torch's cross_entropy_loss on the kernels of kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>

#include "common.h"
#include "loss.h"
#include "grad_node.h"
#include "memory.h"
#include "python_entry.h"

namespace fastnn::ops {
namespace {

using Results = std::tuple<Tensor, Tensor>;    // the loss, and the statistics backward needs
using Gradients = std::tuple<Tensor, Tensor>;  // of input, and of probabilities (undefined when not wanted)
using Forward = Results(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, double);
using Backward = Gradients(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const Tensor&, int64_t,
                           int64_t, double, std::array<bool, 2>);

const auto& forward_op() {
  static const auto op = handle<Forward>("cross_entropy");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<Backward>("cross_entropy_backward");
  return op;
}

bool is_probabilities(const Tensor& input, const Tensor& target) { return input.sym_sizes() == target.sym_sizes(); }
const Tensor& probabilities_or_undefined(const Tensor& input, const Tensor& target) {
  return is_probabilities(input, target) ? target : or_undefined(std::nullopt);
}

// What the kernels compute; torch's own function judges the rest, and raises.
bool fits(const Tensor& input, const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
          double label_smoothing) {
  if (reduction < 0 || reduction > 2 || !(label_smoothing <= 1) || !has_classes(input)) return false;
  if (!is_probabilities(input, target)) return valid_indices(input, target, weight);
  if (!target.is_floating_point() || ignore_index >= 0) return false;
  if (weight.defined() && (weight.dim() != 1 || weight.sym_size(0) != input.sym_size(class_dim(input)))) return false;
  if (weight.defined() && weight.requires_grad() && at::GradMode::is_enabled()) {
    note_fallback("cross_entropy", "gradient of the weight");
    return false;
  }
  return true;
}
bool takes(const Tensor& input, const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
           double label_smoothing) {
  return fits(input, target, weight, reduction, ignore_index, label_smoothing) &&
         native("cross_entropy", {&input, &probabilities_or_undefined(input, target), &weight}, true);
}

CrossEntropyParams params(const Tensor& x, const Tensor& target, const Tensor& weight, int64_t reduction,
                          int64_t ignore_index, double label_smoothing) {
  CrossEntropyParams p{};
  set_shape(p, x);
  p.dtype = dtype_of(x);
  p.input = x.const_data_ptr();
  p.target = target.const_data_ptr();
  p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  p.reduction = Reduction(reduction);
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing > 0 ? label_smoothing : 0;
  p.target_kind = is_probabilities(x, target)         ? TargetKind::probabilities
                  : target.scalar_type() == at::kByte ? TargetKind::uint8
                                                      : TargetKind::int64;
  return p;
}

// Class indices in row order, or probabilities in the memory order of x.
Tensor dense_target(const Tensor& target, const Tensor& x) {
  if (!is_probabilities(x, target) || x.is_contiguous()) return contiguous(target);
  return contiguous(target.movedim(1, -1)).movedim(-1, 1);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// Two to four columns of few classes as rows of contiguous classes, a copy: an outer index alone costs more than its
// columns (forward of 1024x2x2 58 us, copied 27).
Tensor few_columns_as_rows(const Tensor& x) {
  const bool few = x.is_cpu() && x.dim() == 3 && x.is_contiguous() && 2 <= x.size(2) && x.size(2) <= 4 &&
                   x.size(1) <= 16 && x.size(0) >= 64;
  return few ? x.movedim(1, -1).contiguous().movedim(-1, 1) : x;
}

// What takes() has judged. With `gradient`, which may_run_ahead() allows, the gradient for a grad_output of 1 comes
// with the loss.
Results run_forward(const Tensor& input, const Tensor& target_, const Tensor& w, int64_t reduction,
                    int64_t ignore_index, double label_smoothing, Tensor* gradient) {
  const Tensor given = dense_classes(input), x = gradient ? given : few_columns_as_rows(given);
  const Tensor target = dense_target(target_, x), weight = w.defined() ? w.contiguous() : w;
  CrossEntropyParams p = params(x, target, weight, reduction, ignore_index, label_smoothing);
  Tensor loss = fresh(p.reduction == Reduction::none ? row_sizes(x) : c10::DimVector(), x.options());
  Tensor stats = fresh({2 * p.outer * p.inner + 1}, x.options().dtype(accumulator(x)));
  p.loss = loss.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  int64_t blocks = loss_blocks(p.outer, p.classes, p.inner);
#ifdef FASTNN_CUDA
  if (x.is_cuda()) blocks = cuda::cross_entropy_blocks(p);
#endif
  double two_blocks[4];
  Tensor partials;
  p.partials = two_blocks;
  if (p.reduction != Reduction::none && (blocks > 2 || x.is_cuda())) {
    partials = fresh({2 * blocks}, stats.options());
    p.partials = partials.mutable_data_ptr();
  }
  if (gradient) {
    *gradient = fresh_like(x);
    p.grad_input = gradient->mutable_data_ptr();
  }
  bool out_of_range = false;
  if (x.is_cpu()) p.out_of_range = &out_of_range;
  launch(
      "cross_entropy", x, [&] { return cpu::cross_entropy_forward(p); },
      [&](auto s) { return cuda::cross_entropy_forward(p, s); });
  if (out_of_range) raise_out_of_range(target, p.classes, ignore_index);
  return {loss, stats};
}

Results forward(const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction,
                int64_t ignore_index, double label_smoothing) {
  const Tensor& w = or_undefined(weight);
  if (!takes(input, target, w, reduction, ignore_index, label_smoothing)) {
    return {at::cross_entropy_loss(input, target, weight, reduction, ignore_index, label_smoothing),
            at::empty({0}, input.options())};
  }
  return run_forward(input, target, w, reduction, ignore_index, label_smoothing, nullptr);
}

Gradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& target_, const OptTensor& weight_,
                   const Tensor& stats, int64_t reduction, int64_t ignore_index, double label_smoothing,
                   std::array<bool, 2> wanted) {
  const Tensor& w = or_undefined(weight_);
  TORCH_CHECK(have_kernels("cross_entropy_backward",
                           {&grad_output, &input, &probabilities_or_undefined(input, target_), &w}, true) &&
                  fits(input, target_, w, reduction, ignore_index, label_smoothing),
              "fastnn::cross_entropy_backward: arguments of no forward call");
  const Tensor x = dense_classes(input), target = dense_target(target_, x), g = grad_output.contiguous();
  const Tensor weight = w.defined() ? w.contiguous() : w;
  CrossEntropyParams p = params(x, target, weight, reduction, ignore_index, label_smoothing);
  const int64_t rows = p.outer * p.inner;
  TORCH_CHECK(stats.is_contiguous() && stats.scalar_type() == accumulator(x) && stats.numel() == 2 * rows + 1 &&
                  g.numel() == (reduction == 0 ? rows : 1),
              "fastnn::cross_entropy_backward: statistics or gradient of another call");
  p.stats = const_cast<void*>(stats.const_data_ptr());
  p.grad_output = g.const_data_ptr();
  Tensor grad_input, grad_target;
  const bool probabilities = p.target_kind == TargetKind::probabilities;
  if (wanted[0] || !probabilities) {
    grad_input = fresh_like(x);
    p.grad_input = grad_input.mutable_data_ptr();
  }
  if (wanted[1] && probabilities) {
    grad_target = fresh_like(x);
    p.grad_target = grad_target.mutable_data_ptr();
  }
  launch(
      "cross_entropy_backward", x, [&] { return cpu::cross_entropy_backward(p); },
      [&](auto s) { return cuda::cross_entropy_backward(p, s); });
  return {grad_input, grad_target};
}

// ---- autograd ------------------------------------------------------------------------------------------------------

// A CPU tensor that no subclass, transform, tracer or mode looks
// at: its values may be read, and its ops left undispatched.
bool plain(const Tensor& t) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return !t.defined() || (t.key_set() | kPlain) == kPlain;
}

// True when forward may compute the gradient too: one pass over the logits for both, where backward would read them
// again. Not for 16-bit types (a loss scale comes after their rounding), and not where hooks watch what is saved.
bool may_run_ahead(const Tensor& input, const Tensor& target, const Tensor& weight, int64_t reduction,
                   double label_smoothing) {
  return reduction != at::Reduction::None && label_smoothing == 0 && input.requires_grad() && plain(input) &&
         plain(target) && plain(weight) && !is_probabilities(input, target) &&
         (input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble) &&
         !c10::impl::dispatch_mode_enabled() && !at::SavedTensorDefaultHooks::get_hooks(true).has_value();
}

struct CrossEntropyGrad {
  static constexpr const char* kName = "cross_entropy";
  static constexpr size_t kTensors = 5, kAhead = 4;
  static bool ahead(const Tensor& gradient, const Tensor& g) {
    return gradient.defined() && plain(g) && plain(gradient) && !at::GradMode::is_enabled();
  }
  static variable_list backward(const Saved& s, const Tensor& g) {
    if (const Tensor& gradient = s.tensors[kAhead]; ahead(gradient, g)) {
      const double scale = g.scalar_type() == at::kFloat ? *g.const_data_ptr<float>() : g.item().toDouble();
      if (s.again || torch::autograd::get_current_graph_task_keep_graph()) return {gradient.mul(scale), Tensor()};
      if (scale != 1) gradient.mul_(scale);
      return {gradient, Tensor()};
    }
    auto [grad_input, grad_target] =
        backward_op().call(g, s.tensors[0], s.tensors[1], s.optional(2), s.tensors[3], s.data[0].toInt(),
                           s.data[1].toInt(), s.data[2].toDouble(), {s.wants(0), s.wants(1)});
    return {std::move(grad_input), std::move(grad_target)};
  }
};

Results forward_autograd(const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction,
                         int64_t ignore_index, double label_smoothing) {
  if (!takes(input, target, or_undefined(weight), reduction, ignore_index, label_smoothing)) {
    return {at::cross_entropy_loss(input, target, weight, reduction, ignore_index, label_smoothing),
            at::empty({0}, input.options())};
  }
  const bool differentiable = needs_grad({&input, &target});
  Results out;
  Tensor gradient;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (differentiable && may_run_ahead(input, target, or_undefined(weight), reduction, label_smoothing))
      out = run_forward(input, target, or_undefined(weight), reduction, ignore_index, label_smoothing, &gradient);
    else out = forward_op().call(input, target, weight, reduction, ignore_index, label_smoothing);
  }
  if (differentiable) {
    const auto node = record<CrossEntropyGrad>({reduction, ignore_index, label_smoothing}, input, target);
    attach(std::get<0>(out), node);
    node->keep(0, input);
    node->keep(1, target);
    node->keep(2, or_undefined(weight));
    node->keep(3, std::get<1>(out));
    node->keep(4, gradient);
  }
  return out;
}

// The gradients by torch's differentiable operators, for derivatives of backward itself.
Gradients differentiable_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                  const Tensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
                                  std::array<bool, 2> wanted) {
  const int64_t dim = class_dim(input), classes = input.size(dim);
  const double eps = label_smoothing > 0 ? label_smoothing : 0, spread = eps / double(classes);
  const Tensor log_p = at::log_softmax(input, dim);
  c10::DimVector along(input.dim(), 1);
  along[dim] = classes;
  const Tensor w = weight.defined() ? weight.view(along) : Tensor();
  const Tensor g = reduction == at::Reduction::None ? grad_output.unsqueeze(dim) : grad_output;
  Tensor grad_input, grad_target;
  if (is_probabilities(input, target)) {
    const int64_t rows = c10::multiply_integers(row_sizes(input));
    // A mean of no rows is NaN and no function of anything, as torch's.
    const Tensor scale = reduction == at::Reduction::Mean ? (rows ? g : g.detach()) / double(rows) : g;
    Tensor share = target * (1 - eps) + spread;
    if (w.defined()) share = share * w;
    if (wanted[0]) grad_input = scale * (log_p.exp() * share.sum(dim, true) - share);
    if (wanted[1]) {
      grad_target = -(1 - eps) * scale * log_p;
      if (w.defined()) grad_target = grad_target * w;
    }
    return {grad_input, grad_target};
  }
  const Tensor counts = target.ne(ignore_index).unsqueeze(dim);
  const Tensor left_out = counts.logical_not();
  const Tensor index = target.unsqueeze(dim).to(at::kLong).masked_fill(left_out, 0);
  Tensor of_class = counts.to(input.scalar_type());
  if (w.defined()) of_class = of_class * w.expand_as(input).gather(dim, index);
  const Tensor scale = reduction == at::Reduction::Mean ? g / of_class.sum() : g;
  // q: what the probabilities are compared with, each row summing to what multiplies them.
  Tensor q = at::zeros_like(log_p).scatter(dim, index, of_class * (1 - eps));
  if (eps > 0) {
    const Tensor even = spread * counts.to(input.scalar_type());
    q = q + (w.defined() ? even * w : even.expand_as(q));
  }
  // A row that does not count may hold anything: its gradient is zero, not 0 * NaN, and so are its second derivatives
  // by the input. That of a mean of no rows by grad_output is NaN, as torch's.
  grad_input = (scale * (log_p.exp() * q.sum(dim, true) - q).masked_fill(left_out, 0)).masked_fill(left_out, 0);
  return {grad_input, grad_target};
}

Gradients backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                            const OptTensor& weight, const Tensor& stats, int64_t reduction, int64_t ignore_index,
                            double label_smoothing, std::array<bool, 2> wanted) {
  if (needs_grad({&grad_output, &input, &target})) {
    return differentiable_backward(grad_output, input, target, or_undefined(weight), reduction, ignore_index,
                                   label_smoothing, wanted);
  }
  return below_autograd(backward_op(), grad_output, input, target, weight, stats, reduction, ignore_index,
                        label_smoothing, wanted);
}

// ---- autocast: float32, as torch's own policy for the losses --------------------------------------------------------

template <c10::DeviceType kDevice>
Results forward_autocast(const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction,
                         int64_t ignore_index, double label_smoothing) {
  const NoAutocast guard(kDevice);
  return forward_op().call(autocast_fp32(input, kDevice), autocast_fp32(target, kDevice),
                           weight ? OptTensor(autocast_fp32(*weight, kDevice)) : weight, reduction, ignore_index,
                           label_smoothing);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor loss, Tensor stats)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
      "int reduction, int ignore_index, float label_smoothing, bool[2] wanted) -> (Tensor, Tensor)");
}

void register_kernels(torch::Library& m) {
  m.impl("cross_entropy", forward);
  m.impl("cross_entropy_backward", backward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("cross_entropy", forward_autograd);
  m.impl("cross_entropy_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) { m.impl("cross_entropy", forward_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) { m.impl("cross_entropy", forward_autocast<at::kCUDA>); }

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("cross_entropy",
         [](const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
            double label_smoothing) -> Results {
           note_fallback("cross_entropy", kTransform);
           return {at::cross_entropy_loss(input, target, weight, reduction, ignore_index, label_smoothing),
                   at::empty({0}, input.options())};
         });
}

void bind(pybind11::module_& m) {
  def(m, "cross_entropy",
      [](const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
         double label_smoothing) {
        return std::get<0>(forward_op().call(input, target, weight, reduction, ignore_index, label_smoothing));
      });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
