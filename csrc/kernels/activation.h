// Pointwise activations, forward and backward.
#pragma once
#include "common.h"

struct CUstream_st;

namespace fastnn {

enum class Activation : uint8_t { relu, relu6, leaky_relu, sigmoid, tanh, gelu, gelu_tanh, silu };

// gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kGeluCubic = 0.044715;

// From one of its neighbours to the next, in elements, of a tensor [planes, height, width].
struct LineStrides {
  int64_t plane, line, element;
};

// On CUDA the elements lie next to each other: height is 1 and width is size.
struct ActivationParams {
  const void* input;        // forward
  void* output;             // forward; may be the input
  const void* grad_output;  // backward
  const void* saved;        // backward: the output of relu, sigmoid and tanh, either for relu6, the input of the others
  void* grad_input;         // backward
  int64_t size;
  double slope;  // leaky_relu below zero
  Activation kind;
  DType dtype;
  int64_t height, width;
  LineStrides of_x, of_y, of_g;  // input or saved; output or grad_input; grad_output
};

namespace cpu {
Status activation_forward(const ActivationParams& p);
Status activation_backward(const ActivationParams& p);
}  // namespace cpu

namespace cuda {
Status activation_forward(const ActivationParams& p, CUstream_st* stream);
Status activation_backward(const ActivationParams& p, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastnn
