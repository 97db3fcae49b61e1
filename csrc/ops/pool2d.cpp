// Checks and sizes shared by max, average and adaptive pooling.
#include "pool2d.h"

namespace fastnn::ops {
namespace {

bool one_or_two(at::IntArrayRef values) { return values.size() == 1 || values.size() == 2; }

// batch and channels of [C, H, W] or [N, C, H, W]; only the batch may be empty.
bool fill_planes(Pool2dParams& p, at::IntArrayRef sizes) {
  if (sizes.size() != 3 && sizes.size() != 4) return false;
  for (size_t i = sizes.size() - 3; i < sizes.size(); ++i)
    if (sizes[i] == 0) return false;
  p.batch = sizes.size() == 4 ? sizes[0] : 1;
  p.channels = sizes[sizes.size() - 3];
  p.h.in = sizes[sizes.size() - 2];
  p.w.in = sizes.back();
  return true;
}

constexpr int64_t kLargest = int64_t(1) << 30;  // keeps every product of the window arithmetic inside int64

bool fill_axis(PoolAxis& a, bool ceil_mode) {
  for (int64_t v : {a.kernel, a.stride, a.dilation})
    if (v < 1 || v > kLargest) return false;
  if (a.padding < 0 || a.padding > a.kernel / 2) return false;
  const int64_t room = a.in + 2 * a.padding - a.dilation * (a.kernel - 1) - 1 + (ceil_mode ? a.stride - 1 : 0);
  if (room < 0) return false;
  a.out = room / a.stride + 1;
  if (ceil_mode && (a.out - 1) * a.stride >= a.in + a.padding) --a.out;  // the last window begins inside the input
  return a.out >= 1;
}

}  // namespace

bool fill_windows(Pool2dParams& p, at::IntArrayRef sizes, const Windows& windows) {
  const auto& [kernel, stride, padding, dilation, ceil_mode] = windows;
  if (!fill_planes(p, sizes) || !one_or_two(kernel) || !one_or_two(padding) || !one_or_two(dilation)) return false;
  if (!stride.empty() && !one_or_two(stride)) return false;
  const auto& step = stride.empty() ? kernel : stride;
  p.h = {p.h.in, 0, kernel[0], step[0], padding[0], dilation[0]};
  p.w = {p.w.in, 0, kernel.back(), step.back(), padding.back(), dilation.back()};
  if (!fill_axis(p.h, ceil_mode) || !fill_axis(p.w, ceil_mode)) return false;
  p.adaptive = false;
  p.wide = p.h.kernel > 255 || p.w.kernel > 255 || p.h.kernel * p.w.kernel > 255;
  return p.h.kernel * p.w.kernel < (int64_t(1) << 31);
}

bool fill_adaptive(Pool2dParams& p, at::IntArrayRef sizes, at::IntArrayRef output_size) {
  if (!fill_planes(p, sizes) || output_size.size() != 2 || output_size[0] < 1 || output_size[1] < 1) return false;
  p.h.out = output_size[0];
  p.w.out = output_size[1];
  // Where a remainder of 0 or 1 is left (13 to 6), windows are of one size and one distance: plain ones.
  const auto plain = [](const PoolAxis& a) { return a.in >= a.out && a.in % a.out <= 1; };
  p.adaptive = !plain(p.h) || !plain(p.w);
  for (PoolAxis* a : {&p.h, &p.w}) {
    const int64_t step = a->in / a->out, longest = step + std::min<int64_t>(a->in % a->out, 2);
    *a = {a->in, a->out, std::min(longest, a->in), p.adaptive ? longest : step, 0, 1};
  }
  p.wide = p.h.kernel > 255 || p.w.kernel > 255 || p.h.kernel * p.w.kernel > 255;
  return p.h.kernel < (int64_t(1) << 31) / p.w.kernel;
}

namespace {

template <class Fill>
bool takes(const char* op, const Tensor& input, const Fill& fill) {
  if (!native(op, {&input}, true)) return false;
  if (input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return true;
  Pool2dParams p{};
  if (fill(p)) return true;
  note_fallback(op, "sizes");
  return false;
}

}  // namespace

bool takes_windows(const char* op, const Tensor& input, const Windows& windows) {
  return takes(op, input, [&](Pool2dParams& p) { return fill_windows(p, input.sizes(), windows); });
}

bool takes_adaptive(const char* op, const Tensor& input, c10::SymIntArrayRef output_size) {
  const auto size = c10::asIntArrayRefSlowOpt(output_size);
  return takes(op, input, [&](Pool2dParams& p) { return !size || fill_adaptive(p, input.sizes(), *size); });
}

bool fill_backward(Pool2dParams& p, at::IntArrayRef pooled, at::IntArrayRef input_size, const Windows& windows,
                   bool channels_last) {
  if (pooled.size() < 3 || input_size.size() != 2 || (channels_last && pooled.size() != 4)) return false;
  const auto sizes = with_plane(pooled, input_size[0], input_size[1]);
  const auto plane = pooled.slice(pooled.size() - 2);
  if (windows.kernel.empty()) return fill_adaptive(p, sizes, plane);
  Windows tried = windows;
  for (bool ceil_mode : {false, true}) {
    tried.ceil_mode = ceil_mode;
    if (fill_windows(p, sizes, tried) && p.h.out == plane[0] && p.w.out == plane[1]) return true;
  }
  return false;
}

c10::SmallVector<int64_t, 4> with_plane(at::IntArrayRef sizes, int64_t h, int64_t w) {
  c10::SmallVector<int64_t, 4> result(sizes.begin(), sizes.end());
  result[result.size() - 2] = h;
  result.back() = w;
  return result;
}

}  // namespace fastnn::ops
