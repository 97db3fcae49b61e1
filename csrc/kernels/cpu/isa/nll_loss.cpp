// Negative log likelihood: a gather forward, a fill and a scatter backward.
#include "../../nll_loss.h"

#include "../../parallel.h"
#include "class_index.h"
#include "isa.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

template <class S>
FASTNN_INLINE acc_t<S> weight_of(const NllLossParams& p, int64_t t) {
  return t < 0 ? 0 : p.weight ? to_acc(static_cast<const S*>(p.weight)[t]) : 1;
}

template <class S>
void forward(const NllLossParams& p) {
  using A = acc_t<S>;
  const S* x = static_cast<const S*>(p.input);
  S* loss = static_cast<S*>(p.loss);
  // Calls use(row, loss, class weight) for rows [begin, end). No division per row: it costs as much as the rest.
  const auto row_losses = [&](int64_t begin, int64_t end, const auto& use) {
    if (begin >= end) return;
    int64_t o = begin / p.inner, i = begin % p.inner;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = class_index(p, row);
      const A w = weight_of<S>(p, t);
      use(row, t < 0 ? A(0) : -w * to_acc(x[(o * p.classes + t) * p.inner + i]), w);
      if (++i == p.inner) ++o, i = 0;
    }
  };
  const int64_t rows = p.outer * p.inner;
  *static_cast<A*>(p.total_weight) = 0;
  if (p.reduction == Reduction::none) {
    parallel_for(0, rows, 1 << 13, [&](int64_t begin, int64_t end) {
      row_losses(begin, end, [&](int64_t row, A of_row, A) { loss[row] = from_acc<S>(of_row); });
    });
    return;
  }
  double sum = 0, weight = 0;  // one thread: a few ns a row, and the order of the sum is fixed
  row_losses(0, rows, [&](int64_t, A of_row, A w) { sum += of_row, weight += w; });
  *static_cast<A*>(p.total_weight) = A(weight);
  *loss = from_acc<S>(A(p.reduction == Reduction::mean ? sum / weight : sum));
}

template <class S>
void backward(const NllLossParams& p) {
  using A = acc_t<S>;
  const S* g = static_cast<const S*>(p.grad_output);
  S* dx = static_cast<S*>(p.grad_input);
  A scale = 1;
  if (p.reduction != Reduction::none) scale = to_acc(*g);
  if (p.reduction == Reduction::mean) scale /= *static_cast<const A*>(p.total_weight);
  parallel_for(0, p.outer, max64(1, (1 << 15) / max64(1, p.classes * p.inner)), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      __builtin_memset(static_cast<void*>(dx + o * p.classes * p.inner), 0, sizeof(S) * p.classes * p.inner);
      for (int64_t row = o * p.inner; row < (o + 1) * p.inner; ++row) {
        const int64_t t = class_index(p, row);
        if (t < 0) continue;
        const A of_row = p.reduction == Reduction::none ? to_acc(g[row]) : scale;
        dx[(o * p.classes + t) * p.inner + row - o * p.inner] = from_acc<S>(-weight_of<S>(p, t) * of_row);
      }
    }
  });
}

}  // namespace

Status nll_loss_forward(const NllLossParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    forward<typename decltype(tag)::type>(p);
    return Status::ok;
  });
}

Status nll_loss_backward(const NllLossParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    backward<typename decltype(tag)::type>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
