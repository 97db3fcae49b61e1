// A pass of Conv2dParams as one ConvProblem per group (and, for grad_input with a stride, per phase of the stride),
// handed to the chosen algorithm.
#include "conv2d.h"

#include "../../parallel.h"
#include "conv2d_problem.h"
#include "isa.h"
#include "lanes.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// The sum of n values that lie next to each other, in kVecs independent vectors.
template <class S>
acc_t<S> sum_row(const S* x, int64_t n) {
  using V = Vec<acc_t<S>>;
  constexpr int kVecs = 4;
  V sums[kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) sums[i] = V::zero();
  int64_t at = 0;
  for (; at + kVecs * V::N <= n; at += kVecs * V::N)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sums[i] = sums[i] + V::load(x + at + i * V::N);
  for (; at + V::N <= n; at += V::N) sums[0] = sums[0] + V::load(x + at);
  if (at < n) sums[1] = sums[1] + V::load_n(x + at, n - at);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Channels apart (NCHW): each channel of each image is a row.
template <class S>
void grad_bias_rows(const Conv2dParams& p) {
  using A = acc_t<S>;
  const S* grad = static_cast<const S*>(p.grad_output);
  S* out = static_cast<S*>(p.grad_bias);
  const int64_t pixels = p.P * p.Q;
  parallel_for(0, p.K, ceil_div(1 << 15, max64(1, p.N * pixels)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      A total = 0;
      for (int64_t n = 0; n < p.N; ++n) total += sum_row(grad + n * p.output_stride_n + k * p.output_stride_k, pixels);
      out[k] = from_acc<S>(total);
    }
  });
}

// Channels together (NHWC): one vector of channels at a time, over pixels in fixed chunks so that sums stay short.
template <class S>
void grad_bias_columns(const Conv2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int64_t kChunk = 256;
  const S* grad = static_cast<const S*>(p.grad_output);
  S* out = static_cast<S*>(p.grad_bias);
  const int64_t pixels = p.N * p.P * p.Q;
  // Several vectors of a pixel at a time: one alone would touch a page per pixel for a cache line.
  constexpr int kVectors = 4;
  parallel_for(0, ceil_div(p.K, kVectors * V::N), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t k = group * kVectors * V::N, channels = min64(kVectors * V::N, p.K - k);
      V total[kVectors] = {};
      for (int64_t chunk = 0; chunk < pixels; chunk += kChunk) {
        V sum[kVectors] = {};
        const S* at = grad + chunk * p.output_stride_q + k;
        const int64_t count = min64(pixels, chunk + kChunk) - chunk;
        if (channels == kVectors * V::N) {
          for (int64_t i = 0; i < count; ++i, at += p.output_stride_q)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sum[j] = sum[j] + V::load(at + j * V::N);
        } else {
          for (int64_t i = 0; i < count; ++i, at += p.output_stride_q)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sum[j] = sum[j] + load_upto(at + j * V::N, channels - j * V::N);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) total[j] = total[j] + sum[j];
      }
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store_upto(total[j], out + k + j * V::N, channels - j * V::N);
    }
  });
}

// ---- a pass as convolution problems --------------------------------------------------------------------------------

// The rows (or columns) a, a + stride, a + 2 stride, ... of grad_input see only every step-th tap of the kernel, and
// see grad_output with stride 1: a convolution of its own.
struct Phase {
  int64_t first, step, taps, dilation, pad, count;
};
Phase make_phase(int64_t a, int64_t size, int64_t taps, int64_t stride, int64_t dilation, int64_t pad) {
  Phase f{};
  f.count = a < size ? ceil_div(size - a, stride) : 0;
  while (f.first < taps && (a + pad - f.first * dilation) % stride) ++f.first;
  if (f.first == taps) return f;
  f.step = 1;
  while (f.step * dilation % stride) ++f.step;
  f.taps = (taps - 1 - f.first) / f.step + 1;
  f.dilation = f.step * dilation / stride;
  f.pad = (f.taps - 1) * f.dilation - (a + pad - f.first * dilation) / stride;
  return f;
}

template <class S>
ConvProblem group_problem(const Conv2dParams& p, int64_t group) {
  const int64_t c = p.C / p.groups, k = p.K / p.groups;
  const bool forward = p.pass == Conv2dPass::forward;
  const S* x = static_cast<const S*>(p.pass == Conv2dPass::grad_input ? p.grad_input : p.input);
  const S* w = static_cast<const S*>(p.pass == Conv2dPass::grad_weight ? p.grad_weight : p.weight);
  S* y = static_cast<S*>(forward ? p.output : const_cast<void*>(p.grad_output));
  ConvProblem d{};
  d.x = x ? x + group * c * p.input_stride_c : nullptr;
  d.xn = p.input_stride_n, d.xc = p.input_stride_c, d.xh = p.input_stride_h, d.xw = p.input_stride_w;
  d.n = p.N, d.c = c, d.h = p.H, d.w = p.W;
  d.weight = w ? w + group * k * p.weight_stride_k : nullptr;
  d.wk = p.weight_stride_k, d.wc = p.weight_stride_c, d.wr = p.weight_stride_r, d.ws = p.weight_stride_s;
  d.r = p.R, d.s = p.S;
  d.bias = p.bias ? static_cast<const S*>(p.bias) + group * k : nullptr;
  d.y = y ? y + group * k * p.output_stride_k : nullptr;
  d.yn = p.output_stride_n, d.yk = p.output_stride_k, d.yh = p.output_stride_p, d.yw = p.output_stride_q;
  d.k = k, d.p = p.P, d.q = p.Q;
  d.stride_h = p.stride_h, d.stride_w = p.stride_w, d.pad_h = p.pad_h, d.pad_w = p.pad_w;
  d.dil_h = p.dilation_h, d.dil_w = p.dilation_w;
  return d;
}

// grad_input of one group and one phase: the convolution of grad_output with the phase's taps, flipped.
template <class S>
ConvProblem phase_problem(const Conv2dParams& p, int64_t group, int64_t a, int64_t b, const Phase& h, const Phase& w) {
  const int64_t c = p.C / p.groups, k = p.K / p.groups;
  const S *g = static_cast<const S*>(p.grad_output), *weight = static_cast<const S*>(p.weight);
  S* dx = static_cast<S*>(p.grad_input);
  ConvProblem d{};
  d.x = g ? g + group * k * p.output_stride_k : nullptr;
  d.xn = p.output_stride_n, d.xc = p.output_stride_k, d.xh = p.output_stride_p, d.xw = p.output_stride_q;
  d.n = p.N, d.c = k, d.h = p.P, d.w = p.Q;
  d.weight = weight ? weight + group * k * p.weight_stride_k + (h.first + (h.taps - 1) * h.step) * p.weight_stride_r +
                          (w.first + (w.taps - 1) * w.step) * p.weight_stride_s
                    : nullptr;
  d.wk = p.weight_stride_c, d.wc = p.weight_stride_k;
  d.wr = -h.step * p.weight_stride_r, d.ws = -w.step * p.weight_stride_s;
  d.r = h.taps, d.s = w.taps;
  d.y = dx ? dx + group * c * p.input_stride_c + a * p.input_stride_h + b * p.input_stride_w : nullptr;
  d.yn = p.input_stride_n, d.yk = p.input_stride_c;
  d.yh = p.stride_h * p.input_stride_h, d.yw = p.stride_w * p.input_stride_w;
  d.k = c, d.p = h.count, d.q = w.count;
  d.stride_h = d.stride_w = 1, d.pad_h = h.pad, d.pad_w = w.pad;
  d.dil_h = h.dilation, d.dil_w = w.dilation;
  return d;
}

// The gradient of few channels as a product whose rows are added up: gemm's way with a grad_input that has a kernel.
bool adds_columns(const Conv2dParams& p) {
  return p.algorithm == Conv2dAlgorithm::gemm && p.pass == Conv2dPass::grad_input && p.R * p.S > 1 &&
         p.K / p.groups <= 64 && p.stride_h == 1 && p.stride_w == 1 && p.output_stride_q == 1 &&
         p.output_stride_p == p.Q && p.input_stride_w == 1 && p.weight_stride_s == 1 && p.weight_stride_r == p.S &&
         p.weight_stride_c == p.R * p.S;
}

// Calls f(problem) for the problems that a group of the pass consists of. One with r * s == 0 is to be filled with
// zeros.
template <class S, class F>
void for_problems(const Conv2dParams& p, int64_t group, const F& f) {
  if (p.pass != Conv2dPass::grad_input || adds_columns(p)) return f(group_problem<S>(p, group));
  for (int64_t a = 0; a < p.stride_h; ++a)
    for (int64_t b = 0; b < p.stride_w; ++b) {
      const Phase h = make_phase(a, p.H, p.R, p.stride_h, p.dilation_h, p.pad_h);
      const Phase w = make_phase(b, p.W, p.S, p.stride_w, p.dilation_w, p.pad_w);
      if (h.count && w.count) f(phase_problem<S>(p, group, a, b, h, w));
    }
}

template <class S>
void fill_zero(const ConvProblem& d) {
  S* y = static_cast<S*>(d.y);
  const bool together = d.yk == 1;  // NHWC: a pixel's channels lie side by side
  parallel_for(0, d.n * (together ? d.p : d.k), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      S* const at = y + (together ? i / d.p * d.yn + i % d.p * d.yh : i / d.k * d.yn + i % d.k * d.yk);
      if (together) {
        for (int64_t q = 0; q < d.q; ++q)
          for (int64_t k = 0; k < d.k; ++k) at[q * d.yw + k] = S{};
      } else {
        for (int64_t p = 0; p < d.p; ++p)
          for (int64_t q = 0; q < d.q; ++q) at[p * d.yh + q * d.yw] = S{};
      }
    }
  });
}

template <class S>
int64_t problem_workspace(const ConvProblem& d, const Conv2dParams& p, int64_t workers) {
  const bool weight = p.pass == Conv2dPass::grad_weight;
  switch (p.algorithm) {
    case Conv2dAlgorithm::shift: return weight ? shift_grad_workspace<S>(d, workers) : shift_workspace<S>(d, workers);
    case Conv2dAlgorithm::winograd:
      return weight ? winograd_grad_workspace(d, workers) : winograd_workspace(d, workers);
    case Conv2dAlgorithm::batch: return batch_grad_workspace(d, workers);
    case Conv2dAlgorithm::batch_winograd:
      return weight ? batch_winograd_grad_workspace(d, workers) : batch_winograd_workspace(d, workers);
    case Conv2dAlgorithm::gemm:
      if (adds_columns(p)) return col2im_workspace(d, workers);
      return weight ? gemm_conv_grad_workspace(d, workers) : gemm_conv_workspace(d, workers);
    default: return 0;
  }
}

// The parts of one group for batch_forward(), but for the empty ones, which are filled with zeros where `fill` is set.
template <class S>
int collect_parts(const Conv2dParams& p, int64_t group, bool fill, ConvProblem* parts) {
  int count = 0;
  for_problems<S>(p, group, [&](const ConvProblem& d) {
    if (d.r > 0 && d.s > 0) parts[count++] = d;
    else if (fill) fill_zero<S>(d);
  });
  return count;
}

bool in_parts(const Conv2dParams& p) {
  return p.algorithm == Conv2dAlgorithm::batch && p.pass != Conv2dPass::grad_weight;
}

int64_t parts_workers(const ConvProblem* parts, int count) {
  int64_t workers = num_threads();
  while (workers > 1 && batch_workspace(parts, count, workers) > kConv2dMaxWorkspace) --workers;
  return workers;
}

// Winograd's threads share the transformed weight, which each has written a part of: below this many multiplications of
// a direct sum one alone is as fast, and not at the mercy of how far apart two cores lie (64x8x8->64, one image, 17 us
// on one, 22 or 73 on two).
constexpr int64_t kWinogradAlone = 6 << 20;

// As many threads as the bound on the workspace has room for. Whether one has, conv2d_choose() has seen to: so neither
// the choice nor the result depends on the number of threads.
template <class S>
int64_t workers_for(const ConvProblem& d, const Conv2dParams& p) {
  if (p.algorithm == Conv2dAlgorithm::winograd && p.pass != Conv2dPass::grad_weight &&
      d.n * d.p * d.q * d.k * d.c * d.r * d.s < kWinogradAlone)
    return 1;
  int64_t workers = num_threads();
  while (workers > 1 && problem_workspace<S>(d, p, workers) > kConv2dMaxWorkspace) --workers;
  return workers;
}

template <class S>
void run_problem(const ConvProblem& d, const Conv2dParams& p, int64_t group, int64_t workers, char* workspace) {
  const bool weight = p.pass == Conv2dPass::grad_weight;
  S* dw = static_cast<S*>(const_cast<void*>(d.weight));
  S* bias = p.grad_bias ? static_cast<S*>(p.grad_bias) + group * d.k : nullptr;
  if (p.algorithm == Conv2dAlgorithm::shift) {
    if (weight) shift_grad_weight<S>(d, dw, bias, workers, workspace);
    else shift_forward<S>(d, workers, workspace);
  } else if constexpr (__is_same(S, float)) {
    if (p.algorithm == Conv2dAlgorithm::winograd) {
      if (weight) winograd_grad_weight(d, dw, bias, workers, workspace);
      else winograd_forward(d, workers, workspace);
    } else if (p.algorithm == Conv2dAlgorithm::batch_winograd) {
      if (weight) batch_winograd_grad_weight(d, dw, bias, workers, workspace);
      else batch_winograd_forward(d, workers, workspace);
    } else if (p.algorithm == Conv2dAlgorithm::batch) {
      batch_grad_weight(d, dw, bias, workers, workspace);
    } else if (adds_columns(p)) {
      col2im_grad_input(d, static_cast<S*>(const_cast<void*>(d.x)), workers, workspace);
    } else if (weight) {
      gemm_conv_grad_weight(d, dw, workers, workspace);
    } else {
      gemm_conv_forward(d, workers, workspace);
    }
  }
}

// ---- groups --------------------------------------------------------------------------------------------------------

// `alone`: on the thread that calls.
template <class S>
int64_t group_workspace(const Conv2dParams& p, bool alone) {
  if (in_parts(p)) {
    ConvProblem parts[kMaxParts];
    const int count = collect_parts<S>(p, 0, false, parts);
    return count ? batch_workspace(parts, count, alone ? 1 : parts_workers(parts, count)) : 0;
  }
  int64_t bytes = 0;
  for_problems<S>(p, 0, [&](const ConvProblem& d) {
    if (d.r > 0 && d.s > 0) bytes = max64(bytes, problem_workspace<S>(d, p, alone ? 1 : workers_for<S>(d, p)));
  });
  return bytes;
}
template <class S>
void run_group(const Conv2dParams& p, int64_t group, bool alone, char* workspace) {
  if (in_parts(p)) {
    ConvProblem parts[kMaxParts];
    const int count = collect_parts<S>(p, group, true, parts);
    if (count) batch_forward(parts, count, alone ? 1 : parts_workers(parts, count), workspace);
    return;
  }
  for_problems<S>(p, group, [&](const ConvProblem& d) {
    if (d.r > 0 && d.s > 0) run_problem<S>(d, p, group, alone ? 1 : workers_for<S>(d, p), workspace);
    else fill_zero<S>(d);
  });
}

// Groups too small to share one out run side by side, each on one thread; in turn two threads were no faster than one
// (ResNeXt's 32 groups of 4 by 3x3 628 -> 335 us, RegNet's 46 of 8 218 -> 97). In NHWC each thread writes a cache line
// of a pixel at least, or they would wait for each other's.
struct SideBySide {
  int64_t workers, bytes;  // of each
};
template <class S>
SideBySide side_by_side(const Conv2dParams& p) {
  const int64_t c = p.C / p.groups, k = p.K / p.groups, products = p.N * p.P * p.Q * p.R * p.S * c * k;
  const int64_t workers = num_threads();
  if (workers == 1 || p.groups < 2 * workers) return {1, 0};
  const int64_t written = p.pass == Conv2dPass::forward ? k : p.pass == Conv2dPass::grad_input ? c : 64;
  const bool lines = p.output_stride_q == 1 || p.groups / workers * written >= 16;
  if (!lines || products > 1 << 22) return {1, 0};
  SideBySide s{workers, round_up(group_workspace<S>(p, true), 64)};
  while (s.workers > 1 && s.workers * s.bytes > kConv2dMaxWorkspace) --s.workers;
  return s;
}

// Whether the groups of a pointwise layer run as one; the first of them.
template <class S>
bool groups_as_one(const Conv2dParams& p, ConvProblem& first) {
  if (p.algorithm != Conv2dAlgorithm::gemm || p.pass == Conv2dPass::grad_weight || p.groups == 1) return false;
  if (p.R * p.S != 1 || p.stride_h * p.stride_w != 1 || p.pad_h || p.pad_w) return false;
  for_problems<S>(p, 0, [&](const ConvProblem& d) { first = d; });
  return small_groups_takes(first, p.groups);
}

}  // namespace

Status conv2d_grad_bias(const Conv2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.output_stride_q == 1) grad_bias_rows<S>(p);
    else grad_bias_columns<S>(p);
    return Status::ok;
  });
}

int64_t conv2d_workspace(const Conv2dParams& p) {
  if (p.algorithm == Conv2dAlgorithm::reference || p.algorithm == Conv2dAlgorithm::aten) return 0;
  if (p.algorithm == Conv2dAlgorithm::depthwise) return conv2d_depthwise_workspace(p);
  int64_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (ConvProblem first; groups_as_one<S>(p, first)) {
      bytes = small_groups_workspace(first, p.groups);
      return Status::ok;
    }
    const SideBySide side = side_by_side<S>(p);
    bytes = side.workers > 1 ? side.workers * side.bytes : group_workspace<S>(p, false);
    return Status::ok;
  });
  return bytes;
}

Status conv2d(const Conv2dParams& p) {
  if (p.algorithm == Conv2dAlgorithm::reference) return conv2d_reference(p);
  const bool apart = p.algorithm == Conv2dAlgorithm::gemm ||
                     (p.algorithm == Conv2dAlgorithm::depthwise && !depthwise_3x3_grad_takes(p));
  if (apart && p.pass == Conv2dPass::grad_weight && p.grad_bias) conv2d_grad_bias(p);
  if (p.algorithm == Conv2dAlgorithm::depthwise) return conv2d_depthwise(p);
  if (p.algorithm == Conv2dAlgorithm::aten) return Status::invalid_argument;  // the ops layer's business
  if (p.dtype != DType::f32 && p.algorithm != Conv2dAlgorithm::shift) return Status::unsupported_dtype;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    char* const workspace = static_cast<char*>(p.workspace);
    if (ConvProblem first; groups_as_one<S>(p, first)) {
      small_groups_forward(first, p.groups, p.K / p.groups * p.weight_stride_k, workspace);
      return Status::ok;
    }
    const SideBySide side = side_by_side<S>(p);
    if (side.workers > 1) {
      parallel_for(0, side.workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t group = p.groups * begin / side.workers; group < p.groups * end / side.workers; ++group)
          run_group<S>(p, group, true, workspace + begin * side.bytes);
      });
    } else {
      for (int64_t group = 0; group < p.groups; ++group) run_group<S>(p, group, false, workspace);
    }
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
