// Activations: every kind, sizes with and without whole packs, misaligned starts, NaN and infinities, in place.
#include "../../csrc/kernels/activation.h"

#include <cmath>

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

constexpr Activation kKinds[] = {Activation::relu, Activation::relu6, Activation::leaky_relu, Activation::sigmoid,
                                 Activation::tanh, Activation::gelu,  Activation::gelu_tanh,  Activation::silu};

void run() {
  for (DType dtype : kDTypes)
    for (Activation kind : kKinds)
      for (int64_t size : {1, 64, 1003})
        for (int skip : {0, 1}) {
          // One value alone is its own scale, and in gelu's tail CUDA's 1 + erf(x) has fewer digits than the CPU
          // kernel.
          Array x = uniform(dtype, size, size == 1 ? 0 : -8, 8, skip), y = output(dtype, size, skip),
                dx = output(dtype, size, skip);
          const Array g = normal(dtype, size, skip);
          if (size > 10) x.set(3, NAN), x.set(5, INFINITY), x.set(6, 0);
          constexpr LineStrides kDense{0, 0, 1};
          ActivationParams p{x.data(), y.data(), g.data(), x.data(), dx.data(), size,   0.1,
                             kind,     dtype,    1,        size,     kDense,    kDense, kDense};
          const std::string name = "activation " + std::to_string(int(kind)) + " " + name_of(dtype);
          check(
              name, {&y}, [&] { return cpu::activation_forward(p); },
              [&] { return cuda::activation_forward(p, nullptr); });
          check(
              name + " backward", {&dx}, [&] { return cpu::activation_backward(p); },
              [&] { return cuda::activation_backward(p, nullptr); });
          p.output = x.data();
          check(
              name + " in place", {&x}, [&] { return cpu::activation_forward(p); },
              [&] { return cuda::activation_forward(p, nullptr); });
        }
}

const Test activation("activation", run);

}  // namespace
