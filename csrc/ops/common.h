// What every op needs: which tensors the kernels take, the dispatcher handle, autograd and autocast helpers, bindings.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "kernels/common.h"

struct CUstream_st;
namespace pybind11 {
class module_;
}

namespace fastnn::ops {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// ---- what runs natively --------------------------------------------------------------------------------------------

// Why the kernels cannot take this tensor, or null when they can: a dense CPU tensor (CUDA too where the family has
// CUDA kernels in this build) of float32, float64, bfloat16 or float16.
const char* why_not_native(const Tensor& t, bool has_cuda_kernels = false);

// True when every given tensor is native, without a forward-mode tangent, and all share one dtype and device. Otherwise
// counts a fallback of `op` to aten under its reason, for fastnn.fallbacks(); the caller then calls the aten op.
bool native(const char* op, std::initializer_list<const Tensor*> tensors, bool has_cuda_kernels = false);
// The same inside fastnn.disabled() too, where the gradient of what was recorded outside is still the kernels'.
bool have_kernels(const char* op, std::initializer_list<const Tensor*> tensors, bool has_cuda_kernels = false);
void note_fallback(const char* op, const char* reason);
// Held while calls are only timed: what they hand to aten is not counted.
struct Uncounted {
  Uncounted();
  ~Uncounted();
  bool before;
};
// Why an op under a transform of torch.func is torch's own: its kernel at FuncTorchDynamicLayerFrontMode, which is
// reached before any transform, hands the call on, since autograd functions written in C++ cannot be transformed.
inline constexpr const char* kTransform = "torch.func transform";
inline constexpr const char* kForwardMode = "forward-mode differentiation";
// False inside fastnn.disabled(), on this thread: native() then is false without counting.
bool enabled();

DType dtype_of(const Tensor& t);

// Turns a kernel's failure into a c10::Error that names the op.
void check(Status status, const char* op);

// The current CUDA stream of the tensor's device.
CUstream_st* current_stream(const Tensor& t);

// Calls the CPU kernel, or the CUDA kernel on the tensor's current stream under its device guard.
template <class Cpu, class Cuda>
void launch(const char* op, const Tensor& t, const Cpu& cpu, const Cuda& cuda) {
  if (t.is_cpu()) return check(cpu(), op);
#ifdef FASTNN_CUDA
  c10::OptionalDeviceGuard guard(t.device());
  check(cuda(current_stream(t)), op);
#else
  check(Status::invalid_argument, op);
#endif
}

// ---- dispatch ------------------------------------------------------------------------------------------------------

// A typed handle of the dispatcher op "fastnn::<name>": static const auto op = handle<Tensor(const Tensor&)>("relu").
template <class Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("fastnn::") + name).c_str(), "")
      .typed<Signature>();
}

// True for a dual number of forward-mode differentiation.
inline bool has_tangent(const Tensor& t) { return t.unsafeGetTensorImpl()->_fw_grad(0, t).defined(); }

// True when autograd has to record a node for a call with these inputs. Forward-mode tangents count: forward ops with
// one run on aten (see native()), a node takes care of those of its output's gradient (GradNode), and a backward op
// called with one runs on aten too, or raises instead of dropping the tangent in silence.
bool needs_grad(std::initializer_list<const Tensor*> inputs);

inline const Tensor& or_undefined(const OptTensor& t) {
  static const Tensor undefined;
  return t.has_value() ? *t : undefined;
}

// The tensor's own dense memory format: channels_last stays, anything else becomes contiguous.
Tensor dense(const Tensor& t);
at::MemoryFormat dense_format(const Tensor& t);

// ---- autocast ------------------------------------------------------------------------------------------------------

// Casts as torch's autocast policies do: to the autocast dtype (matrix products, convolutions) or to float32 (losses,
// softmax). Only floating tensors on the autocast device are touched.
Tensor autocast_lower(const Tensor& t, c10::DeviceType device);
Tensor autocast_fp32(const Tensor& t, c10::DeviceType device);

// Held while an Autocast kernel calls the op again with its arguments cast.
struct NoAutocast : c10::impl::ExcludeDispatchKeyGuard {
  explicit NoAutocast(c10::DeviceType device)
      : ExcludeDispatchKeyGuard(device == at::kCPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA) {}
};

// ---- Python bindings -----------------------------------------------------------------------------------------------

// Each ops file hands its eager entry points to the extension module: `static Bindings bindings(bind_softmax);`
struct Bindings {
  explicit Bindings(void (*bind)(pybind11::module_&));
};
void bind_all(pybind11::module_& m);

}  // namespace fastnn::ops
