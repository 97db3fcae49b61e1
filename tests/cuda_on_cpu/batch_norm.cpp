// Batch norm: planes and rows of channels, one and many chunks, packed and misaligned, with a residual and ReLU.
#include "../../csrc/kernels/batch_norm.h"

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Shape {
  int64_t batch, channels, inner;
  int skip = 0;
};
constexpr Shape kShapes[] = {{3, 5, 7},  {2, 3, 16},  {2, 2, 16, 1}, {3, 1, 5464}, {1, 2, 8193},  // planes
                             {9, 5, 1},  {40, 24, 1}, {7, 24, 1, 1}, {600, 3, 1},  {530, 8, 1},   {5, 300, 1}};

void run() {
  for (DType dtype : kDTypes)
    for (const Shape& s : kShapes)
      for (int variant = 0; variant < 5; ++variant) {
        // Training; with ReLU and few gradients; with a residual and ReLU; evaluation; bare evaluation.
        const bool training = variant < 3, relu = variant == 1 || variant == 2, residual = variant == 2 || variant == 3;
        const bool bare = variant == 4;
        const DType param = variant == 0 && size_of(dtype) == 2 ? DType::f32 : dtype;
        const DType acc = dtype == DType::f64 ? dtype : DType::f32;
        const int64_t n = s.batch * s.channels * s.inner, c = s.channels;
        Array x = normal(dtype, n, s.skip), y = output(dtype, n, s.skip);
        const Array r = normal(dtype, n, s.skip), g = normal(dtype, n, s.skip);
        for (int64_t i = 0; i < n; ++i) x.set(i, x.at(i) + 30);  // far from 0: squares would cancel
        const Array weight = uniform(param, c, 0.5, 2), bias = normal(param, c);
        Array running_mean = normal(param, c), running_var = uniform(param, c, 0.5, 2);
        Array mean = output(acc, c), invstd = output(acc, c);
        mean.tolerance = invstd.tolerance = running_mean.tolerance = running_var.tolerance = 128;
        BatchNormParams p{};
        p.input = x.data(), p.output = y.data(), p.mean = mean.data(), p.invstd = invstd.data();
        if (residual) p.residual = r.data();
        if (!bare) p.weight = weight.data(), p.bias = bias.data();
        p.running_mean = running_mean.data(), p.running_var = running_var.data();
        p.batch = s.batch, p.channels = c, p.inner = s.inner, p.momentum = 0.1, p.eps = 1e-5;
        p.dtype = dtype, p.param_dtype = param, p.training = training, p.relu = relu;
        const Array cpu_space = index_output<char>(batch_norm_workspace(p));
        const Array cuda_space = index_output<char>(cuda::batch_norm_workspace(p));
        BatchNormParams on_cuda;
        const auto both = [&] { p.workspace = cpu_space.data(), on_cuda = p, on_cuda.workspace = cuda_space.data(); };
        both();
        const std::string name = std::string("batch_norm ") + name_of(dtype) + " " + std::to_string(&s - kShapes) +
                                 " variant " + std::to_string(variant);
        y.tolerance = 256;  // in units of y, of inputs around 30
        check(name, {&y, &mean, &invstd, &running_mean, &running_var}, [&] { return cpu::batch_norm_forward(p); },
              [&] { return cuda::batch_norm_forward(on_cuda, nullptr); });

        cpu::batch_norm_forward(p);
        y.keep(), mean.keep(), invstd.keep();
        Array dx = output(dtype, n, s.skip), dr = output(dtype, n, s.skip), dw = output(param, c), db = output(param, c);
        dx.tolerance = dw.tolerance = db.tolerance = 64;
        p.grad_output = g.data();
        std::vector<Array*> written;
        if (relu) p.result = y.data();
        if (variant != 3) p.grad_input = dx.data(), written.push_back(&dx);
        if (variant != 1 && !bare) p.grad_weight = dw.data(), p.grad_bias = db.data(), written.insert(written.end(), {&dw, &db});
        if (relu && residual) p.grad_residual = dr.data(), written.push_back(&dr);
        both();
        check(name + " backward", written, [&] { return cpu::batch_norm_backward(p); },
              [&] { return cuda::batch_norm_backward(on_cuda, nullptr); });
      }
}

const Test batch_norm("batch_norm", run);

}  // namespace
