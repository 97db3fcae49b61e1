// Finds the lines of strided tensors.
#include "strided_lines.h"

#include <c10/util/SmallVector.h>

namespace fastnn::ops {
namespace {

// A copy costs less of elements farther apart, which lie in cache lines of their own, of lines that do not fill half a
// vector, and of one value for every line where the lines are short.
constexpr int64_t kFarApart = 8, kShortestLine = 8, kShortestOfOneValue = 128;

}  // namespace

std::optional<Lines> lines_of(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  bool dense = true;
  for (const Tensor* t : tensors) dense &= t->is_contiguous();
  if (dense) return Lines{1, first.numel(), {{0, 0, 1}, {0, 0, 1}, {0, 0, 1}}};
  c10::SmallVector<int64_t, 6> order;  // dimensions of more than one element, from the innermost
  for (int64_t d = first.dim() - 1; d >= 0; --d) {
    if (first.size(d) == 1) continue;
    auto at = order.end();
    while (at != order.begin() && first.stride(at[-1]) > first.stride(d)) --at;
    order.insert(at, d);
  }
  // Dimensions that go on where the one before ends, in every tensor, are one.
  struct Level {
    int64_t size = 1, strides[3] = {};
  };
  Level levels[3];
  int count = 0;
  for (const int64_t d : order) {
    Level next{first.size(d), {}};
    bool goes_on = count > 0;
    int i = 0;
    for (const Tensor* t : tensors) {
      next.strides[i] = t->stride(d);
      if (count > 0) goes_on &= next.strides[i] == levels[count - 1].size * levels[count - 1].strides[i];
      ++i;
    }
    if (goes_on) levels[count - 1].size *= next.size;
    else if (count < 3) levels[count++] = next;
    else return std::nullopt;
  }
  Lines lines{levels[1].size, levels[0].size, {}};
  bool gaps = count > 1;
  for (size_t i = 0; i < tensors.size(); ++i) {
    lines.of[i] = {levels[2].strides[i], levels[1].strides[i], count > 0 ? levels[0].strides[i] : 1};
    gaps |= lines.of[i].element != 1;
    const int64_t shortest = lines.of[i].element == 0 ? kShortestOfOneValue : kShortestLine;
    if (lines.of[i].element > kFarApart || (count > 1 && lines.width < shortest)) return std::nullopt;
  }
  return gaps && !first.is_cpu() ? std::nullopt : std::optional(lines);
}

}  // namespace fastnn::ops
