// fastnn::avg_pool2d and fastnn::adaptive_avg_pool2d: linear maps, so backward needs sizes alone and is each other's
// derivative with forward.
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/avg_pool2d.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "pool2d.h"
#include "grad_node.h"
#include "python_entry.h"
#include "memory.h"

namespace fastnn::ops {
namespace {

using at::IntArrayRef;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using OptInt = std::optional<int64_t>;

const auto& avg_op() {
  static const auto op =
      handle<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool, bool, OptInt)>("avg_pool2d");
  return op;
}
const auto& backward_op() {
  static const auto op =
      handle<Tensor(const Tensor&, SymIntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool, bool, OptInt, bool)>(
          "avg_pool2d_backward");
  return op;
}
const auto& adaptive_op() {
  static const auto op = handle<Tensor(const Tensor&, SymIntArrayRef)>("adaptive_avg_pool2d");
  return op;
}
const auto& adaptive_backward_op() {
  static const auto op = handle<Tensor(const Tensor&, SymIntArrayRef, bool)>("adaptive_avg_pool2d_backward");
  return op;
}

constexpr int64_t kOne[] = {1};

// ---- kernels -------------------------------------------------------------------------------------------------------

Tensor run_forward(const char* name, Pool2dParams& p, const Tensor& input) {
  const Tensor x = dense(input);
  const bool channels_last = is_channels_last(x);
  Tensor y = fresh(with_plane(x.sizes(), p.h.out, p.w.out), x.options().memory_format(format_of(channels_last)));
  if (y.numel() == 0) return y;
  fill_layout(p, x, channels_last);
  p.input = x.const_data_ptr();
  p.output = y.mutable_data_ptr();
  launch(name, x, [&] { return cpu::avg_pool2d_forward(p); }, [&](auto s) { return cuda::avg_pool2d_forward(p, s); });
  return y;
}

Tensor run_backward(const char* name, Pool2dParams& p, const Tensor& grad_output, bool channels_last) {
  const auto format = format_of(channels_last);
  const Tensor g = contiguous(grad_output, format);
  Tensor dx = fresh(with_plane(g.sizes(), p.h.in, p.w.in), g.options().memory_format(format));
  if (dx.numel() == 0) return dx;
  fill_layout(p, g, channels_last);
  p.grad_output = g.const_data_ptr();
  p.grad_input = dx.mutable_data_ptr();
  launch(name, g, [&] { return cpu::avg_pool2d_backward(p); }, [&](auto s) { return cuda::avg_pool2d_backward(p, s); });
  return dx;
}

Tensor avg_pool2d(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                  bool count_include_pad, OptInt divisor) {
  Pool2dParams p{};
  if (!native("avg_pool2d", {&input}, true) || divisor == 0 ||
      !fill_windows(p, input.sizes(), {kernel, stride, padding, kOne, ceil_mode}))
    return at::avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
  p.count_include_pad = count_include_pad;
  p.divisor = divisor.value_or(0);
  return run_forward("avg_pool2d", p, input);
}

Tensor avg_pool2d_backward(const Tensor& grad_output, IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride,
                           IntArrayRef padding, bool ceil_mode, bool count_include_pad, OptInt divisor,
                           bool channels_last) {
  Pool2dParams p{};
  TORCH_CHECK(
      have_kernels("avg_pool2d_backward", {&grad_output}, true) && divisor != 0 && !kernel.empty() &&
          fill_backward(p, grad_output.sizes(), input_size, {kernel, stride, padding, kOne, ceil_mode}, channels_last),
      "fastnn::avg_pool2d_backward: gradient does not fit the windows");
  p.count_include_pad = count_include_pad;
  p.divisor = divisor.value_or(0);
  return run_backward("avg_pool2d_backward", p, grad_output, channels_last);
}

Tensor adaptive_avg_pool2d(const Tensor& input, IntArrayRef output_size) {
  Pool2dParams p{};
  if (!native("adaptive_avg_pool2d", {&input}, true) || !fill_adaptive(p, input.sizes(), output_size))
    return at::adaptive_avg_pool2d(input, output_size);
  return run_forward("adaptive_avg_pool2d", p, input);
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad_output, IntArrayRef input_size, bool channels_last) {
  Pool2dParams p{};
  TORCH_CHECK(have_kernels("adaptive_avg_pool2d_backward", {&grad_output}, true) &&
                  fill_backward(p, grad_output.sizes(), input_size, {{}, {}, {}, {}, false}, channels_last),
              "fastnn::adaptive_avg_pool2d_backward: gradient does not fit the windows");
  return run_backward("adaptive_avg_pool2d_backward", p, grad_output, channels_last);
}

// ---- autograd ------------------------------------------------------------------------------------------------------

struct SavedWindows {
  std::vector<int64_t> values;  // kernel, stride, padding
  OptInt divisor;
  bool ceil_mode, count_include_pad;

  explicit SavedWindows(AutogradContext* ctx)
      : values(ctx->saved_data["windows"].toIntVector()),
        divisor(ctx->saved_data["divisor"].toOptional<int64_t>()),
        ceil_mode(values[6]),
        count_include_pad(values[7]) {}
  IntArrayRef part(size_t i) const { return IntArrayRef(values).slice(2 * i, 2); }
};

void save_windows(AutogradContext* ctx, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                  bool count_include_pad, OptInt divisor) {
  TORCH_CHECK(!kernel.empty() && !padding.empty(), "fastnn::avg_pool2d_backward: gradient does not fit the windows");
  const IntArrayRef step = stride.empty() ? kernel : stride;
  ctx->saved_data["windows"] = std::vector<int64_t>{kernel[0],  kernel.back(),  step[0],   step.back(),
                                                    padding[0], padding.back(), ceil_mode, count_include_pad};
  ctx->saved_data["divisor"] = divisor;
}

struct AvgGrad {
  static constexpr const char* kName = "avg_pool2d";
  static constexpr size_t kTensors = 0;
  static constexpr bool kLinear = true;
  static bool names_input(const Tensor&) { return true; }
  static variable_list backward(const Saved& s, const Tensor& g) {
    const c10::SymInt size[] = {s.data[0].toSymInt(), s.data[1].toSymInt()};
    int64_t v[8];  // kernel, stride, padding, ceil_mode, count_include_pad
    for (int i = 0; i < 8; ++i) v[i] = s.data[4 + i].toInt();
    return {backward_op().call(g, size, IntArrayRef(v, 2), IntArrayRef(v + 2, 2), IntArrayRef(v + 4, 2), v[6], v[7],
                               s.data[3].toOptional<int64_t>(), s.data[2].toBool())};
  }
};

struct AvgBackwardFunction : Function<AvgBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, SymIntArrayRef input_size, IntArrayRef kernel,
                        IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad, OptInt divisor,
                        bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_windows(ctx, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
    return backward_op().call(grad_output, input_size, kernel, stride, padding, ceil_mode, count_include_pad, divisor,
                              channels_last);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const SavedWindows w(ctx);
    return {avg_op().call(grads[0], w.part(0), w.part(1), w.part(2), w.ceil_mode, w.count_include_pad, w.divisor),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

struct AdaptiveAvgGrad {
  static constexpr const char* kName = "adaptive_avg_pool2d";
  static constexpr size_t kTensors = 0;
  static constexpr bool kLinear = true;
  static bool names_input(const Tensor& g) { return g.sym_size(-1) != 1 || g.sym_size(-2) != 1; }  // else a mean
  static variable_list backward(const Saved& s, const Tensor& g) {
    const c10::SymInt size[] = {s.data[0].toSymInt(), s.data[1].toSymInt()};
    return {adaptive_backward_op().call(g, size, s.data[2].toBool())};
  }
};

struct AdaptiveAvgBackwardFunction : Function<AdaptiveAvgBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, SymIntArrayRef input_size,
                        bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto sizes = grad_output.sym_sizes();
    ctx->saved_data["size"] = sizes.slice(sizes.size() - 2);
    return adaptive_backward_op().call(grad_output, input_size, channels_last);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {adaptive_op().call(grads[0], ctx->saved_data["size"].toSymIntVector()), Tensor(), Tensor()};
  }
};

Tensor avg_pool2d_autograd(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                           bool ceil_mode, bool count_include_pad, OptInt divisor) {
  if (!takes_windows("avg_pool2d", input, {kernel, stride, padding, kOne, ceil_mode}) || divisor == 0)
    return at::avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
  const bool differentiable = needs_grad({&input});
  Tensor y = below_autograd(avg_op(), input, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
  if (differentiable) {
    const auto sizes = input.sym_sizes();
    const IntArrayRef step = stride.empty() ? kernel : stride;
    const int64_t flags[] = {ceil_mode, count_include_pad};
    attach(y, record<AvgGrad>({sizes[sizes.size() - 2], sizes.back(), is_channels_last(input), divisor, kernel[0],
                               kernel.back(), step[0], step.back(), padding[0], padding.back(), flags[0], flags[1]},
                              input));
  }
  return y;
}

Tensor backward_autograd(const Tensor& grad_output, SymIntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride,
                         IntArrayRef padding, bool ceil_mode, bool count_include_pad, OptInt divisor,
                         bool channels_last) {
  if (needs_grad({&grad_output})) {
    return AvgBackwardFunction::apply(grad_output, input_size, kernel, stride, padding, ceil_mode, count_include_pad,
                                      divisor, channels_last);
  }
  return below_autograd(backward_op(), grad_output, input_size, kernel, stride, padding, ceil_mode, count_include_pad,
                        divisor, channels_last);
}

Tensor adaptive_autograd(const Tensor& input, SymIntArrayRef output_size) {
  if (!takes_adaptive("adaptive_avg_pool2d", input, output_size))
    return at::adaptive_avg_pool2d_symint(input, output_size);
  const bool differentiable = needs_grad({&input});
  Tensor y = below_autograd(adaptive_op(), input, output_size);
  if (differentiable) {
    const auto sizes = input.sym_sizes();
    attach(y, record<AdaptiveAvgGrad>({sizes[sizes.size() - 2], sizes.back(), is_channels_last(input)}, input));
  }
  return y;
}

Tensor adaptive_backward_autograd(const Tensor& grad_output, SymIntArrayRef input_size, bool channels_last) {
  if (needs_grad({&grad_output})) return AdaptiveAvgBackwardFunction::apply(grad_output, input_size, channels_last);
  return below_autograd(adaptive_backward_op(), grad_output, input_size, channels_last);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "avg_pool2d(Tensor input, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, int[] kernel_size, int[] stride, int[] padding, "
      "bool ceil_mode, bool count_include_pad, int? divisor_override, bool channels_last) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, SymInt[] output_size) -> Tensor");
  m.def("adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, bool channels_last) -> Tensor");
}

void register_kernels(torch::Library& m) {
  m.impl("avg_pool2d", avg_pool2d);
  m.impl("avg_pool2d_backward", avg_pool2d_backward);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d);
  m.impl("adaptive_avg_pool2d_backward", adaptive_avg_pool2d_backward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("avg_pool2d", avg_pool2d_autograd);
  m.impl("avg_pool2d_backward", backward_autograd);
  m.impl("adaptive_avg_pool2d", adaptive_autograd);
  m.impl("adaptive_avg_pool2d_backward", adaptive_backward_autograd);
}

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("avg_pool2d", [](const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                          bool ceil_mode, bool count_include_pad, OptInt divisor) {
    note_fallback("avg_pool2d", kTransform);
    return at::avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
  });
  m.impl("adaptive_avg_pool2d", [](const Tensor& input, SymIntArrayRef output_size) {
    note_fallback("adaptive_avg_pool2d", kTransform);
    return at::adaptive_avg_pool2d_symint(input, output_size);
  });
}

void bind(pybind11::module_& m) {
  def(m, "avg_pool2d",
      [](const Tensor& input, const IntPair& kernel, const std::optional<IntPair>& stride, const IntPair& padding,
         bool ceil_mode, bool count_include_pad, OptInt divisor) {
        return avg_op().call(input, kernel, stride.value_or(kernel), padding, ceil_mode, count_include_pad, divisor);
      });
  def(m, "adaptive_avg_pool2d", [](const Tensor& input, int64_t h, int64_t w) {
    const c10::SymInt size[] = {h, w};
    return adaptive_op().call(input, size);
  });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
