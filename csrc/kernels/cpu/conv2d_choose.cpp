// Which algorithm computes which convolution: the one place that decides, by shape alone.
#include "../conv2d.h"

namespace fastnn {

const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm) {
  switch (algorithm) {
    case Conv2dAlgorithm::reference: return "reference";
    case Conv2dAlgorithm::shift: return "shift";
    case Conv2dAlgorithm::winograd: return "winograd";
    case Conv2dAlgorithm::aten: return "aten";
  }
  return "unknown";
}

namespace cpu {
namespace {

// Offsets inside an image or a kernel are kept in 32 bits by the fast algorithms.
bool fits_32_bits(const Conv2dParams& p) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t image = max64(p.input_stride_n, p.C * (p.H + 2 * p.pad_h) * (p.W + 2 * p.pad_w));
  return image < kLimit && max64(p.output_stride_n, p.K * p.P * p.Q) < kLimit;
}

bool fits_workspace(Conv2dParams p, Conv2dAlgorithm algorithm) {
  p.algorithm = algorithm;
  return conv2d_workspace(p) <= kConv2dMaxWorkspace;
}

Conv2dAlgorithm choose_forward(const Conv2dParams&) { return Conv2dAlgorithm::shift; }

Conv2dAlgorithm choose_grad_input(const Conv2dParams&) { return Conv2dAlgorithm::shift; }

Conv2dAlgorithm choose_grad_weight(const Conv2dParams&) { return Conv2dAlgorithm::shift; }

}  // namespace

Conv2dAlgorithm conv2d_choose(const Conv2dParams& p) {
  if (!fits_32_bits(p)) return Conv2dAlgorithm::reference;
  Conv2dAlgorithm best = Conv2dAlgorithm::reference;
  switch (p.pass) {
    case Conv2dPass::forward: best = choose_forward(p); break;
    case Conv2dPass::grad_input: best = choose_grad_input(p); break;
    case Conv2dPass::grad_weight: best = choose_grad_weight(p); break;
  }
  return fits_workspace(p, best) ? best : Conv2dAlgorithm::reference;
}

}  // namespace cpu
}  // namespace fastnn
