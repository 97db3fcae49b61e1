// The checks cross_entropy and nll_loss share.
#include "loss.h"

#include "common.h"

namespace fastnn::ops {

bool valid_indices(const Tensor& input, const Tensor& target, const Tensor& weight) {
  const auto kind = target.scalar_type();
  if (input.dim() < 1 || (kind != at::kLong && kind != at::kByte) || target.layout() != at::kStrided ||
      target.device() != input.device())
    return false;
  if (weight.defined() && (weight.dim() != 1 || weight.sym_size(0) != input.sym_size(class_dim(input)) ||
                           (weight.requires_grad() && at::GradMode::is_enabled())))
    return false;  // torch has no derivative for the weight: it says so
  if (input.dim() == 1) return target.dim() == 0;
  if (input.dim() > 2 && kind == at::kByte) return false;
  return target.dim() == input.dim() - 1 && target.sym_size(0) == input.sym_size(0) &&
         target.sym_sizes().slice(1) == input.sym_sizes().slice(2);
}

void raise_out_of_range(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const Tensor flat = target.to(at::kLong).contiguous();
  const int64_t* t = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i)
    TORCH_CHECK_INDEX(t[i] == ignore_index || (t[i] >= 0 && t[i] < classes), "Target ", t[i], " is out of bounds.");
}

}  // namespace fastnn::ops
