// Shared by the matrix-product ops: a tensor as a strided matrix, and one call of the kernel on such matrices.
#pragma once
#include <c10/util/FunctionRef.h>

#include "common.h"
#include "kernels/gemm.h"

namespace fastnn::ops {

// [rows, cols] with element strides; strides of dimensions of one element are set to what a dense matrix would have.
struct Matrix {
  const void* data;
  int64_t rows, cols, row_stride, col_stride;
  Matrix t() const { return {data, cols, rows, col_stride, row_stride}; }
};

// The last two dimensions of t.
Matrix matrix_of(const Tensor& t);
// t with all dimensions but the last as rows. `keep` holds the copy where t cannot be read in place.
Matrix rows_of(const Tensor& t, Tensor& keep);

// t as a matrix of the same kind, a view where that can be. No flatten(): is_grads_batched has no rule for it.
Tensor as_rows(const Tensor& t);

// out[i] = alpha * a[i] b[i] + beta * d[i] for i < batch. out is dense [batch, a.rows, b.cols]; batch strides of a and
// b may be 0; d (null, or strides of its own) has no batch.
struct Product {
  Matrix a, b;
  void* out;
  DType dtype;
  int64_t batch = 1, a_batch_stride = 0, b_batch_stride = 0;
  const void* d = nullptr;
  int64_t d_row_stride = 0, d_col_stride = 0;
  double alpha = 1, beta = 1;

  // On the device of `like`.
  void run(const char* op, const Tensor& like) const;
  GemmParams params() const;
};

// False, and counted as a fallback, where cuBLAS is the choice for these native tensors. `run` calls the op again.
bool own_cuda_product(const char* op, std::initializer_list<const Tensor*> tensors, c10::function_ref<void()> run,
                      at::IntArrayRef options = {});
inline bool own_product(const char* op, std::initializer_list<const Tensor*> tensors, c10::function_ref<void()> run,
                        at::IntArrayRef options = {}) {
  return !(*tensors.begin())->is_cuda() || own_cuda_product(op, tensors, run, options);
}

}  // namespace fastnn::ops
