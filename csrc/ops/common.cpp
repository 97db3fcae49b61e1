// The shared half of every op: native checks, fallback counts, autocast casts, streams, and the list of bindings.
#include "common.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "kernels/cpu/table.h"
#include "kernels/parallel.h"
#include "memory.h"

namespace fastnn::ops {

// ---- what runs natively --------------------------------------------------------------------------------------------

const char* why_not_native(const Tensor& t, bool has_cuda_kernels) {
  if (!t.defined()) return "undefined tensor";
  if (t.is_cuda()) {
#ifdef FASTNN_CUDA
    if (!has_cuda_kernels) return "no CUDA kernel for this op yet";
#else
    return "CUDA tensor, CPU-only build";
#endif
  } else if (!t.is_cpu()) {
    return "device";
  }
  if (t.layout() != at::kStrided) return "layout";
  switch (t.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf: break;
    default: return "dtype";
  }
  if (t.is_neg() || t.is_nested()) return "lazy negation or nested tensor";
  if (has_tangent(t)) return kForwardMode;
  return nullptr;
}

namespace {

thread_local bool t_enabled = true;  // false inside fastnn.disabled()
thread_local bool t_counting = true;
std::mutex g_fallbacks_mutex;
// Names are looked up as views: a string made for each call showed in layers of 3 us.
using Names = std::pair<std::string_view, std::string_view>;
struct ByName {
  using is_transparent = void;
  bool operator()(const Names& a, const Names& b) const { return a < b; }
};
std::map<std::pair<std::string, std::string>, int64_t, ByName> g_fallbacks;

std::vector<void (*)(pybind11::module_&)>& binders() {
  static std::vector<void (*)(pybind11::module_&)> list;
  return list;
}

}  // namespace

bool enabled() { return t_enabled; }

Uncounted::Uncounted() : before(std::exchange(t_counting, false)) {}
Uncounted::~Uncounted() { t_counting = before; }

void note_fallback(const char* op, const char* reason) {
  if (!t_counting) return;
  std::lock_guard lock(g_fallbacks_mutex);
  const auto known = g_fallbacks.find(Names{op, reason});
  if (known != g_fallbacks.end()) ++known->second;
  else g_fallbacks.emplace(std::pair<std::string, std::string>{op, reason}, 1);
}

bool native(const char* op, std::initializer_list<const Tensor*> tensors, bool has_cuda_kernels) {
  return t_enabled && have_kernels(op, tensors, has_cuda_kernels);
}

bool have_kernels(const char* op, std::initializer_list<const Tensor*> tensors, bool has_cuda_kernels) {
  const Tensor* first = nullptr;
  const char* reason = nullptr;
  for (const Tensor* t : tensors) {
    if (!t->defined()) continue;
    if ((reason = why_not_native(*t, has_cuda_kernels))) break;
    if (!first) first = t;
    else if (t->scalar_type() != first->scalar_type()) reason = "mixed dtypes";
    else if (t->device() != first->device()) reason = "mixed devices";
    if (reason) break;
  }
  if (!reason) return first != nullptr;
  note_fallback(op, reason);
  return false;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_INTERNAL_ASSERT(false, "fastnn: dtype_of a tensor that is not native: ", t.scalar_type());
  }
}

void check(Status status, const char* op) {
  switch (status) {
    case Status::ok: return;
    case Status::unsupported_dtype: TORCH_CHECK(false, "fastnn::", op, ": unsupported dtype");
    case Status::invalid_argument: TORCH_CHECK(false, "fastnn::", op, ": invalid argument reached the kernel");
    case Status::launch_failed: TORCH_CHECK(false, "fastnn::", op, ": CUDA kernel launch failed");
  }
}

CUstream_st* current_stream(const Tensor& t) {
  const c10::impl::VirtualGuardImpl guard(t.device().type());
  return static_cast<CUstream_st*>(guard.getStream(t.device()).native_handle());
}

// ---- dispatch ------------------------------------------------------------------------------------------------------

bool needs_grad(std::initializer_list<const Tensor*> inputs) {
  for (const Tensor* t : inputs) {
    if (!t->defined()) continue;
    if (t->requires_grad() && at::GradMode::is_enabled()) return true;
    if (has_tangent(*t)) return true;
  }
  return false;
}

at::MemoryFormat dense_format(const Tensor& t) {
  return t.dim() == 4 ? t.suggest_memory_format() : at::MemoryFormat::Contiguous;
}

Tensor dense(const Tensor& t) { return contiguous(t, dense_format(t)); }

// ---- autocast ------------------------------------------------------------------------------------------------------

Tensor autocast_lower(const Tensor& t, c10::DeviceType device) {
  return t.defined() ? at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device) : t;
}
Tensor autocast_fp32(const Tensor& t, c10::DeviceType device) {
  return t.defined() ? at::autocast::cached_cast(at::kFloat, t, device) : t;
}

// ---- Python bindings -----------------------------------------------------------------------------------------------

Bindings::Bindings(void (*bind)(pybind11::module_&)) { binders().push_back(bind); }

void bind_all(pybind11::module_& m) {
  for (auto* bind : binders()) bind(m);

  m.def("isa", [] { return std::string(cpu::kernels().isa); });
  m.def("isas", [] {
    std::vector<std::string> names;
    while (const char* name = cpu::usable_isa(int(names.size()))) names.emplace_back(name);
    return names;
  });
  m.def("set_isa", [](const std::string& name) { return cpu::set_isa(name.c_str()); });
  m.def("set_enabled", [](bool enabled) { return std::exchange(t_enabled, enabled); });
  m.def("fallbacks", [] {
    std::lock_guard lock(g_fallbacks_mutex);
    return std::map<std::pair<std::string, std::string>, int64_t>(g_fallbacks.begin(), g_fallbacks.end());
  });
  m.def("clear_fallbacks", [] {
    std::lock_guard lock(g_fallbacks_mutex);
    g_fallbacks.clear();
  });
  m.def("note_fallback",
        [](const std::string& op, const std::string& reason) { note_fallback(op.c_str(), reason.c_str()); });
}

}  // namespace fastnn::ops
