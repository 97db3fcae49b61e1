// Convolution by its definition, over any strides: what the fast algorithms are checked against and fall back to.
#include "../../parallel.h"
#include "conv2d.h"
#include "isa.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

struct Range {
  int64_t begin, end;
};

// The indices o in [0, count) with 0 <= o * step + offset < limit.
Range inside(int64_t offset, int64_t step, int64_t limit, int64_t count) {
  const int64_t begin = offset >= 0 ? 0 : ceil_div(-offset, step);
  const int64_t end = offset >= limit ? 0 : ceil_div(limit - offset, step);
  return {begin, min64(count, end)};
}

// Sums are kept in double: the reference is right, not fast.
template <class S>
void forward(const Conv2dParams& p) {
  const S *x = static_cast<const S*>(p.input), *w = static_cast<const S*>(p.weight),
          *bias = static_cast<const S*>(p.bias);
  S* y = static_cast<S*>(p.output);
  const int64_t group_c = p.C / p.groups, group_k = p.K / p.groups;
  parallel_for(0, p.N * p.K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t nk = begin; nk < end; ++nk) {
      const int64_t n = nk / p.K, k = nk % p.K, c0 = k / group_k * group_c;
      for (int64_t o = 0; o < p.P; ++o) {
        for (int64_t q = 0; q < p.Q; ++q) {
          const int64_t h0 = o * p.stride_h - p.pad_h, w0 = q * p.stride_w - p.pad_w;
          const Range rs = inside(h0, p.dilation_h, p.H, p.R), ss = inside(w0, p.dilation_w, p.W, p.S);
          double sum = bias ? to_acc(bias[k]) : 0;
          for (int64_t c = 0; c < group_c; ++c)
            for (int64_t r = rs.begin; r < rs.end; ++r)
              for (int64_t s = ss.begin; s < ss.end; ++s)
                sum +=
                    double(to_acc(
                        x[n * p.input_stride_n + (c0 + c) * p.input_stride_c +
                          (h0 + r * p.dilation_h) * p.input_stride_h + (w0 + s * p.dilation_w) * p.input_stride_w])) *
                    to_acc(w[k * p.weight_stride_k + c * p.weight_stride_c + r * p.weight_stride_r +
                             s * p.weight_stride_s]);
          y[n * p.output_stride_n + k * p.output_stride_k + o * p.output_stride_p + q * p.output_stride_q] =
              from_acc<S>(acc_t<S>(sum));
        }
      }
    }
  });
}

template <class S>
void grad_input(const Conv2dParams& p) {
  const S *g = static_cast<const S*>(p.grad_output), *w = static_cast<const S*>(p.weight);
  S* dx = static_cast<S*>(p.grad_input);
  const int64_t group_c = p.C / p.groups, group_k = p.K / p.groups;
  parallel_for(0, p.N * p.C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t nc = begin; nc < end; ++nc) {
      const int64_t n = nc / p.C, c = nc % p.C, k0 = c / group_c * group_k;
      for (int64_t h = 0; h < p.H; ++h) {
        for (int64_t v = 0; v < p.W; ++v) {
          double sum = 0;
          for (int64_t r = 0; r < p.R; ++r) {
            const int64_t at_h = h + p.pad_h - r * p.dilation_h;
            if (at_h < 0 || at_h % p.stride_h || at_h / p.stride_h >= p.P) continue;
            for (int64_t s = 0; s < p.S; ++s) {
              const int64_t at_w = v + p.pad_w - s * p.dilation_w;
              if (at_w < 0 || at_w % p.stride_w || at_w / p.stride_w >= p.Q) continue;
              for (int64_t k = k0; k < k0 + group_k; ++k)
                sum +=
                    double(to_acc(g[n * p.output_stride_n + k * p.output_stride_k +
                                    at_h / p.stride_h * p.output_stride_p + at_w / p.stride_w * p.output_stride_q])) *
                    to_acc(w[k * p.weight_stride_k + c % group_c * p.weight_stride_c + r * p.weight_stride_r +
                             s * p.weight_stride_s]);
            }
          }
          dx[n * p.input_stride_n + c * p.input_stride_c + h * p.input_stride_h + v * p.input_stride_w] =
              from_acc<S>(acc_t<S>(sum));
        }
      }
    }
  });
}

template <class S>
void grad_weight(const Conv2dParams& p) {
  const S *g = static_cast<const S*>(p.grad_output), *x = static_cast<const S*>(p.input);
  S* dw = static_cast<S*>(p.grad_weight);
  const int64_t group_c = p.C / p.groups, group_k = p.K / p.groups;
  parallel_for(0, p.K * group_c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t kc = begin; kc < end; ++kc) {
      const int64_t k = kc / group_c, c = kc % group_c, c0 = k / group_k * group_c;
      for (int64_t r = 0; r < p.R; ++r) {
        for (int64_t s = 0; s < p.S; ++s) {
          const int64_t h0 = r * p.dilation_h - p.pad_h, w0 = s * p.dilation_w - p.pad_w;
          const Range rows = inside(h0, p.stride_h, p.H, p.P), columns = inside(w0, p.stride_w, p.W, p.Q);
          double sum = 0;
          for (int64_t n = 0; n < p.N; ++n)
            for (int64_t o = rows.begin; o < rows.end; ++o)
              for (int64_t q = columns.begin; q < columns.end; ++q)
                sum += double(to_acc(g[n * p.output_stride_n + k * p.output_stride_k + o * p.output_stride_p +
                                       q * p.output_stride_q])) *
                       to_acc(x[n * p.input_stride_n + (c0 + c) * p.input_stride_c +
                                (h0 + o * p.stride_h) * p.input_stride_h + (w0 + q * p.stride_w) * p.input_stride_w]);
          dw[k * p.weight_stride_k + c * p.weight_stride_c + r * p.weight_stride_r + s * p.weight_stride_s] =
              from_acc<S>(acc_t<S>(sum));
        }
      }
    }
  });
}

}  // namespace

Status conv2d_reference(const Conv2dParams& p) {
  if (p.pass == Conv2dPass::grad_weight && p.grad_bias) conv2d_grad_bias(p);
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    switch (p.pass) {
      case Conv2dPass::forward: forward<S>(p); break;
      case Conv2dPass::grad_input: grad_input<S>(p); break;
      case Conv2dPass::grad_weight: grad_weight<S>(p); break;
    }
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
