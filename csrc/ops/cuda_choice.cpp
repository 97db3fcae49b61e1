// Reads FASTNN_CUDA_KERNELS, once.
#include "cuda_choice.h"

#include <cstdlib>
#include <string_view>

namespace fastnn::ops {

bool own_cuda_kernels() {
  static const bool own = [] {
    const char* value = std::getenv("FASTNN_CUDA_KERNELS");
    return value && std::string_view(value) == "own";
  }();
  return own;
}

}  // namespace fastnn::ops
