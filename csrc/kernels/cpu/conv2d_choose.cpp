// Which algorithm computes which convolution: the one place that decides, by shape alone.
#include "../conv2d.h"

#include <atomic>
#include <cstring>

namespace fastnn {

const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm) {
  switch (algorithm) {
    case Conv2dAlgorithm::reference: return "reference";
    case Conv2dAlgorithm::shift: return "shift";
    case Conv2dAlgorithm::winograd: return "winograd";
    case Conv2dAlgorithm::depthwise: return "depthwise";
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

bool takes(const Conv2dParams& p, Conv2dAlgorithm algorithm) {
  const bool channels_or_columns_dense = (p.input_stride_c == 1 || p.input_stride_w == 1) &&
                                         (p.output_stride_k == 1 || p.output_stride_q == 1);
  switch (algorithm) {
    case Conv2dAlgorithm::reference: return true;
    case Conv2dAlgorithm::shift: return fits_32_bits(p) && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::winograd:
      return p.dtype == DType::f32 && p.R == 3 && p.S == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
             p.dilation_w == 1 && p.pad_h <= 2 && p.pad_w <= 2 && channels_or_columns_dense &&
             fits_workspace(p, algorithm);
    case Conv2dAlgorithm::depthwise:
      return p.groups == p.C && p.K == p.C && p.R * p.S <= 64 && fits_workspace(p, algorithm);
    case Conv2dAlgorithm::aten: return true;
  }
  return false;
}

std::atomic<bool> g_strict{false};
std::atomic<int> g_forced{-1};

// The algorithms worth trying, best first; reference when none takes the shape.
Conv2dAlgorithm choose_by_shape(const Conv2dParams& p) {
  const int64_t c = p.C / p.groups, k = p.K / p.groups;
  if (p.groups > 1 && takes(p, Conv2dAlgorithm::depthwise)) return Conv2dAlgorithm::depthwise;
  if (!g_strict && c >= 16 && k >= 16 && takes(p, Conv2dAlgorithm::winograd)) return Conv2dAlgorithm::winograd;
  if (takes(p, Conv2dAlgorithm::shift)) return Conv2dAlgorithm::shift;
  return Conv2dAlgorithm::reference;
}

}  // namespace

Conv2dAlgorithm conv2d_choose(const Conv2dParams& p) {
  const int forced = g_forced;
  if (forced >= 0 && takes(p, Conv2dAlgorithm(forced))) return Conv2dAlgorithm(forced);
  return choose_by_shape(p);
}

bool conv2d_set_strict(bool strict) { return g_strict.exchange(strict); }

bool conv2d_force(const char* name) {
  if (!*name) return g_forced = -1, true;
  for (int i = 0; i <= int(Conv2dAlgorithm::aten); ++i)
    if (std::strcmp(name, conv2d_algorithm_name(Conv2dAlgorithm(i))) == 0) return g_forced = i, true;
  return false;
}

}  // namespace cpu
}  // namespace fastnn
