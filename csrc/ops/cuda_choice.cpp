// The choice between fastnn's CUDA kernels and cuDNN and cuBLAS. No entry has been measured on a device yet: the vendor
// is the default where products are large enough for tensor cores to matter.
#include "cuda_choice.h"

#include <ATen/Context.h>

#include <cstdlib>
#include <string_view>

namespace fastnn::ops {
namespace {

struct Choice {
  CudaFamily family;
  bool own[4];  // by DType: f32, f64, bf16, f16
  const char* reason;
};
constexpr Choice kChoices[] = {
    {CudaFamily::conv2d, {false, false, false, false}, "CUDA: cuDNN, until measured"},
    // Plain sums for groups of few channels, against kernels that fill tiles of channels.
    {CudaFamily::depthwise_conv2d, {true, true, false, false}, "CUDA: cuDNN, until measured"},
    {CudaFamily::matmul, {false, false, false, false}, "CUDA: cuBLAS, until measured"},
};

const Choice& choice_of(CudaFamily family) {
  for (const Choice& c : kChoices)
    if (c.family == family) return c;
  return kChoices[0];
}

bool forced() {
  static const bool own = [] {
    const char* value = std::getenv("FASTNN_CUDA_KERNELS");
    return value && std::string_view(value) == "own";
  }();
  return own;
}

}  // namespace

bool own_cuda_kernel(CudaFamily family, DType dtype) { return forced() || choice_of(family).own[int(dtype)]; }

const char* vendor_reason(CudaFamily family) { return choice_of(family).reason; }

bool allows_tf32(CudaFamily family) {
  const at::Context& context = at::globalContext();
  return family == CudaFamily::matmul ? context.allowTF32CuBLAS() : context.allowTF32CuDNN(at::Float32Op::CONV);
}

}  // namespace fastnn::ops
