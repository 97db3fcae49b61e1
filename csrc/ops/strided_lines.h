// Strided tensors that pointwise kernels read and write where they lie: as planes of lines of evenly spaced elements.
#pragma once
#include "common.h"
#include "kernels/activation.h"

namespace fastnn::ops {

// In any order of dimensions.
inline bool has_no_gaps(const Tensor& t) { return t.is_contiguous() || t.is_non_overlapping_and_dense(); }

// Tensors of one shape seen as [planes, height, width], one set of strides for each, in the order they were given.
struct Lines {
  int64_t height = 1, width = 1;
  LineStrides of[3] = {};
};

// The lines of two or three tensors, in the memory order of the first, whose elements lie next to each other at least
// along some dimension. None where they have more dimensions that do not go on evenly, where a copy costs less, and
// where a CUDA tensor has gaps at all.
std::optional<Lines> lines_of(std::initializer_list<const Tensor*> tensors);

}  // namespace fastnn::ops
