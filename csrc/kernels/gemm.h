// Matrix products: C = act(alpha * A B + beta * D), batched, for any strides.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

struct GemmParams {
  const void* a;    // [batch, m, k]
  const void* b;    // [batch, k, n]
  const void* d;    // [batch, m, n] by its strides (0 broadcasts: a bias), or null; must not overlap c
  void* c;          // [batch, m, n]
  void* workspace;  // gemm_workspace() bytes, 64-byte aligned; may be null when that is 0
  int64_t batch, m, n, k;
  int64_t a_stride_batch, a_stride_m, a_stride_k;
  int64_t b_stride_batch, b_stride_k, b_stride_n;
  int64_t c_stride_batch, c_stride_m, c_stride_n;
  int64_t d_stride_batch, d_stride_m, d_stride_n;
  double alpha, beta;
  bool relu;
  bool tf32;  // CUDA, float32: the operands may be rounded to tf32
  DType dtype;
};

// y[c] = sum over rows of x[r, c]: a bias gradient.
struct ColumnSumParams {
  const void* x;  // [rows, columns]
  void* y;        // [columns]
  int64_t rows, columns;
  int64_t x_stride_row, x_stride_column;
  DType dtype;
};

constexpr int64_t kGemmMaxWorkspace = 32 << 20;  // bytes

namespace cpu {
// Bytes gemm() needs, kGemmMaxWorkspace at most; a function of the sizes, the strides and the number of threads.
int64_t gemm_workspace(const GemmParams& p);
Status gemm(const GemmParams& p);
// What gemm() would run, for reports: "dot", "rows", "outer", "in place", "by columns" or "packed".
const char* gemm_algorithm(const GemmParams& p);
Status column_sum(const ColumnSumParams& p);
}  // namespace cpu

namespace cuda {
int64_t gemm_workspace(const GemmParams& p);
Status gemm(const GemmParams& p, CUstream_st* stream);
Status column_sum(const ColumnSumParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
