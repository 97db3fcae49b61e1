// fastnn::max_pool2d and fastnn::adaptive_max_pool2d. What backward needs of the argmax is one byte an output: the tap
// of its window ("offset"); torch's int64 indices are computed from those when the caller asks for them.
#include <ATen/TensorOperators.h>
#include <ATen/ops/adaptive_max_pool2d.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
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
using Pair = std::tuple<Tensor, Tensor>;

const auto& max_op() {
  static const auto op =
      handle<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>("max_pool2d");
  return op;
}
const auto& offsets_op() {
  static const auto op =
      handle<Pair(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>("max_pool2d_with_offsets");
  return op;
}
const auto& with_indices_op() {
  static const auto op =
      handle<Pair(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>("max_pool2d_with_indices");
  return op;
}
const auto& adaptive_op() {
  static const auto op = handle<Tensor(const Tensor&, IntArrayRef)>("adaptive_max_pool2d");
  return op;
}
const auto& adaptive_offsets_op() {
  static const auto op = handle<Pair(const Tensor&, IntArrayRef)>("adaptive_max_pool2d_with_offsets");
  return op;
}
const auto& adaptive_with_indices_op() {
  static const auto op = handle<Pair(const Tensor&, IntArrayRef)>("adaptive_max_pool2d_with_indices");
  return op;
}
const auto& indices_op() {
  static const auto op =
      handle<Tensor(const Tensor&, SymIntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>(
          "max_pool2d_indices");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, IntArrayRef, IntArrayRef,
                                       IntArrayRef, IntArrayRef, bool)>("max_pool2d_backward");
  return op;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// The maxima, and the offsets when asked for.
Tensor run_forward(const char* name, Pool2dParams& p, const Tensor& input, Tensor* offsets) {
  const Tensor x = dense(input);
  const bool channels_last = is_channels_last(x);
  const auto sizes = with_plane(x.sizes(), p.h.out, p.w.out);
  Tensor y = fresh(sizes, x.options().memory_format(format_of(channels_last)));
  if (offsets) {
    *offsets = fresh(sizes, x.options().dtype(p.wide ? at::kInt : at::kByte).memory_format(format_of(channels_last)));
    p.offsets = offsets->mutable_data_ptr();
  }
  if (y.numel() == 0) return y;
  fill_layout(p, x, channels_last);
  p.input = x.const_data_ptr();
  p.output = y.mutable_data_ptr();
  launch(name, x, [&] { return cpu::max_pool2d_forward(p); }, [&](auto s) { return cuda::max_pool2d_forward(p, s); });
  return y;
}

Tensor max_pool2d(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                  IntArrayRef dilation, bool ceil_mode) {
  Pool2dParams p{};
  if (!native("max_pool2d", {&input}, true) ||
      !fill_windows(p, input.sizes(), {kernel, stride, padding, dilation, ceil_mode}))
    return at::max_pool2d(input, kernel, stride, padding, dilation, ceil_mode);
  return run_forward("max_pool2d", p, input, nullptr);
}

Pair max_pool2d_with_offsets(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                             IntArrayRef dilation, bool ceil_mode) {
  Pool2dParams p{};
  if (!native("max_pool2d", {&input}, true) ||
      !fill_windows(p, input.sizes(), {kernel, stride, padding, dilation, ceil_mode})) {
    at::max_pool2d(input, kernel, stride, padding, dilation, ceil_mode);  // raises torch's error
    TORCH_CHECK(false, "fastnn::max_pool2d_with_offsets: unsupported tensor or windows");
  }
  Tensor offsets;
  Tensor y = run_forward("max_pool2d", p, input, &offsets);
  return {std::move(y), std::move(offsets)};
}

Tensor adaptive_max_pool2d(const Tensor& input, IntArrayRef output_size) {
  Pool2dParams p{};
  if (!native("adaptive_max_pool2d", {&input}, true) || !fill_adaptive(p, input.sizes(), output_size))
    return std::get<0>(at::adaptive_max_pool2d(input, output_size));
  return run_forward("adaptive_max_pool2d", p, input, nullptr);
}

Pair adaptive_max_pool2d_with_offsets(const Tensor& input, IntArrayRef output_size) {
  Pool2dParams p{};
  if (!native("adaptive_max_pool2d", {&input}, true) || !fill_adaptive(p, input.sizes(), output_size)) {
    at::adaptive_max_pool2d(input, output_size);  // raises torch's error
    TORCH_CHECK(false, "fastnn::adaptive_max_pool2d_with_offsets: unsupported tensor or output size");
  }
  Tensor offsets;
  Tensor y = run_forward("adaptive_max_pool2d", p, input, &offsets);
  return {std::move(y), std::move(offsets)};
}

Tensor indices(const Tensor& offsets, IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, bool channels_last) {
  Pool2dParams p{};
  const Windows windows{kernel, stride, padding, dilation, false};
  TORCH_CHECK(fill_backward(p, offsets.sizes(), input_size, windows, channels_last) &&
                  offsets.scalar_type() == (p.wide ? at::kInt : at::kByte),
              "fastnn::max_pool2d_indices: offsets do not fit the windows");
  const Tensor taps = offsets.contiguous(format_of(channels_last));
  Tensor result = at::empty_like(taps, taps.options().dtype(at::kLong));
  p.channels_last = channels_last;
  p.offsets = taps.mutable_data_ptr();
  p.indices = result.mutable_data_ptr<int64_t>();
  launch(
      "max_pool2d_indices", taps, [&] { return cpu::max_pool2d_indices(p); },
      [&](auto s) { return cuda::max_pool2d_indices(p, s); });
  return result;
}

Tensor backward(const Tensor& grad_output, const Tensor& offsets, IntArrayRef input_size, IntArrayRef kernel,
                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool channels_last) {
  Pool2dParams p{};
  const Windows windows{kernel, stride, padding, dilation, false};
  TORCH_CHECK(have_kernels("max_pool2d_backward", {&grad_output}, true) && grad_output.sizes() == offsets.sizes() &&
                  fill_backward(p, offsets.sizes(), input_size, windows, channels_last) &&
                  offsets.scalar_type() == (p.wide ? at::kInt : at::kByte) && offsets.device() == grad_output.device(),
              "fastnn::max_pool2d_backward: gradient and offsets do not fit the windows");
  const auto format = format_of(channels_last);
  const Tensor g = contiguous(grad_output, format), taps = contiguous(offsets, format);
  Tensor dx = fresh(with_plane(g.sizes(), p.h.in, p.w.in), g.options().memory_format(format));
  if (dx.numel() == 0) return dx;
  fill_layout(p, g, channels_last);
  p.grad_output = g.const_data_ptr();
  p.offsets = taps.mutable_data_ptr();
  p.grad_input = dx.mutable_data_ptr();
  launch(
      "max_pool2d_backward", g, [&] { return cpu::max_pool2d_backward(p); },
      [&](auto s) { return cuda::max_pool2d_backward(p, s); });
  return dx;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

struct MaxGrad {
  static constexpr const char* kName = "max_pool2d";
  static constexpr size_t kTensors = 1;
  static constexpr bool kLinear = true;
  static bool names_input(const Tensor&) { return true; }
  static variable_list backward(const Saved& s, const Tensor& g) {
    const c10::SymInt size[] = {s.data[0].toSymInt(), s.data[1].toSymInt()};
    int64_t windows[8];  // kernel, stride, padding, dilation; none when adaptive
    const size_t count = s.data.size() - 3;
    for (size_t i = 0; i < count; ++i) windows[i] = s.data[3 + i].toInt();
    const auto part = [&](size_t i) { return count ? IntArrayRef(windows + 2 * i, 2) : IntArrayRef(); };
    return {backward_op().call(g, s.tensors[0], size, part(0), part(1), part(2), part(3), s.data[2].toBool())};
  }
};

// The node of a call that gave `pooled`, for a plane of the input's size.
void record_max(const Tensor& input, const Pair& pooled, std::initializer_list<int64_t> windows) {
  const auto sizes = input.sym_sizes();
  const auto node = record<MaxGrad>({sizes[sizes.size() - 2], sizes.back(), is_channels_last(input)}, input);
  node->data.append(windows.begin(), windows.end());
  attach(std::get<0>(pooled), node);
  node->keep(0, std::get<1>(pooled));
}

// Backward is linear in grad_output: its own backward picks the same elements out of the gradient's gradient.
struct MaxBackwardFunction : Function<MaxBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& offsets,
                        SymIntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({indices_op().call(offsets, input_size, kernel, stride, padding, dilation, channels_last)});
    return backward_op().call(grad_output, offsets, input_size, kernel, stride, padding, dilation, channels_last);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor at = ctx->get_saved_variables()[0];
    const auto plane_as_row = [](const Tensor& t) {
      const auto sizes = t.sym_sizes();
      std::vector<c10::SymInt> rows(sizes.begin(), sizes.end() - 1);
      rows.back() = rows.back() * sizes.back();
      return t.reshape_symint(rows);  // is_grads_batched has no rule for flatten()
    };
    const Tensor picked = at::gather(plane_as_row(grads[0]), -1, plane_as_row(at)).reshape_symint(at.sym_sizes());
    return {picked, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Pair with_offsets_autograd(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                           IntArrayRef dilation, bool ceil_mode) {
  const bool differentiable = needs_grad({&input});
  Pair pooled = below_autograd(offsets_op(), input, kernel, stride, padding, dilation, ceil_mode);
  if (differentiable) {
    const IntArrayRef step = stride.empty() ? kernel : stride;
    record_max(
        input, pooled,
        {kernel[0], kernel.back(), step[0], step.back(), padding[0], padding.back(), dilation[0], dilation.back()});
  }
  return pooled;
}
Tensor max_pool2d_autograd(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                           IntArrayRef dilation, bool ceil_mode) {
  if (!takes_windows("max_pool2d", input, {kernel, stride, padding, dilation, ceil_mode}))
    return at::max_pool2d(input, kernel, stride, padding, dilation, ceil_mode);
  if (needs_grad({&input}))
    return std::get<0>(with_offsets_autograd(input, kernel, stride, padding, dilation, ceil_mode));
  return below_autograd(max_op(), input, kernel, stride, padding, dilation, ceil_mode);
}

Pair adaptive_with_offsets_autograd(const Tensor& input, IntArrayRef output_size) {
  const bool differentiable = needs_grad({&input});
  Pair pooled = below_autograd(adaptive_offsets_op(), input, output_size);
  if (differentiable) record_max(input, pooled, {});
  return pooled;
}
Tensor adaptive_autograd(const Tensor& input, IntArrayRef output_size) {
  if (!takes_adaptive("adaptive_max_pool2d", input, c10::fromIntArrayRefSlow(output_size)))
    return std::get<0>(at::adaptive_max_pool2d(input, output_size));
  if (needs_grad({&input})) return std::get<0>(adaptive_with_offsets_autograd(input, output_size));
  return below_autograd(adaptive_op(), input, output_size);
}

Tensor backward_autograd(const Tensor& grad_output, const Tensor& offsets, SymIntArrayRef input_size,
                         IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         bool channels_last) {
  if (needs_grad({&grad_output})) {
    return MaxBackwardFunction::apply(grad_output, offsets, input_size, kernel, stride, padding, dilation,
                                      channels_last);
  }
  return below_autograd(backward_op(), grad_output, offsets, input_size, kernel, stride, padding, dilation,
                        channels_last);
}

// ---- with indices: made of the ops above, so autograd follows from theirs -------------------------------------------

Pair max_pool2d_with_indices(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                             IntArrayRef dilation, bool ceil_mode) {
  if (!takes_windows("max_pool2d", input, {kernel, stride, padding, dilation, ceil_mode}))
    return at::max_pool2d_with_indices(input, kernel, stride, padding, dilation, ceil_mode);
  auto [y, offsets] = offsets_op().call(input, kernel, stride, padding, dilation, ceil_mode);
  const auto sizes = input.sym_sizes();
  return {y, indices_op().call(offsets, sizes.slice(sizes.size() - 2), kernel, stride, padding, dilation,
                               is_channels_last(input))};
}

Pair adaptive_max_pool2d_with_indices(const Tensor& input, IntArrayRef output_size) {
  if (!takes_adaptive("adaptive_max_pool2d", input, c10::fromIntArrayRefSlow(output_size)))
    return at::adaptive_max_pool2d(input, output_size);
  auto [y, offsets] = adaptive_offsets_op().call(input, output_size);
  const auto sizes = input.sym_sizes();
  return {y, indices_op().call(offsets, sizes.slice(sizes.size() - 2), {}, {}, {}, {}, is_channels_last(input))};
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  const std::string windows =
      "(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode)";
  m.def(("max_pool2d" + windows + " -> Tensor").c_str());
  m.def(("max_pool2d_with_offsets" + windows + " -> (Tensor, Tensor)").c_str());
  m.def(("max_pool2d_with_indices" + windows + " -> (Tensor, Tensor)").c_str(), max_pool2d_with_indices);
  m.def("adaptive_max_pool2d(Tensor input, int[] output_size) -> Tensor");
  m.def("adaptive_max_pool2d_with_offsets(Tensor input, int[] output_size) -> (Tensor, Tensor)");
  m.def("adaptive_max_pool2d_with_indices(Tensor input, int[] output_size) -> (Tensor, Tensor)",
        adaptive_max_pool2d_with_indices);
  // An empty kernel_size means adaptive windows.
  m.def(
      "max_pool2d_indices(Tensor offsets, SymInt[] input_size, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, bool channels_last) -> Tensor");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[] input_size, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, bool channels_last) -> Tensor");
}

void register_kernels(torch::Library& m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_with_offsets", max_pool2d_with_offsets);
  m.impl("adaptive_max_pool2d", adaptive_max_pool2d);
  m.impl("adaptive_max_pool2d_with_offsets", adaptive_max_pool2d_with_offsets);
  m.impl("max_pool2d_indices", indices);
  m.impl("max_pool2d_backward", backward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("max_pool2d", max_pool2d_autograd);
  m.impl("max_pool2d_with_offsets", with_offsets_autograd);
  m.impl("adaptive_max_pool2d", adaptive_autograd);
  m.impl("adaptive_max_pool2d_with_offsets", adaptive_with_offsets_autograd);
  m.impl("max_pool2d_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("max_pool2d", [](const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                          IntArrayRef dilation, bool ceil_mode) {
    note_fallback("max_pool2d", kTransform);
    return at::max_pool2d(input, kernel, stride, padding, dilation, ceil_mode);
  });
  m.impl("max_pool2d_with_indices", [](const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                       IntArrayRef dilation, bool ceil_mode) {
    note_fallback("max_pool2d", kTransform);
    return at::max_pool2d_with_indices(input, kernel, stride, padding, dilation, ceil_mode);
  });
  m.impl("adaptive_max_pool2d", [](const Tensor& input, IntArrayRef output_size) {
    note_fallback("adaptive_max_pool2d", kTransform);
    return std::get<0>(at::adaptive_max_pool2d(input, output_size));
  });
  m.impl("adaptive_max_pool2d_with_indices", [](const Tensor& input, IntArrayRef output_size) {
    note_fallback("adaptive_max_pool2d", kTransform);
    return at::adaptive_max_pool2d(input, output_size);
  });
}

// kOp: one of the handles above.
template <const auto& (*kOp)()>
auto call_windows() {
  return [](const Tensor& input, const IntPair& kernel, const std::optional<IntPair>& stride, const IntPair& padding,
            const IntPair& dilation, bool ceil_mode) {
    return kOp().call(input, kernel, stride.value_or(kernel), padding, dilation, ceil_mode);
  };
}
template <const auto& (*kOp)()>
auto call_adaptive() {
  return [](const Tensor& input, int64_t h, int64_t w) {
    const int64_t size[] = {h, w};
    return kOp().call(input, size);
  };
}

void bind(pybind11::module_& m) {
  def(m, "max_pool2d", call_windows<max_op>());
  def(m, "max_pool2d_with_indices", call_windows<with_indices_op>());
  def(m, "adaptive_max_pool2d", call_adaptive<adaptive_op>());
  def(m, "adaptive_max_pool2d_with_indices", call_adaptive<adaptive_with_indices_op>());
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
