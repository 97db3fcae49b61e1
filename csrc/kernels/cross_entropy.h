// Cross-entropy of logits against class indices or class probabilities, forward and backward.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

enum class TargetKind : uint8_t { int64, uint8, probabilities };
enum class Reduction : uint8_t { none, mean, sum };  // in the order of at::Reduction

// A reduced loss is summed block by block: this many neighbouring rows (inner == 1) or columns (of one outer index)
// make a block. It depends on the shape alone, and so do the bits of the sum.
FASTNN_INLINE constexpr int64_t loss_block(int64_t classes, int64_t inner) {
  constexpr int64_t kBlockElements = 1 << 14, kColumns = 512;
  const int64_t rows = kBlockElements / max64(1, classes);
  if (inner > 1) return max64(kColumns, round_up(rows, kColumns));
  return rows < 16 ? max64(1, rows) : round_up(rows, 16);
}
FASTNN_INLINE constexpr int64_t loss_blocks(int64_t outer, int64_t classes, int64_t inner) {
  const int64_t size = loss_block(classes, inner);
  return inner == 1 ? ceil_div(outer, size) : outer * ceil_div(inner, size);
}

// A row is one [classes] vector of logits: rows = outer * inner, counted in the order of [outer, inner].
struct CrossEntropyParams {
  const void* input;        // [outer, classes, inner]
  const void* target;       // [outer, inner] class indices, or [outer, classes, inner] probabilities of input's type
  const void* weight;       // [classes] of input's type, or null
  void* loss;               // forward: [outer, inner] without reduction, one element otherwise
  void* stats;              // forward writes, backward reads: [2 * rows + 1] accumulators: the maximum of every row,
                            // log(sum(exp(x - maximum))) of every row, and the divisor of a mean
  void* partials;           // forward, reduced: [2 * loss_blocks] accumulators of workspace
  bool* out_of_range;       // forward: set when a class index is neither ignore_index nor in [0, classes)
  const void* grad_output;  // backward: like loss
  void* grad_input;         // backward: like input, or null; forward too on the CPU: for a grad_output of 1
  void* grad_target;        // backward: like input, probabilities only, or null
  int64_t outer;
  int64_t classes;
  int64_t inner;
  int64_t ignore_index;
  double label_smoothing;
  TargetKind target_kind;
  Reduction reduction;
  DType dtype;
};

namespace cpu {
Status cross_entropy_forward(const CrossEntropyParams& p);
Status cross_entropy_backward(const CrossEntropyParams& p);
}  // namespace cpu

namespace cuda {
// p.partials is [2 * cross_entropy_blocks(p)] accumulators here. A class index out of range ends the kernel when
// p.out_of_range is null.
int64_t cross_entropy_blocks(const CrossEntropyParams& p);
Status cross_entropy_forward(const CrossEntropyParams& p, CUstream_st* stream);
Status cross_entropy_backward(const CrossEntropyParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
