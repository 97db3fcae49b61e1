// What cross_entropy and nll_loss share: how they see their input, and torch's error for a class out of range.
#pragma once
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>

#include "kernels/cross_entropy.h"
#include "memory.h"

namespace fastnn::ops {

// The dimension of the classes: 0 of an unbatched [C], 1 of [N, C, d1, ...].
inline int64_t class_dim(const at::Tensor& t) { return t.dim() == 1 ? 0 : 1; }

// The dtype that losses are summed in.
inline at::ScalarType accumulator(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A row of no classes has no maximum: such calls are left to torch to judge.
inline bool has_classes(const at::Tensor& t) { return t.dim() >= 1 && t.sym_size(class_dim(t)) != 0; }

// True when the classes of every row are contiguous and the rows follow one another, as in channels_last.
inline bool classes_last(const at::Tensor& t) {
  return t.dim() > 2 && !t.is_contiguous() && t.movedim(1, -1).is_contiguous();
}

// The input as the kernels read it: rows of contiguous classes stay, everything else becomes contiguous.
inline at::Tensor dense_classes(const at::Tensor& t) { return classes_last(t) ? t : contiguous(t); }

template <class Params>
void set_shape(Params& p, const at::Tensor& x) {
  p.classes = x.size(class_dim(x));
  const int64_t positions = x.dim() == 1 ? 1 : c10::multiply_integers(x.sizes().slice(2));
  const bool rows = x.dim() <= 2 || !x.is_contiguous();
  p.outer = (x.dim() == 1 ? 1 : x.size(0)) * (rows ? positions : 1);
  p.inner = rows ? 1 : positions;
}

// [N, d1, ...] of an input [N, C, d1, ...].
inline c10::DimVector row_sizes(const at::Tensor& x) {
  c10::DimVector sizes(x.sizes());
  sizes.erase(sizes.begin() + class_dim(x));
  return sizes;
}

// Shapes and dtypes that mean class indices to torch; everything else is left to torch to judge.
bool valid_indices(const at::Tensor& input, const at::Tensor& target, const at::Tensor& weight);

// Raises torch's IndexError for the first target that is neither ignore_index nor a class.
void raise_out_of_range(const at::Tensor& target, int64_t classes, int64_t ignore_index);

}  // namespace fastnn::ops
