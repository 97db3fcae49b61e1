// What each family defines inside its ISA's own namespace. Everything in this folder lives in that namespace, so that
// a symbol compiled for AVX-512 can never stand in for the baseline's at link time (cmake/check_isa_symbols.cmake).
#pragma once
#include "../../gemm.h"
#include "../../optim.h"
#include "../../softmax.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

int64_t gemm_workspace(const GemmParams& p);
Status gemm(const GemmParams& p);
const char* gemm_algorithm(const GemmParams& p);
Status column_sum(const ColumnSumParams& p);
Status optim_step(const OptimParams& p);
Status partial_norms(const NormParams& p);
Status softmax_forward(const SoftmaxParams& p);
Status softmax_backward(const SoftmaxParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
