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

// Calls use(row, loss, class weight) for rows [begin, end).
template <class S, class F>
FASTNN_INLINE void for_losses(const NllLossParams& p, int64_t begin, int64_t end, const F& use) {
  if (begin >= end) return;
  const S* const x = static_cast<const S*>(p.input);
  const int64_t stride_class = p.x_stride_class, stride_w = p.x_stride_w;
  int64_t w = begin % p.width, h = begin / p.width % p.height, n = begin / p.width / p.height;
  while (begin < end) {
    const S* at = x + n * p.x_stride_n + h * p.x_stride_h + w * stride_w;
    const int64_t stop = min64(end, begin + p.width - w);
    for (; begin < stop; ++begin, at += stride_w) {
      const int64_t t = class_index(p, begin);
      const acc_t<S> weight = weight_of<S>(p, t);
      use(begin, t < 0 ? acc_t<S>(0) : -weight * to_acc(at[t * stride_class]), weight);
    }
    w = 0;
    if (++h == p.height) h = 0, ++n;
  }
}

template <class S>
void forward(const NllLossParams& p) {
  using A = acc_t<S>;
  S* loss = static_cast<S*>(p.loss);
  const int64_t rows = p.outer * p.inner;
  *static_cast<A*>(p.total_weight) = 0;
  if (p.reduction == Reduction::none) {
    parallel_for(0, rows, 1 << 13, [&](int64_t begin, int64_t end) {
      for_losses<S>(p, begin, end, [=](int64_t row, A of_row, A) { loss[row] = from_acc<S>(of_row); });
    });
    return;
  }
  double sum = 0, weight = 0;  // one thread: a few ns a row, and the order of the sum is fixed
  for_losses<S>(p, 0, rows, [&](int64_t, A of_row, A w) { sum += of_row, weight += w; });
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
  const int64_t inner = p.inner, image = p.classes * inner, block = max64(1, (1 << 15) / max64(1, image));
  parallel_for(0, ceil_div(p.outer, block), 1, [&](int64_t begin, int64_t end) {
    const NllLossParams own = p;  // the compiler reads p anew after every store, which might have changed it
    const int64_t last = min64(end * block, own.outer);
    // Many small images are set to zero by one call, but no more than stay in L2 until their gradients come.
    for (int64_t first = begin * block; first < last; first += block) {
      const int64_t stop = min64(first + block, last);
      __builtin_memset(static_cast<void*>(dx + first * image), 0, sizeof(S) * image * (stop - first));
      S* to = dx + first * image;
      for (int64_t row = first * inner, i = 0; row < stop * inner; ++row) {
        const int64_t t = class_index(own, row);
        const A of_row = own.reduction == Reduction::none ? to_acc(g[row]) : scale;
        if (t >= 0) to[t * inner + i] = from_acc<S>(-weight_of<S>(own, t) * of_row);
        if (++i == inner) i = 0, to += image;
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
