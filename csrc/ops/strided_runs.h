// Strided tensors that pointwise kernels read where they lie: as runs of elements next to each other.
#pragma once
#include "common.h"

namespace fastnn::ops {

// In any order of dimensions.
inline bool has_no_gaps(const Tensor& t) { return t.is_contiguous() || t.is_non_overlapping_and_dense(); }

// Elements in runs: `length` next to each other, from one run to the next `step`.
struct Runs {
  int64_t length, step;
};

// The runs of t in the order of `dense`, which has no gaps: slices along one dimension, chunks, gradients of cat. Not
// of a CUDA tensor, nor where they are so short that a copy costs less.
std::optional<Runs> runs_of(const Tensor& t, const Tensor& dense);

// The run of one value seen as many, as the gradient of a sum is: t becomes a run of it, to be read again and again.
std::optional<Runs> repeated(Tensor& t);

}  // namespace fastnn::ops
