// fastnn::conv2d: torch.nn.functional.conv2d and its gradients on the algorithms of kernels/conv2d.h.
#include "conv2d.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "cuda_choice.h"
#include "grad_node.h"
#include "kernels/epilogue.h"
#include "python_entry.h"
#include "memory.h"

namespace fastnn::ops {
namespace {

using at::IntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using Grads = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kName = "conv2d";
constexpr const char* kBackwardName = "conv2d_backward";

const auto& forward_op() {
  static const auto op =
      handle<Tensor(const Tensor&, const Tensor&, const OptTensor&, IntArrayRef, IntArrayRef, IntArrayRef, int64_t)>(
          kName);
  return op;
}
const auto& backward_op() {
  static const auto op = handle<Grads(const Tensor&, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef,
                                      IntArrayRef, int64_t, std::array<bool, 3>)>(kBackwardName);
  return op;
}
Tensor call_forward(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  return forward_op().call(input, weight, bias, a.stride, a.padding, a.dilation, a.groups);
}
Grads call_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Conv2dArguments& a,
                    std::array<bool, 3> mask) {
  return backward_op().call(grad_output, input, weight, a.stride, a.padding, a.dilation, a.groups, mask);
}

// ---- checks and parameters -----------------------------------------------------------------------------------------

// Sizes of the convolution without pointers or strides; nullopt where torch would refuse the arguments (or where they
// are so large that sizes might overflow): the caller then lets torch's own op have them.
std::optional<Conv2dParams> shape_params(const Tensor& input, const Tensor& weight, const OptTensor& bias,
                                         const Conv2dArguments& a) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  if (input.dim() != 4 || weight.dim() != 4 || a.groups < 1) return std::nullopt;
  if (a.stride.size() != 2 || a.padding.size() != 2 || a.dilation.size() != 2) return std::nullopt;
  for (int i = 0; i < 2; ++i) {
    if (a.stride[i] < 1 || a.stride[i] >= kLimit || a.dilation[i] < 1 || a.dilation[i] >= kLimit) return std::nullopt;
    if (a.padding[i] < 0 || a.padding[i] >= kLimit) return std::nullopt;
  }
  Conv2dParams p{};
  p.N = input.size(0), p.C = input.size(1), p.H = input.size(2), p.W = input.size(3);
  p.K = weight.size(0), p.R = weight.size(2), p.S = weight.size(3);
  p.groups = a.groups;
  p.stride_h = a.stride[0], p.stride_w = a.stride[1];
  p.pad_h = a.padding[0], p.pad_w = a.padding[1];
  p.dilation_h = a.dilation[0], p.dilation_w = a.dilation[1];
  for (int64_t size : {p.C, p.H, p.W, p.K, p.R, p.S})
    if (size < 1 || size >= kLimit) return std::nullopt;
  if (p.C % p.groups || weight.size(1) != p.C / p.groups || p.K % p.groups) return std::nullopt;
  const Tensor& b = or_undefined(bias);
  if (b.defined() && (b.dim() != 1 || b.size(0) != p.K)) return std::nullopt;
  const int64_t span_h = (p.R - 1) * p.dilation_h + 1, span_w = (p.S - 1) * p.dilation_w + 1;
  if (span_h > p.H + 2 * p.pad_h || span_w > p.W + 2 * p.pad_w) return std::nullopt;
  p.P = (p.H + 2 * p.pad_h - span_h) / p.stride_h + 1;
  p.Q = (p.W + 2 * p.pad_w - span_w) / p.stride_w + 1;
  return p;
}

// shape_params' verdict. Sizes that a compiler traces as symbols (a dynamic batch) stay symbols here: the batch is
// not looked at, and asking for it as a number would compile a graph for every batch.
bool valid(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  const auto symbolic = [](const Tensor& t) { return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); };
  if (!symbolic(input) && !symbolic(weight)) return shape_params(input, weight, bias, a).has_value();
  if (input.dim() != 4 || weight.dim() != 4 || a.groups < 1) return false;
  if (a.stride.size() != 2 || a.padding.size() != 2 || a.dilation.size() != 2) return false;
  if (weight.sym_size(1) * a.groups != input.sym_size(1) || weight.sym_size(0) % a.groups != 0) return false;
  const Tensor& b = or_undefined(bias);
  if (b.defined() && (b.dim() != 1 || b.sym_size(0) != weight.sym_size(0))) return false;
  for (int i = 0; i < 2; ++i) {
    if (a.stride[i] < 1 || a.dilation[i] < 1 || a.padding[i] < 0) return false;
    if ((weight.sym_size(i + 2) - 1) * a.dilation[i] + 1 > input.sym_size(i + 2) + 2 * a.padding[i]) return false;
  }
  return true;
}

void set_strides(Conv2dParams& p, const Tensor& x, const Tensor& w, IntArrayRef y) {
  p.input_stride_n = x.stride(0), p.input_stride_c = x.stride(1);
  p.input_stride_h = x.stride(2), p.input_stride_w = x.stride(3);
  p.weight_stride_k = w.stride(0), p.weight_stride_c = w.stride(1);
  p.weight_stride_r = w.stride(2), p.weight_stride_s = w.stride(3);
  p.output_stride_n = y[0], p.output_stride_k = y[1], p.output_stride_p = y[2], p.output_stride_q = y[3];
}

// The format of images in and out: channels_last where the input or the weight is, as in torch.
at::MemoryFormat format_of(const Tensor& input, const Tensor& weight) {
  const at::MemoryFormat format = dense_format(input);
  return format == at::MemoryFormat::Contiguous ? dense_format(weight) : format;
}

// The strides of an output that is not allocated yet: it may become torch's own.
std::array<int64_t, 4> output_strides(const Conv2dParams& p, at::MemoryFormat format) {
  const int64_t plane = p.P * p.Q;
  if (format == at::MemoryFormat::ChannelsLast) return {plane * p.K, 1, p.Q * p.K, p.K};
  return {p.K * plane, plane, p.Q, 1};
}

#ifdef FASTNN_CUDA
CudaFamily family_of(const Conv2dParams& p) {
  return cuda::conv2d_few_channels(p) && p.groups > 1 ? CudaFamily::depthwise_conv2d : CudaFamily::conv2d;
}
#endif

// Chooses the algorithm of a pass on these tensors, the first of which is as the kernel will see it: null, or why it is
// torch's own. `run` calls the pass again.
const char* choose(Conv2dParams& p, Conv2dPass pass, [[maybe_unused]] std::initializer_list<const Tensor*> tensors,
                   [[maybe_unused]] c10::function_ref<void()> run) {
  p.pass = pass;
#ifdef FASTNN_CUDA
  if ((*tensors.begin())->is_cuda()) {
    constexpr const char* kNames[] = {"conv2d", "conv2d grad_input", "conv2d grad_weight"};
    const int64_t options[] = {p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, p.groups};
    p.tf32 = allows_tf32(CudaFamily::conv2d);
    const CudaChoice choice = choose_cuda({family_of(p), kNames[int(pass)], tensors, options}, run);
    return choice.own ? nullptr : choice.reason;
  }
#endif
  p.algorithm = cpu::conv2d_choose(p);
  return p.algorithm == Conv2dAlgorithm::aten ? "torch's kernel is faster on this shape" : nullptr;
}

void run(Conv2dParams& p, const Tensor& like, const char* op) {
  Tensor workspace;
  int64_t bytes = like.is_cpu() ? cpu::conv2d_workspace(p) : 0;
#ifdef FASTNN_CUDA
  if (like.is_cuda()) bytes = cuda::conv2d_workspace(p);
#endif
  if (bytes) {
    workspace = fresh({bytes + 64}, like.options().dtype(at::kByte));
    p.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()) + 63) & ~uintptr_t(63));
  }
  launch(op, like, [&] { return cpu::conv2d(p); }, [&](auto s) { return cuda::conv2d(p, s); });
}

Tensor aten_forward(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  return at::conv2d(input, weight, bias, a.stride, a.padding, a.dilation, a.groups);
}

Grads aten_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Conv2dArguments& a,
                    std::array<bool, 3> mask) {
  const int64_t bias_size = weight.dim() ? weight.size(0) : 0;
  return at::convolution_backward(grad_output, input, weight, IntArrayRef(bias_size), a.stride, a.padding, a.dilation,
                                  false, {0, 0}, a.groups, mask);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

Tensor forward(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  if (input.dim() == 3) {
    const Tensor batch = input.unsqueeze(0);
    if (shape_params(batch, weight, bias, a)) return forward(batch, weight, bias, a).squeeze(0);
  }
  auto shape = shape_params(input, weight, bias, a);
  if (!shape || !native(kName, {&input, &weight, &or_undefined(bias)}, true))
    return aten_forward(input, weight, bias, a);
  Conv2dParams& p = *shape;
  const at::MemoryFormat format = format_of(input, weight);
  const Tensor x = input.contiguous(format);
  const auto output = [&] { return fresh({p.N, p.K, p.P, p.Q}, x.options().memory_format(format)); };
  if (p.N == 0) return at::mul(input, 0).view({0, p.K, p.P, p.Q});  // as torch does it, which decides the layout
  p.dtype = dtype_of(x);
  set_strides(p, x, weight, output_strides(p, format));
  const auto again = [&] { forward(x, weight, bias, a); };
  if (const char* reason = choose(p, Conv2dPass::forward, {&x, &weight, &or_undefined(bias)}, again)) {
    note_fallback(kName, reason);
    return aten_forward(x, weight, bias, a).contiguous(format);
  }
  Tensor y = output();
  const Tensor b = or_undefined(bias).defined() ? bias->contiguous() : Tensor();
  p.input = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = b.defined() ? b.const_data_ptr() : nullptr;
  p.output = y.mutable_data_ptr();
  run(p, x, kName);
  return y;
}

Grads backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Conv2dArguments& a,
               std::array<bool, 3> mask) {
  auto shape = shape_params(input, weight, std::nullopt, a);
  if (!shape || grad_output.sizes() != IntArrayRef({shape->N, shape->K, shape->P, shape->Q}) ||
      !native(kBackwardName, {&grad_output, &input, &weight}, true))
    return aten_backward(grad_output, input, weight, a, mask);
  Conv2dParams& p = *shape;
  const at::MemoryFormat format = format_of(input, weight);
  const Tensor x = input.contiguous(format);
  const Tensor g = grad_output.contiguous(format);
  p.dtype = dtype_of(x);
  Grads grads;
  auto& [grad_input, grad_weight, grad_bias] = grads;
  if (p.N == 0) {
    if (mask[0]) grad_input = at::empty_like(input);
    if (mask[1]) grad_weight = at::zeros_like(weight, dense_format(weight));
    if (mask[2]) grad_bias = at::zeros({p.K}, x.options());
    return grads;
  }
  set_strides(p, x, weight, g.strides());
  // Why a gradient is torch's, or null.
  const auto vendor = [&](Conv2dPass pass) {
    const bool input_alone = pass == Conv2dPass::grad_input;
    const auto again = [&] { backward(g, x, weight, a, {input_alone, !input_alone, !input_alone && mask[2]}); };
    return choose(p, pass, {&g, &x, &weight}, again);
  };
  if (const char* reason = nullptr;
      mask[0] && mask[1] && (reason = vendor(Conv2dPass::grad_input)) && vendor(Conv2dPass::grad_weight)) {
    // Both gradients by torch: in one call, so that it reorders grad_output once.
    note_fallback(kBackwardName, reason);
    std::tie(grad_input, grad_weight, grad_bias) = aten_backward(g, x, weight, a, mask);
    grad_input = grad_input.contiguous(format);
    grad_weight = grad_weight.contiguous(dense_format(weight));
    return grads;
  }
  p.grad_output = g.const_data_ptr();
  if (mask[0]) {
    grad_input = fresh_like(x, format);
    set_strides(p, grad_input, weight, g.strides());
    p.weight = weight.const_data_ptr();
    if (const char* reason = vendor(Conv2dPass::grad_input); !reason) {
      p.grad_input = grad_input.mutable_data_ptr();
      run(p, x, kBackwardName);
    } else {
      note_fallback(kBackwardName, reason);
      grad_input = Tensor();
      grad_input = std::get<0>(aten_backward(g, x, weight, a, {true, false, false})).contiguous(format);
    }
  }
  if (mask[2]) grad_bias = at::empty({p.K}, x.options());
  if (mask[1]) {
    grad_weight = fresh_like(weight, dense_format(weight));
    set_strides(p, x, grad_weight, g.strides());
    if (const char* reason = vendor(Conv2dPass::grad_weight); !reason) {
      p.input = x.const_data_ptr();
      p.grad_weight = grad_weight.mutable_data_ptr();
      p.grad_bias = mask[2] ? grad_bias.mutable_data_ptr() : nullptr;
      run(p, x, kBackwardName);
    } else {
      note_fallback(kBackwardName, reason);
      auto [_, dw, db] = aten_backward(g, x, weight, a, {false, true, mask[2]});
      grad_weight = dw.contiguous(dense_format(weight));
      grad_bias = db;
    }
  } else if (mask[2]) {
    set_strides(p, x, weight, g.strides());
    p.grad_bias = grad_bias.mutable_data_ptr();
    launch(
        kBackwardName, x, [&] { return cpu::conv2d_grad_bias(p); },
        [&](auto s) { return cuda::conv2d_grad_bias(p, s); });
  }
  return grads;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

// The arguments in seven numbers that a graph saves, and back, as long as those live.
std::vector<int64_t> pack(const Conv2dArguments& a) {
  return {a.stride[0], a.stride[1], a.padding[0], a.padding[1], a.dilation[0], a.dilation[1], a.groups};
}
Conv2dArguments unpack(const int64_t* v) { return {{v, 2}, {v + 2, 2}, {v + 4, 2}, v[6]}; }

struct Conv2dGrad {
  static constexpr const char* kName = "conv2d";
  static constexpr size_t kTensors = 2;
  static variable_list backward(const Saved& s, const Tensor& g) {
    int64_t v[7];
    for (int i = 0; i < 7; ++i) v[i] = s.data[i].toInt();
    auto [dx, dw, db] = call_backward(g, s.tensors[0], s.tensors[1], unpack(v), {s.wants(0), s.wants(1), s.wants(2)});
    return {std::move(dx), std::move(dw), std::move(db)};
  }
};

// Spreads the values of the gradients that `mask` asks for over all three places.
template <class Values>
std::array<Tensor, 3> spread(const Values& values, std::array<bool, 3> mask) {
  std::array<Tensor, 3> all;
  size_t next = 0;
  for (int i = 0; i < 3; ++i)
    if (mask[i]) all[i] = values[next++];
  return all;
}

// All three gradients are linear in grad_output, and bilinear in it and input or weight, so their derivatives are
// convolutions again. Outputs are the wanted gradients alone: autograd takes no undefined ones.
struct Conv2dBackwardFunction : Function<Conv2dBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const Tensor& weight, const Conv2dArguments& a, std::array<bool, 3> mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_output, input, weight});
    ctx->saved_data["args"] = pack(a);
    ctx->saved_data["mask"] = int64_t(mask[0]) | int64_t(mask[1]) << 1 | int64_t(mask[2]) << 2;
    const auto [grad_input, grad_weight, grad_bias] = call_backward(grad_output, input, weight, a, mask);
    variable_list wanted;
    for (const Tensor* t : {&grad_input, &grad_weight, &grad_bias})
      if (t->defined()) wanted.push_back(*t);
    return wanted;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &input = saved[1], &weight = saved[2];
    const int64_t mask = ctx->saved_data["mask"].toInt();
    const auto [v_input, v_weight, v_bias] = spread(grads, {bool(mask & 1), bool(mask & 2), bool(mask & 4)});
    const auto numbers = ctx->saved_data["args"].toIntVector();
    const Conv2dArguments a = unpack(numbers.data());
    Tensor grad_g, grad_input, grad_weight;
    if (ctx->needs_input_grad(0)) {
      if (v_weight.defined())
        grad_g = call_forward(input, v_weight, v_bias.defined() ? OptTensor(v_bias) : std::nullopt, a);
      else if (v_bias.defined()) grad_g = v_bias.view({1, -1, 1, 1}).expand_as(g);
      if (v_input.defined()) {
        const Tensor part = call_forward(v_input, weight, std::nullopt, a);
        grad_g = grad_g.defined() ? grad_g + part : part;
      }
    }
    if (ctx->needs_input_grad(1) && v_weight.defined())
      grad_input = std::get<0>(call_backward(g, input, v_weight, a, {true, false, false}));
    if (ctx->needs_input_grad(2) && v_input.defined())
      grad_weight = std::get<1>(call_backward(g, v_input, weight, a, {false, true, false}));
    return {grad_g, grad_input, grad_weight, Tensor(), Tensor()};
  }
};

Tensor forward_autograd(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  if (input.dim() == 3) {
    const Tensor batch = input.unsqueeze(0);
    if (valid(batch, weight, bias, a)) return forward_autograd(batch, weight, bias, a).squeeze(0);
  }
  const Tensor& b = or_undefined(bias);
  if (!valid(input, weight, bias, a) || !native(kName, {&input, &weight, &b}, true))
    return aten_forward(input, weight, bias, a);
  const bool differentiable = needs_grad({&input, &weight, &b});
  Tensor output = below_autograd(forward_op(), input, weight, bias, a.stride, a.padding, a.dilation, a.groups);
  if (differentiable) {
    const auto node = record<Conv2dGrad>(
        {a.stride[0], a.stride[1], a.padding[0], a.padding[1], a.dilation[0], a.dilation[1], a.groups}, input, weight,
        b);
    attach(output, node);
    node->keep(0, input);
    node->keep(1, weight);
  }
  return output;
}

Grads backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Conv2dArguments& a,
                        std::array<bool, 3> mask) {
  if (!valid(input, weight, std::nullopt, a)) return aten_backward(grad_output, input, weight, a, mask);
  if (has_tangent(grad_output) || has_tangent(input) || has_tangent(weight)) {
    note_fallback(kBackwardName, kForwardMode);
    return aten_backward(grad_output, input, weight, a, mask);
  }
  if ((mask[0] || mask[1] || mask[2]) && needs_grad({&grad_output, &input, &weight})) {
    // Whether the derivatives of no images are zeros or none differs from case to case, and is torch's to say.
    if (TORCH_GUARD_OR_FALSE(input.sym_size(0).sym_eq(0))) return aten_backward(grad_output, input, weight, a, mask);
    const auto [dx, dw, db] = spread(Conv2dBackwardFunction::apply(grad_output, input, weight, a, mask), mask);
    return {dx, dw, db};
  }
  return below_autograd(backward_op(), grad_output, input, weight, a.stride, a.padding, a.dilation, a.groups, mask);
}

// ---- autocast: convolutions run in the autocast dtype ---------------------------------------------------------------

template <c10::DeviceType kDevice>
Tensor forward_autocast(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  const NoAutocast guard(kDevice);
  OptTensor b = bias;
  if (or_undefined(bias).defined()) b = autocast_lower(*bias, kDevice);
  return call_forward(autocast_lower(input, kDevice), autocast_lower(weight, kDevice), b, a);
}

Tensor transformed(const Tensor& input, const Tensor& weight, const OptTensor& bias, const Conv2dArguments& a) {
  note_fallback(kName, kTransform);
  return aten_forward(input, weight, bias, a);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups)"
      " -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

// A kernel as the dispatcher calls it.
template <Tensor (*kKernel)(const Tensor&, const Tensor&, const OptTensor&, const Conv2dArguments&)>
Tensor forward_kernel(const Tensor& input, const Tensor& weight, const OptTensor& bias, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  return kKernel(input, weight, bias, {stride, padding, dilation, groups});
}
template <Grads (*kKernel)(const Tensor&, const Tensor&, const Tensor&, const Conv2dArguments&, std::array<bool, 3>)>
Grads backward_kernel(const Tensor& grad_output, const Tensor& input, const Tensor& weight, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::array<bool, 3> mask) {
  return kKernel(grad_output, input, weight, {stride, padding, dilation, groups}, mask);
}

void register_kernels(torch::Library& m) {
  m.impl("conv2d", forward_kernel<forward>);
  m.impl("conv2d_backward", backward_kernel<backward>);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("conv2d", forward_kernel<forward_autograd>);
  m.impl("conv2d_backward", backward_kernel<backward_autograd>);
}

TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) { m.impl("conv2d", forward_kernel<forward_autocast<at::kCPU>>); }
TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) { m.impl("conv2d", forward_kernel<forward_autocast<at::kCUDA>>); }

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) { m.impl("conv2d", forward_kernel<transformed>); }

// The name of the algorithm a pass ("forward", "grad_input" or "grad_weight") takes for these tensors.
std::string algorithm(const Tensor& input, const Tensor& weight, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                      const std::string& pass) {
  auto p = shape_params(input, weight, std::nullopt, {stride, padding, dilation, groups});
  if (!p || why_not_native(input) || why_not_native(weight) || p->N == 0) return "aten";
  TORCH_CHECK(pass == "forward" || pass == "grad_input" || pass == "grad_weight", "unknown pass: ", pass);
  const at::MemoryFormat format = format_of(input, weight);
  const Tensor x = input.contiguous(format);
  p->dtype = dtype_of(x);
  set_strides(*p, x, weight, output_strides(*p, format));
  choose(*p,
         pass == "forward"      ? Conv2dPass::forward
         : pass == "grad_input" ? Conv2dPass::grad_input
                                : Conv2dPass::grad_weight,
         {&x}, [] {});
  return conv2d_algorithm_name(p->algorithm);
}

void bind(pybind11::module_& m) {
  def(m, "conv2d",
      [](const Tensor& input, const Tensor& weight, const OptTensor& bias, const IntPair& stride,
         const IntPair& padding, const IntPair& dilation,
         int64_t groups) { return call_forward(input, weight, bias, {stride, padding, dilation, groups}); });
  m.def("conv2d_algorithm", algorithm);
  m.def("conv2d_set_strict", cpu::conv2d_set_strict);
  m.def("conv2d_force", [](const std::string& name) { return cpu::conv2d_force(name.c_str()); });
}
const Bindings bindings(bind);

}  // namespace

// ---- with what follows it joined, for frozen layers on CUDA ---------------------------------------------------------

#ifdef FASTNN_CUDA
OptTensor conv2d_epilogue(const Tensor& input, const Tensor& weight, const OptTensor& bias, const OptTensor& residual,
                          float low, float high, const Conv2dArguments& a) {
  const Tensor& added = or_undefined(residual);
  auto shape = shape_params(input, weight, bias, a);
  if (!shape || !native(kName, {&input, &weight, &or_undefined(bias), &added}, true)) return std::nullopt;
  Conv2dParams& p = *shape;
  if (p.N == 0 || (added.defined() && added.sizes() != IntArrayRef({p.N, p.K, p.P, p.Q}))) return std::nullopt;
  const at::MemoryFormat format = format_of(input, weight);
  const Tensor x = input.contiguous(format);
  const Epilogue e{nullptr, nullptr, low > -INFINITY || high < INFINITY, low, high};
  p.dtype = dtype_of(x);
  p.tf32 = allows_tf32(CudaFamily::conv2d);
  const int64_t options[] = {p.stride_h,   p.stride_w,   p.pad_h,  p.pad_w,
                             p.dilation_h, p.dilation_w, p.groups, int64_t(e.clamps)};
  const auto again = [&] { conv2d_epilogue(x, weight, bias, residual, low, high, a); };
  const CudaChoice choice =
      choose_cuda({family_of(p), "conv2d fused", {&x, &weight, &or_undefined(bias), &added}, options}, again);
  if (!choice.own) {
    note_fallback(kName, choice.reason);
    Tensor y = aten_forward(x, weight, bias, a).contiguous(format);
    if (added.defined()) y.add_(added);
    return e.clamps ? y.clamp_(low, high) : y;
  }
  const Tensor y = fresh({p.N, p.K, p.P, p.Q}, x.options().memory_format(format));
  const Tensor b = or_undefined(bias).defined() ? bias->contiguous() : Tensor();
  const Tensor r = added.defined() ? added.contiguous(format) : Tensor();
  set_strides(p, x, weight, y.strides());
  p.pass = Conv2dPass::forward;
  p.input = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = b.defined() ? b.const_data_ptr() : nullptr;
  p.output = y.mutable_data_ptr();
  Epilogue joined = e;
  joined.residual = r.defined() ? r.const_data_ptr() : nullptr;
  const auto none = [] { return Status::invalid_argument; };
  launch(kName, x, none, [&](auto s) { return cuda::conv2d(p, joined, s); });
  return y;
}
#else
OptTensor conv2d_epilogue(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, float, float,
                          const Conv2dArguments&) {
  return std::nullopt;
}
#endif

}  // namespace fastnn::ops
