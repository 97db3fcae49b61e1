// Softmax and log-softmax: short and long rows, packed and misaligned, columns, infinities.
#include "../../csrc/kernels/softmax.h"

#include <cmath>

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Shape {
  int64_t outer, classes, inner;
  int skip = 0;  // elements past a 16-byte boundary
};
constexpr Shape kShapes[] = {{5, 1, 1},     {3, 10, 1},      {9, 32, 1},      {3, 33, 1},   {2, 128, 1}, {2, 130, 1},
                             {2, 1000, 1},  {1, 600, 1},     {2, 1024, 1, 1}, {1, 512, 1},  {1, 64, 1},  {2, 1025, 1},
                             {1, 4096, 1},  {1, 2304, 1, 1}, {2, 7, 3},       {3, 20, 5},   {1, 9, 70},  {2, 100, 33}};

void run() {
  for (DType dtype : kDTypes)
    for (const Shape& s : kShapes)
      for (bool log : {false, true}) {
        const int64_t n = s.outer * s.classes * s.inner;
        Array x = normal(dtype, n, s.skip), y = output(dtype, n, s.skip);
        Array g = normal(dtype, n, s.skip), dx = output(dtype, n, s.skip);
        if (s.classes > 2 * s.inner) x.set(s.classes * s.inner - 1, -INFINITY);
        SoftmaxParams p{x.data(), y.data(), g.data(), y.data(), dx.data(), s.outer, s.classes, s.inner, dtype, log};
        const std::string name = std::string(log ? "log_softmax " : "softmax ") + name_of(dtype) + " " +
                                 std::to_string(s.outer) + "x" + std::to_string(s.classes) + "x" +
                                 std::to_string(s.inner);
        check(name, {&y}, [&] { return cpu::softmax_forward(p); }, [&] { return cuda::softmax_forward(p, nullptr); });
        cpu::softmax_forward(p);
        y.keep();
        check(name + " backward", {&dx}, [&] { return cpu::softmax_backward(p); },
              [&] { return cuda::softmax_backward(p, nullptr); });
      }
  // Rows of -inf, +inf and NaN.
  for (const Shape& s : {Shape{4, 12, 1}, Shape{4, 1100, 1}, Shape{4, 12, 2}}) {
    const int64_t row = s.classes * s.inner;
    Array x = normal(DType::f32, s.outer * row), y = output(DType::f32, s.outer * row);
    for (int64_t i = 0; i < row; ++i) x.set(i, -INFINITY);
    x.set(row + 5, INFINITY);
    x.set(2 * row + 5, NAN);
    SoftmaxParams p{x.data(), y.data(), nullptr, nullptr, nullptr, s.outer, s.classes, s.inner, DType::f32, false};
    check("softmax of infinities", {&y}, [&] { return cpu::softmax_forward(p); },
          [&] { return cuda::softmax_forward(p, nullptr); });
  }
}

const Test softmax("softmax", run);

}  // namespace
