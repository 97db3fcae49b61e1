// Max and average pooling, both layouts: overlapping and disjoint windows, padding, dilation, adaptive, byte and int taps.
#include "../../csrc/kernels/pool2d.h"

#include <cmath>

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Shape {
  int64_t batch, channels, h, w, kernel, stride, padding = 0, dilation = 1;
  int64_t adaptive_h = 0, adaptive_w = 0;
};
constexpr Shape kShapes[] = {
    {2, 3, 8, 8, 2, 2},           {2, 8, 7, 9, 3, 2, 1},        {1, 16, 9, 9, 3, 1, 1, 2}, {1, 5, 6, 7, 3, 2, 1},
    {1, 8, 10, 11, 0, 0, 0, 1, 3, 4}, {2, 8, 6, 6, 0, 0, 0, 1, 1, 1}, {1, 4, 3, 4, 0, 0, 0, 1, 5, 7}, {3, 2, 9, 10, 3, 4},
};

void run() {
  for (DType dtype : kDTypes)
    for (const Shape& s : kShapes)
      for (bool channels_last : {false, true})
        for (bool wide : {false, true}) {
          Pool2dParams p{};
          p.batch = s.batch, p.channels = s.channels, p.dtype = dtype, p.wide = wide, p.channels_last = channels_last;
          p.adaptive = s.adaptive_h > 0;
          const auto axis = [&](int64_t in, int64_t adaptive) {
            if (adaptive) return PoolAxis{in, adaptive, in / adaptive + 2, 1, 0, 1};
            return PoolAxis{in, (in + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1, s.kernel, s.stride,
                            s.padding, s.dilation};
          };
          p.h = axis(s.h, s.adaptive_h), p.w = axis(s.w, s.adaptive_w);
          const int64_t planes = s.batch * s.channels, inputs = planes * s.h * s.w, outputs = planes * p.h.out * p.w.out;
          Array x = normal(dtype, inputs), y = output(dtype, outputs), dx = output(dtype, inputs);
          const Array g = normal(dtype, outputs);
          x.set(inputs / 2, NAN);
          x.set(inputs / 3, -INFINITY);
          x.set(inputs / 4, x.at(inputs / 4 - 1));  // a tie
          Array taps = wide ? index_output<int32_t>(outputs) : index_output<uint8_t>(outputs);
          Array indices = index_output<int64_t>(outputs);
          p.input = x.data(), p.output = y.data(), p.grad_output = g.data(), p.grad_input = dx.data();
          p.offsets = taps.data(), p.indices = indices.data<int64_t>();
          const std::string name = std::string("pool2d ") + name_of(dtype) + (channels_last ? " NHWC " : " NCHW ") +
                                   (wide ? "int " : "byte ") + std::to_string(&s - kShapes);
          check(name + " max", {&y, &taps}, [&] { return cpu::max_pool2d_forward(p); },
                [&] { return cuda::max_pool2d_forward(p, nullptr); });
          cpu::max_pool2d_forward(p);
          taps.keep();
          check(name + " max backward", {&dx}, [&] { return cpu::max_pool2d_backward(p); },
                [&] { return cuda::max_pool2d_backward(p, nullptr); });
          check(name + " indices", {&indices}, [&] { return cpu::max_pool2d_indices(p); },
                [&] { return cuda::max_pool2d_indices(p, nullptr); });
          p.offsets = nullptr;
          check(name + " max without taps", {&y}, [&] { return cpu::max_pool2d_forward(p); },
                [&] { return cuda::max_pool2d_forward(p, nullptr); });
          if (wide || s.dilation > 1) continue;
          for (int64_t divisor : {0, 5}) {
            p.divisor = divisor, p.count_include_pad = divisor == 0 && s.padding == 1;
            check(name + " avg", {&y}, [&] { return cpu::avg_pool2d_forward(p); },
                  [&] { return cuda::avg_pool2d_forward(p, nullptr); });
            check(name + " avg backward", {&dx}, [&] { return cpu::avg_pool2d_backward(p); },
                  [&] { return cuda::avg_pool2d_backward(p, nullptr); });
          }
        }
}

const Test pool2d("pool2d", run);

}  // namespace
