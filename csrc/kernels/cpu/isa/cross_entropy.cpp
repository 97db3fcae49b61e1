// Cross-entropy: one sweep over the logits for the loss, one for the gradient, and nothing of their size in between; or
// one sweep for both. Rows are in cross_entropy_rows.h.
#include "../../parallel.h"
#include "columns.h"
#include "cross_entropy_rows.h"
#include "isa.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// ---- columns: every lane is a row, its classes `inner` apart --------------------------------------------------------

// The targets of a strip, in whole vectors: see Problem::targets_of.
template <class S>
struct StripTargets {
  using A = acc_t<S>;
  using V = Vec<A>;
  alignas(kVecBytes) typename Problem<S>::Lane target[kMaxStrip];
  alignas(kVecBytes) A weight[kMaxStrip];
  bool all_count;

  FASTNN_VEC_FN void read(const Problem<S>& k, int64_t row, int64_t width) {
    const typename V::Int none = every_lane<A>(-1);
    __builtin_memcpy(target + (width - 1) / V::N * V::N, &none, kVecBytes);
    all_count = k.targets_of(row, width, target);
    for_vectors<V::N>(round_up(width, V::N), [&](int64_t i, int, int) { k.weights_of(target + i).store(weight + i); });
  }
  FASTNN_VEC_FN typename V::Int targets(int64_t i) const {
    typename V::Int t;
    __builtin_memcpy(&t, target + i, kVecBytes);
    return t;
  }
  FASTNN_VEC_FN A total_weight(const Problem<S>& k, int64_t width) const {
    if (all_count && !k.weight) return A(width);
    V sum = V::zero();
    for_vectors<V::N>(round_up(width, V::N), [&](int64_t i, int, int) { sum = sum + V::load(weight + i); });
    return reduce_add(sum);
  }
  // v where the row counts, zero elsewhere: such a row may hold anything, 0 times it is not always 0.
  FASTNN_VEC_FN V counted(V v, int64_t i) const { return all_count ? v : V{targets(i) >= 0 ? v.v : V::zero().v}; }
};

// The gradient of `count` columns from `first` on, from exp(x - maximum) of those, classes `stride` apart, and its
// sums.
template <class S>
FASTNN_INLINE void gradient_columns(const Problem<S>& k, const StripTargets<S>& t, const S* e, int64_t stride, S* dx,
                                    int64_t first, int64_t count, const S* sum) {
  using V = Vec<S>;
  alignas(kVecBytes) S factor[kMaxStrip], kept[kMaxStrip];
  for_vectors<V::N>(round_up(count, V::N), [&](int64_t i, int, int) {
    const V of_target = V::set1(k.unit) * V::load(t.weight + first + i);
    of_target.store(kept + i);
    (of_target / V::load(sum + first + i)).store(factor + i);
  });
  const int64_t n = k.p.classes, inner = k.p.inner;
  const auto write = [&](auto all) __attribute__((always_inline)) {
    for (int64_t c = 0; c < n; ++c) {
      for_vectors<V::N>(count, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
        V d = load_some(e + c * stride + i, lanes, S(0)) * V::load(factor + i);
        const auto target = t.targets(first + i);
        d.v = target == every_lane<S>(c) ? d.v - V::load(kept + i).v : d.v;
        if constexpr (all.count == 0) d.v = target >= 0 ? d.v : V::zero().v;
        store_some(d, dx + c * inner + first + i, lanes);
      });
    }
  };
  if (t.all_count) write(Vectors<1>{});
  else write(Vectors<0>{});
}

// `width` <= kMaxStrip neighbouring columns, through a tile or where they lie.
template <class S>
FASTNN_INLINE void forward_columns(const Problem<S>& k, int64_t outer, int64_t first, int64_t width, Sums& sums) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t n = k.p.classes, inner = k.p.inner, row = outer * inner + first, at = outer * n * inner + first;
  const S* x = k.x + at;
  alignas(kVecBytes) A m[kMaxStrip], log_sum[kMaxStrip], loss[kMaxStrip], of_target[kMaxStrip];
  for_vectors<V::N>(round_up(width, V::N), [&](int64_t i, int, int) { V::zero().store(loss + i); });
  StripTargets<S> t;
  if (!k.probabilities) t.read(k, row, width);
  S* dx = kRunsAhead<S> && !k.probabilities && k.p.grad_input ? static_cast<S*>(k.p.grad_input) + at : nullptr;
  if (tile_width<A>(n) > 0) {
    alignas(kVecBytes) A tile[kTileBytes / sizeof(A)];
    V at_target[kUnroll] = {};  // of a row that does not count: any
    for_tile(
        x, n, inner, width, tile, dx != nullptr, dx,
        [&](auto vectors, int64_t i, int64_t c, const V* v) __attribute__((always_inline)) {
          if (k.probabilities) return;
          each<vectors.count>(
              [&](int k) { at_target[k].v = t.targets(i + k * V::N) == every_lane<A>(c) ? v[k].v : at_target[k].v; });
        },
        [&](auto vectors, int64_t i, const V* top, const V* total) __attribute__((always_inline)) {
          each<vectors.count>([&](int k) {
            top[k].store(m + i + k * V::N);
            total[k].store(log_sum + i + k * V::N);
            at_target[k].store(of_target + i + k * V::N);
          });
        },
        [&](int64_t first, int64_t count, const A* tile, int64_t stride) __attribute__((always_inline)) {
          if constexpr (kRunsAhead<S>) {
            if (dx) gradient_columns(k, t, tile, stride, dx, first, count, log_sum);
          }
        });
  } else {
    if (!k.probabilities) {
      V::zero().store(of_target + (width - 1) / V::N * V::N);
      for (int64_t i = 0; i < width; ++i) of_target[i] = t.target[i] >= 0 ? to_acc(x[t.target[i] * inner + i]) : A(0);
    }
    strip_max_and_sum(x, n, inner, width, m, log_sum, [&](int64_t j, int lanes, V e) __attribute__((always_inline)) {
      if (dx) store_some(e, dx + j, lanes);
    });
    if constexpr (kRunsAhead<S>) {
      if (dx) gradient_columns(k, t, dx, inner, dx, 0, width, log_sum);
    }
  }
  for_vectors<V::N>(width, [&](int64_t i, int lanes, int) {
    const V of_row = log(V::load(log_sum + i));
    of_row.store(log_sum + i);
    store_some(of_row, k.log_sum + row + i, lanes);
    store_some(V::load(m + i), k.maximum + row + i, lanes);
  });
  if (k.probabilities || k.p.label_smoothing != 0) {
    for (int64_t c = 0; c < n; ++c) {
      const V w = V::set1(k.weight ? to_acc(k.weight[c]) : A(1));
      for_vectors<V::N>(width, [&](int64_t i, int lanes, int) {
        const V z = V::load(log_sum + i) - (load_some(x + c * inner + i, lanes, A(0)) - V::load(m + i));
        const V q = k.probabilities ? load_some(k.probabilities + at + c * inner + i, lanes, A(0)) : w;
        fma(k.share(w, q), z, V::load(loss + i)).store(loss + i);
      });
    }
  }
  if (!k.probabilities) {
    for_vectors<V::N>(round_up(width, V::N), [&](int64_t i, int, int) {
      const V w = V::load(t.weight + i), z = V::load(log_sum + i) - (V::load(of_target + i) - V::load(m + i));
      const V of_row = fma(V::set1(k.keep) * w, z, V::set1(k.spread) * V::load(loss + i));
      t.counted(of_row, i).store(loss + i);
    });
    sums.weight += t.total_weight(k, width);
  }
  if (k.p.reduction == Reduction::none) {
    for (int64_t i = 0; i < width; ++i) static_cast<S*>(k.p.loss)[row + i] = from_acc<S>(loss[i]);
  }
  V sum = V::zero();
  for_vectors<V::N>(width, [&](int64_t i, int lanes, int) { sum = sum + load_some(loss + i, lanes, A(0)); });
  sums.loss += reduce_add(sum);
}

template <class S>
FASTNN_INLINE void backward_columns(const Problem<S>& k, int64_t outer, int64_t first, int64_t width) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t n = k.p.classes, inner = k.p.inner, row = outer * inner + first, at = outer * n * inner + first;
  const S* x = k.x + at;
  S* dx = static_cast<S*>(k.p.grad_input);
  S* dt = static_cast<S*>(k.p.grad_target);
  const A *m = k.maximum + row, *log_sum = k.log_sum + row;
  A g[kMaxStrip], of_p[kMaxStrip], kept[kMaxStrip];
  for (int64_t i = 0; i < round_up(width, V::N); ++i) g[i] = i < width ? k.scale_of(row + i) : A(0), of_p[i] = 0;
  if (k.probabilities) {
    const S* t = k.probabilities + at;
    for (int64_t c = 0; c < n; ++c) {
      const V w = V::set1(k.weight ? to_acc(k.weight[c]) : A(1));
      for_vectors<V::N>(width, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
        fma(V::load(g + i), k.share(w, load_some(t + c * inner + i, lanes, A(0))), V::load(of_p + i)).store(of_p + i);
      });
    }
    for (int64_t c = 0; c < n; ++c) {
      const V w = V::set1(k.weight ? to_acc(k.weight[c]) : A(1));
      for_vectors<V::N>(width, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
        const int64_t j = c * inner + i;
        const V log_p =
            (load_some(x + j, lanes, A(0)) - load_some(m + i, lanes, A(0))) - load_some(log_sum + i, lanes, A(0));
        const V share = k.share(w, load_some(t + j, lanes, A(0)));
        if (dx) store_some(exp(log_p) * V::load(of_p + i) - V::load(g + i) * share, dx + at + j, lanes);
        if (dt) store_some(V::set1(-k.keep) * V::load(g + i) * w * log_p, dt + at + j, lanes);
      });
    }
    return;
  }
  const bool smooth = k.p.label_smoothing != 0;
  StripTargets<S> t;
  t.read(k, row, width);
  for_vectors<V::N>(round_up(width, V::N), [&](int64_t i, int, int) {
    const V of_row = V::load(g + i), of_target = of_row * V::set1(k.keep) * V::load(t.weight + i);
    of_target.store(kept + i);
    (of_target + of_row * V::set1(k.spread) * V::set1(k.weight_sum)).store(of_p + i);
  });
  for (int64_t c = 0; c < n; ++c) {
    const V w = V::set1(k.spread * (k.weight ? to_acc(k.weight[c]) : A(1)));
    const auto log_p = [&](int64_t i, int lanes) __attribute__((always_inline)) {
      return (load_some(x + c * inner + i, lanes, A(0)) - load_some(m + i, lanes, A(0))) -
             load_some(log_sum + i, lanes, A(0));
    };
    for_exps<A>(width, log_p, [&](int64_t i, int lanes, int, V e) __attribute__((always_inline)) {
      V d = e * V::load(of_p + i);
      if (smooth) d = d - V::load(g + i) * w;
      d.v = t.targets(i) == every_lane<A>(c) ? d.v - V::load(kept + i).v : d.v;
      store_some(t.counted(d, i), dx + at + c * inner + i, lanes);
    });
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls rows(begin, end, block) or columns(outer, begin, end, block) for every block of loss_block rows or columns.
template <class Rows, class Columns>
FASTNN_INLINE void for_blocks(const CrossEntropyParams& p, const Rows& rows, const Columns& columns) {
  const int64_t size = loss_block(p.classes, p.inner), blocks = loss_blocks(p.outer, p.classes, p.inner);
  parallel_for(0, blocks, 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      if (p.inner == 1) {
        rows(b * size, min64(p.outer, (b + 1) * size), b);
      } else {
        const int64_t per_outer = ceil_div(p.inner, size), begin = b % per_outer * size;
        columns(b / per_outer, begin, min64(p.inner, begin + size), b);
      }
    }
  });
}

// What multiplies a row of weight 1 in the gradient of the reduced loss.
template <class S, class A = acc_t<S>>
A unit_gradient(const Problem<S>& k) {
  if (k.p.reduction != Reduction::mean) return 1;
  double weights = 0;
  StripTargets<S> t;
  for (int64_t row = 0; row < k.rows; row += kMaxStrip) {
    const int64_t count = min64(kMaxStrip, k.rows - row);
    t.read(k, row, count);
    weights += t.total_weight(k, count);
  }
  return A(1) / A(weights);
}

template <class S>
void forward(const CrossEntropyParams& p) {
  using A = acc_t<S>;
  const int64_t width = columns_together<A>(p.classes);
  Problem<S> k(p);
  if (p.grad_input) k.unit = unit_gradient(k);
  A* partials = static_cast<A*>(p.partials);
  const auto keep = [&](int64_t block, const Sums& sums) {
    if (p.reduction == Reduction::none) return;
    partials[2 * block] = A(sums.loss);
    partials[2 * block + 1] = A(sums.weight);
  };
  for_blocks(
      p,
      [&](int64_t begin, int64_t end, int64_t block) {
        Sums sums;
        forward_rows(k, begin, end, sums);
        keep(block, sums);
      },
      [&](int64_t outer, int64_t begin, int64_t end, int64_t block) {
        Sums sums;
        for (int64_t i = begin; i < end; i += width) forward_columns(k, outer, i, min64(width, end - i), sums);
        keep(block, sums);
      });
  k.maximum[2 * k.rows] = 0;
  if (p.reduction == Reduction::none) return;
  Sums sums;
  for (int64_t b = 0; b < loss_blocks(p.outer, p.classes, p.inner); ++b) {
    sums.loss += partials[2 * b];
    sums.weight += partials[2 * b + 1];
  }
  if (k.probabilities) sums.weight = p.classes == 0 ? 0 : double(k.rows);
  k.maximum[2 * k.rows] = A(sums.weight);
  if (p.reduction == Reduction::mean) sums.loss /= sums.weight;
  *static_cast<S*>(p.loss) = from_acc<S>(A(sums.loss));
}

template <class S>
void backward(const CrossEntropyParams& p) {
  const int64_t width = strip_width(p.classes);
  const Problem<S> k(p);
  for_blocks(
      p,
      [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t row = begin; row < end; ++row) backward_row(k, row);
      },
      [&](int64_t outer, int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; i += width) backward_columns(k, outer, i, min64(width, end - i));
      });
}

}  // namespace

Status cross_entropy_forward(const CrossEntropyParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    forward<typename decltype(tag)::type>(p);
    return Status::ok;
  });
}

Status cross_entropy_backward(const CrossEntropyParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    backward<typename decltype(tag)::type>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
