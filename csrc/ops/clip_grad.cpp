// fastnn::grads_total_norm and fastnn::scale_grads_: gradient clipping in one read and one read-and-write of all
// gradients.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <limits>

#include "optim.h"

namespace fastnn::ops {
namespace {

std::optional<NormKind> norm_kind(double norm_type) {
  if (norm_type == 2) return NormKind::two;
  if (norm_type == 1) return NormKind::one;
  if (norm_type == std::numeric_limits<double>::infinity()) return NormKind::inf;
  return std::nullopt;
}

// Why the kernels cannot clip these gradients, or null. torch takes the inf-norm of an empty tensor for an error.
const char* why_not_clippable(TensorList grads, double norm_type) {
  if (grads.empty()) return "no gradients";
  const auto kind = norm_kind(norm_type);
  if (!kind) return "norm_type";
  if (const char* reason = why_not_steppable(grads, grads, {}, {})) return reason;
  for (const Tensor& g : grads) {
    if (g.scalar_type() != grads[0].scalar_type()) return "mixed dtypes";
    if (*kind == NormKind::inf && g.numel() == 0) return "infinity norm of an empty tensor";
  }
  return nullptr;
}

Tensor grads_total_norm(TensorList grads, double norm_type) {
  const char* reason = why_not_clippable(grads, norm_type);
  TORCH_CHECK(!reason, "fastnn::grads_total_norm: cannot take these gradients (", reason, ")");
  std::vector<Tensor> dense_copies;
  std::vector<NormTensor> tensors;
  tensors.reserve(grads.size());
  int64_t chunks = 0;
  for (const Tensor& g : grads) {
    const void* data = g.const_data_ptr();
    if (!g.is_non_overlapping_and_dense()) {
      dense_copies.push_back(g.contiguous());
      data = dense_copies.back().const_data_ptr();
    }
    tensors.push_back({data, g.numel(), chunks, dtype_of(g)});
    chunks += ceil_div(g.numel(), kNormChunk);
  }
  NormParams p{};
  p.tensors = tensors.data();
  p.count = int64_t(tensors.size());
  p.chunks = chunks;
  p.kind = *norm_kind(norm_type);
  p.total_dtype = dtype_of(grads[0]);
  const Tensor partial = at::empty({chunks}, grads[0].options().dtype(at::kDouble));
  p.partial = partial.mutable_data_ptr<double>();
  Tensor result = at::empty({}, grads[0].options());
  p.total = result.mutable_data_ptr();
  const auto on_cpu = [&] {
    const Status status = cpu::partial_norms(p);
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const double x = p.partial[i];
      if (p.kind != NormKind::inf) total += x;
      else if (!std::isnan(total) && !(x <= total)) total = x;
    }
    result.fill_(p.kind == NormKind::two ? std::sqrt(total) : total);
    return status;
  };
  launch("grads_total_norm", result, on_cpu, [&](auto stream) { return cuda::total_norm(p, stream); });
  return result;
}

// Multiplies by min(1, max_norm / (total_norm + 1e-6)); NaN stays NaN. On CUDA the device reads the norm.
void scale_grads_(TensorList grads, const Tensor& total_norm, double max_norm) {
  TORCH_CHECK(total_norm.numel() == 1, "fastnn::scale_grads_: total_norm must have one element");
  StepTensors tensors("scale_grads_", grads, grads, {}, {});
  OptimParams p{};
  p.rule = OptimRule::scale;
  double factor = max_norm;
  const bool on_device = total_norm.is_cuda();
  if (on_device) {
    for (const Tensor& g : grads)
      TORCH_CHECK(g.device() == total_norm.device() && g.scalar_type() == total_norm.scalar_type(),
                  "fastnn::scale_grads_: total_norm must be of the gradients' device and dtype");
    p.norm = total_norm.const_data_ptr();
  } else {
    factor = max_norm / (total_norm.item<double>() + 1e-6);
    if (factor > 1) factor = 1;
  }
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].step_size = factor;
  if (on_device || factor != 1) tensors.run(p);
}

const auto& norm_op() {
  static const auto op = handle<Tensor(TensorList, double)>("grads_total_norm");
  return op;
}
const auto& scale_op() {
  static const auto op = handle<void(TensorList, const Tensor&, double)>("scale_grads_");
  return op;
}

void scale_grads_autograd(TensorList grads, const Tensor& total_norm, double max_norm) {
  check_not_leaves(grads);
  at::AutoDispatchBelowAutograd guard;
  scale_op().call(grads, total_norm, max_norm);
}
void scale_grads_inplace(TensorList grads, const Tensor& total_norm, double max_norm) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    scale_op().call(grads, total_norm, max_norm);
  }
  bump_versions(grads);
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("grads_total_norm(Tensor[] grads, float norm_type) -> Tensor");
  m.def("scale_grads_(Tensor(a!)[] grads, Tensor total_norm, float max_norm) -> ()");
}
void register_kernels(torch::Library& m) {
  m.impl("grads_total_norm", grads_total_norm);
  m.impl("scale_grads_", scale_grads_);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("scale_grads_", scale_grads_autograd); }
TORCH_LIBRARY_IMPL(fastnn, ADInplaceOrView, m) { m.impl("scale_grads_", scale_grads_inplace); }

// (None, total norm) after clipping, or (why nothing was changed, None).
std::pair<const char*, OptTensor> clip(const pybind11::list& list, double max_norm, double norm_type,
                                       bool error_if_nonfinite) {
  if (!enabled()) return {"disabled", std::nullopt};
  std::vector<Tensor> grads;
  grads.reserve(list.size());
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) {
    PyObject* const object = PyList_GET_ITEM(list.ptr(), i);
    if (!THPVariable_CheckExact(object)) return {"tensor subclass", std::nullopt};
    grads.push_back(THPVariable_Unpack(object));
  }
  if (const char* reason = why_not_clippable(grads, norm_type)) return {reason, std::nullopt};
  pybind11::gil_scoped_release release;
  at::AutoDispatchBelowAutograd guard;
  const Tensor total = norm_op().call(grads, norm_type);
  if (error_if_nonfinite && !std::isfinite(total.item<double>())) return {"non-finite norm", std::nullopt};
  scale_op().call(grads, total, max_norm);
  return {nullptr, total};
}

void bind(pybind11::module_& m) { m.def("clip_grad_norm_", clip); }
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
