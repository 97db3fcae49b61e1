// Finds the runs of strided tensors.
#include "strided_runs.h"

#include <c10/util/SmallVector.h>

namespace fastnn::ops {
namespace {

constexpr int64_t kShortestRun = 128;  // a run costs a call of the kernel: a copy of shorter ones costs less

}  // namespace

std::optional<Runs> runs_of(const Tensor& t, const Tensor& dense) {
  if (!t.is_cpu()) return std::nullopt;
  c10::SmallVector<int64_t, 6> order;  // dimensions of more than one element, from the innermost
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    auto at = order.end();
    while (at != order.begin() && dense.stride(at[-1]) > dense.stride(d)) --at;
    order.insert(at, d);
  }
  int64_t length = 1;
  size_t i = 0;
  for (; i < order.size() && t.stride(order[i]) == length; ++i) length *= t.size(order[i]);
  if (i == order.size()) return Runs{length, length};
  const int64_t step = t.stride(order[i]);
  for (int64_t count = 1; i < order.size(); count *= t.size(order[i++]))
    if (t.stride(order[i]) != count * step) return std::nullopt;
  return length < kShortestRun ? std::nullopt : std::optional(Runs{length, step});
}

std::optional<Runs> repeated(Tensor& t) {
  constexpr int64_t kRun = 1 << 12;
  if (!t.is_cpu() || t.numel() <= kRun) return std::nullopt;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) != 0) return std::nullopt;
  t = t.as_strided({kRun}, {0}).contiguous();
  return Runs{kRun, 0};
}

}  // namespace fastnn::ops
