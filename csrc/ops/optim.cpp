// The shared half of the optimizer ops: which tensors they take, and how their memory is walked.
#include "optim.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>

namespace fastnn::ops {

// ---- checks --------------------------------------------------------------------------------------------------------

namespace {

const char* why_not_like(const Tensor& t, const Tensor& param) {
  if (!t.defined()) return "undefined tensor";
  if (t.scalar_type() != param.scalar_type()) return "mixed dtypes";
  if (t.device() != param.device()) return "mixed devices";
  if (t.layout() != at::kStrided) return "layout";
  if (!t.sizes().equals(param.sizes())) return "mixed shapes";
  if (t.is_neg() || t.is_nested()) return "lazy negation or nested tensor";
  return nullptr;
}

// Tensors of inference mode that torch lets nobody write outside of it.
bool writable(TensorList written) {
  return std::none_of(written.begin(), written.end(), [](const Tensor& t) { return t.is_inference(); }) ||
         c10::InferenceMode::is_enabled();
}

bool overlaps_itself(const Tensor& t) {
  return !t.is_non_overlapping_and_dense() && at::has_internal_overlap(t) == at::MemOverlap::Yes;
}

}  // namespace

const char* why_not_steppable(TensorList params, TensorList grads, StateLists states, TensorList steps) {
  const size_t n = params.size();
  if (grads.size() != n || (!steps.empty() && steps.size() != n)) return "lists of different lengths";
  for (const TensorList& state : states)
    if (!state.empty() && state.size() != n) return "lists of different lengths";
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = params[i];
    if (const char* reason = why_not_native(param, true)) return reason;
    if (param.device() != params[0].device()) return "mixed devices";
    if (const char* reason = why_not_like(grads[i], param)) return reason;
    if (overlaps_itself(param)) return "overlapping memory";
    for (const TensorList& state : states) {
      if (state.empty()) continue;
      if (const char* reason = why_not_like(state[i], param)) return reason;
      if (overlaps_itself(state[i])) return "overlapping memory";
    }
  }
  if (!writable(params) || !writable(steps) || !std::all_of(states.begin(), states.end(), writable))
    return "tensor of inference mode";
  for (const Tensor& step : steps) {
    if (!step.defined() || !step.is_cpu() || step.layout() != at::kStrided || step.numel() != 1) return "step counter";
    if (step.scalar_type() != at::kFloat && step.scalar_type() != at::kDouble) return "step counter";
  }
  return nullptr;
}

// ---- layouts -------------------------------------------------------------------------------------------------------

namespace {

// True when both tensors, of one shape, keep their elements in the same order without gaps.
bool same_memory_order(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  if (!a.is_non_overlapping_and_dense()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

}  // namespace

StepTensors::StepTensors(const char* op, TensorList params, TensorList grads, StateLists states, TensorList steps)
    : op_(op), params_(params), steps_(steps), tensors_(params.size()) {
  const char* reason = why_not_steppable(params, grads, states, steps);
  TORCH_CHECK(!reason, "fastnn::", op, ": cannot step these tensors (", reason, ")");
  int64_t begin = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    OptimTensor& t = tensors_[i];
    t.param = written(param, param);
    t.grad = read(grads[i], param);
    int slot = 0;
    for (const TensorList& state : states) t.state[slot++] = state.empty() ? nullptr : written(state[i], param);
    t.begin = begin;
    t.size = param.numel();
    t.dtype = dtype_of(param);
    begin += t.size;
  }
}

void* StepTensors::written(const Tensor& t, const Tensor& param) {
  if (same_memory_order(t, param)) return t.mutable_data_ptr();
  const Tensor copy = at::empty_like(param).copy_(t);  // dense, in the parameter's order of strides
  write_back_.emplace_back(t, copy);
  return copy.mutable_data_ptr();
}

const void* StepTensors::read(const Tensor& t, const Tensor& param) {
  if (same_memory_order(t, param)) return t.const_data_ptr();
  copies_.push_back(at::empty_like(param).copy_(t));
  return copies_.back().const_data_ptr();
}

double StepTensors::next_step(size_t i) const {
  const Tensor& step = steps_[i];
  if (step.scalar_type() == at::kDouble) return *static_cast<double*>(step.mutable_data_ptr()) += 1;
  return *static_cast<float*>(step.mutable_data_ptr()) += 1;
}

// True when two of the arrays the kernel writes share an element (`decoder.weight.data = encoder.weight.data`).
bool StepTensors::share_memory() const {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const OptimTensor& t : tensors_) {
    const int64_t bytes = t.size * (t.dtype == DType::f64 ? 8 : t.dtype == DType::f32 ? 4 : 2);
    for (const void* array : {static_cast<const void*>(t.param), static_cast<const void*>(t.state[0]),
                              static_cast<const void*>(t.state[1]), static_cast<const void*>(t.state[2])}) {
      const char* p = static_cast<const char*>(array);
      if (p && bytes) ranges.emplace_back(p, p + bytes);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return true;
  return false;
}

void StepTensors::run(OptimParams p) {
  if (tensors_.empty()) return;
  p.tensors = tensors_.data();
  p.count = int64_t(tensors_.size());
  p.total = tensors_.back().begin + tensors_.back().size;
  p.serial = (params_[0].is_cuda() || at::get_num_threads() > 1) && share_memory();
  launch(op_, params_[0], [&] { return cpu::optim_step(p); }, [&](auto s) { return cuda::optim_step(p, s); });
  for (const auto& [destination, copy] : write_back_) destination.copy_(copy);
}

// ---- autograd ------------------------------------------------------------------------------------------------------

void check_not_leaves(TensorList written) {
  if (!at::GradMode::is_enabled()) return;
  for (const Tensor& t : written)
    TORCH_CHECK(!t.requires_grad(), "a leaf Variable that requires grad is being used in an in-place operation.");
}

void bump_versions(TensorList written) {
  for (const Tensor& t : written)
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace fastnn::ops
