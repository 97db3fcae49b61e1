// Convolution, all three passes: layouts, strides, padding, dilation, groups, depthwise, splits of the batch.
#include "../../csrc/kernels/epilogue.h"

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Shape {
  int64_t N, C, H, W, K, R, S, stride = 1, pad = 0, dilation = 1, groups = 1;
};
constexpr Shape kShapes[] = {
    {2, 3, 8, 9, 5, 3, 3},              // few channels of both kinds
    {1, 8, 7, 7, 70, 3, 2, 1, 1},       // more output channels than a tile
    {2, 20, 6, 6, 6, 1, 1},             // pointwise
    {2, 6, 9, 8, 10, 3, 3, 2, 1},       // stride
    {1, 5, 9, 9, 6, 3, 3, 1, 2, 2},     // dilation
    {2, 12, 5, 5, 16, 3, 3, 1, 1, 1, 2},  // groups
    {2, 6, 7, 7, 6, 3, 3, 1, 1, 1, 6},  // depthwise
    {1, 33, 5, 11, 33, 3, 3, 2, 1, 1, 33},  // depthwise by several tiles of channels and columns, in steps of 2
    {2, 3, 34, 7, 3, 5, 5, 1, 2, 1, 3},  // 5x5
    {2, 3, 8, 11, 3, 5, 5, 2, 0, 1, 3},  // 5x5 in steps of 2, a last row and column that no window covers
    {2, 6, 7, 7, 6, 3, 3, 1, 2, 2, 6},  // depthwise and dilated
    {1, 4, 6, 6, 8, 3, 3, 2, 1, 1, 4},  // depthwise with a multiplier
    {2, 33, 6, 6, 34, 1, 1},            // large enough for float32 split on tensor cores
    {40, 5, 7, 7, 6, 2, 2},             // a batch worth splitting for the weights' gradient
};

void run() {
  for (DType dtype : kDTypes)
    for (const Shape& s : kShapes)
      for (int variant : {0, 1, 2, 3}) {
        const bool channels_last = variant & 1, tf32 = variant & 2;
        if (tf32 && dtype != DType::f32) continue;
        Conv2dParams p{};
        p.tf32 = tf32;
        p.N = s.N, p.C = s.C, p.H = s.H, p.W = s.W, p.K = s.K, p.R = s.R, p.S = s.S;
        p.stride_h = p.stride_w = s.stride, p.pad_h = p.pad_w = s.pad, p.dilation_h = p.dilation_w = s.dilation;
        p.groups = s.groups, p.dtype = dtype, p.algorithm = Conv2dAlgorithm::reference;
        p.P = (s.H + 2 * s.pad - s.dilation * (s.R - 1) - 1) / s.stride + 1;
        p.Q = (s.W + 2 * s.pad - s.dilation * (s.S - 1) - 1) / s.stride + 1;
        const int64_t group_c = p.C / p.groups;
        const auto strides = [&](int64_t c, int64_t h, int64_t w, int64_t& sn, int64_t& sc, int64_t& sh, int64_t& sw) {
          sn = c * h * w, sc = channels_last ? 1 : h * w, sh = channels_last ? w * c : w, sw = channels_last ? c : 1;
        };
        strides(p.C, p.H, p.W, p.input_stride_n, p.input_stride_c, p.input_stride_h, p.input_stride_w);
        strides(p.K, p.P, p.Q, p.output_stride_n, p.output_stride_k, p.output_stride_p, p.output_stride_q);
        strides(group_c, p.R, p.S, p.weight_stride_k, p.weight_stride_c, p.weight_stride_r, p.weight_stride_s);

        const int64_t inputs = p.N * p.C * p.H * p.W, outputs = p.N * p.K * p.P * p.Q, weights = p.K * group_c * p.R * p.S;
        const Array x = normal(dtype, inputs), w = normal(dtype, weights), bias = normal(dtype, p.K);
        const Array g = normal(dtype, outputs);
        Array y = output(dtype, outputs), dx = output(dtype, inputs), dw = output(dtype, weights);
        Array db = output(dtype, p.K);
        // The CPU kernel sums in double.
        for (Array* a : {&y, &dx, &dw, &db}) a->tolerance = tf32 ? 1 << 13 : 16;  // tf32: ten bits
        p.input = x.data(), p.weight = w.data(), p.bias = bias.data(), p.grad_output = g.data();
        p.output = y.data(), p.grad_input = dx.data(), p.grad_weight = dw.data(), p.grad_bias = db.data();
        const std::string name = std::string("conv2d ") + name_of(dtype) + (tf32 ? " tf32" : "") + (channels_last ? " NHWC " : " NCHW ") +
                                 std::to_string(&s - kShapes);
        const auto pass = [&](Conv2dPass which, const char* suffix, const std::vector<Array*>& written) {
          p.pass = which;
          Conv2dParams on_cuda = p;
          const Array workspace = index_output<char>(cuda::conv2d_workspace(p));
          on_cuda.workspace = workspace.data();
          check(name + suffix, written, [&] { return cpu::conv2d(p); }, [&] { return cuda::conv2d(on_cuda, nullptr); });
        };
        pass(Conv2dPass::forward, " forward", {&y});
        pass(Conv2dPass::grad_input, " grad_input", {&dx});
        pass(Conv2dPass::grad_weight, " grad_weight", {&dw, &db});
        p.bias = nullptr, p.grad_bias = nullptr;
        pass(Conv2dPass::forward, " forward without bias", {&y});
        // A residual and a clamp behind the sum: what the CPU kernel leaves, finished by hand.
        const Array residual = normal(dtype, outputs);
        p.pass = Conv2dPass::forward, p.bias = bias.data();
        const Epilogue e{nullptr, residual.data(), true, 0, 1};
        const auto by_hand = [&] {
          const Status status = cpu::conv2d(p);
          Array done = y;
          for (int64_t i = 0; i < outputs; ++i) {
            const double sum = y.at(i) + residual.at(i);
            done.set(i, sum < 0 ? 0 : sum > 1 ? 1 : sum);
          }
          return status;
        };
        y.tolerance *= 8;  // the CPU rounds before the residual is added, and the clamp leaves small values alone
        if (s.N < 40) check(name + " residual and clamp", {&y}, by_hand, [&] { return cuda::conv2d(p, e, nullptr); });
      }
}

const Test conv2d("conv2d", run);

}  // namespace
