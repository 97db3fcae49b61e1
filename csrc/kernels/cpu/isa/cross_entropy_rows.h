// Cross-entropy of rows of contiguous classes, and what it shares with columns: the problem and its running sums.
#pragma once
#include "../../cross_entropy.h"
#include "class_index.h"
#include "rows.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

FASTNN_INLINE void store_lanes(i64v v, int64_t* to) { __builtin_memcpy(to, &v, sizeof(v)); }
FASTNN_INLINE void store_lanes(i64v v, int32_t* to) {
  using Half = int32_t __attribute__((vector_size(kVecBytes / 2)));
  const Half narrow = __builtin_convertvector(v, Half);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

// With eps = label_smoothing, w the class weights (1 without)
// and z_c = log_sum - (x_c - max) = -log p_c, a row's loss is
//   class index t:    (1 - eps) w_t z_t + eps / C sum_c w_c z_c
//   probabilities t:  sum_c w_c q_c z_c,  q_c = (1 - eps) t_c + eps / C
// and its gradient, times the row's scale,
//   (1 - eps) w_t (p_c - [c = t]) + eps / C (p_c sum_c w_c - w_c),  or  p_c sum_c w_c q_c - w_c q_c.
template <class S>
struct Problem {
  using A = acc_t<S>;
  using V = Vec<A>;
  using Lane = decltype(typename V::Int{}[0] + 0);

  explicit Problem(const CrossEntropyParams& p)
      : p(p),
        x(static_cast<const S*>(p.input)),
        weight(static_cast<const S*>(p.weight)),
        probabilities(p.target_kind == TargetKind::probabilities ? static_cast<const S*>(p.target) : nullptr),
        rows(p.outer * p.inner),
        maximum(static_cast<A*>(p.stats)),
        log_sum(maximum + rows),
        keep(A(1 - p.label_smoothing)),
        spread(A(p.label_smoothing / double(p.classes))),
        weight_sum(A(p.classes)) {
    if (!weight || probabilities || p.label_smoothing == 0) return;
    weight_sum = 0;
    for (int64_t c = 0; c < p.classes; ++c) weight_sum += to_acc(weight[c]);
  }

  const CrossEntropyParams& p;
  const S* x;
  const S* weight;
  const S* probabilities;
  int64_t rows;
  A* maximum;
  A* log_sum;
  A keep, spread;
  A weight_sum;
  A unit = 0;  // forward with a gradient: what multiplies a row of weight 1

  FASTNN_VEC_FN int64_t class_of(int64_t row) const { return class_index(p, row); }
  // Copies the targets and tells whether all are classes and count; the first `vectors` of them in whole vectors.
  FASTNN_VEC_FN bool all_classes(int64_t row, int64_t vectors, int64_t count, Lane* target) const {
    constexpr int kStep = sizeof(i64v) / 8;
    if (vectors == 0 || (0 <= p.ignore_index && p.ignore_index < p.classes)) return false;
    using u64v = uint64_t __attribute__((vector_size(kVecBytes)));
    const uint64_t* const from = static_cast<const uint64_t*>(p.target) + row;
    const uint64_t last = p.classes - 1;
    u64v signs = u64v{};  // a class t has neither t nor last - t below zero
    for (int64_t i = 0; i < vectors; i += kStep) {
      u64v t;
      __builtin_memcpy(&t, from + i, sizeof(t));
      store_lanes(i64v(t), target + i);
      signs |= t | (last - t);
    }
    uint64_t sign = 0;
    for (int l = 0; l < kStep; ++l) sign |= signs[l];
    for (int64_t i = vectors; i < count; ++i) target[i] = Lane(from[i]), sign |= from[i] | (last - from[i]);
    return int64_t(sign) >= 0;
  }
  // The classes of neighbouring rows, -1 where one does not count. True when all do.
  FASTNN_VEC_FN bool targets_of(int64_t row, int64_t count, Lane* target) const {
    constexpr int kStep = sizeof(i64v) / 8;
    const int64_t vectors = p.target_kind == TargetKind::int64 ? count / kStep * kStep : 0;
    if (all_classes(row, vectors, count, target)) return true;
    i64v all = ~i64v{}, astray = i64v{};
    for (int64_t i = 0; i < vectors; i += kStep) {
      i64v t;
      __builtin_memcpy(&t, static_cast<const int64_t*>(p.target) + row + i, sizeof(t));
      const i64v inside = (t >= 0) & (t < p.classes), ignored = t == p.ignore_index, counts = inside & ~ignored;
      store_lanes(counts ? t : ~i64v{}, target + i);
      all &= counts;
      astray |= ~(inside | ignored);
    }
    bool all_count = true;
    for (int l = 0; l < kStep && vectors > 0; ++l) {
      all_count = all_count && all[l];
      if (astray[l] && p.out_of_range) __atomic_store_n(p.out_of_range, true, __ATOMIC_RELAXED);
    }
    for (int64_t i = vectors; i < count; ++i) {
      target[i] = Lane(class_of(row + i));
      all_count = all_count && target[i] >= 0;
    }
    return all_count;
  }
  // The class weights of N rows.
  FASTNN_VEC_FN V weights_of(const Lane* target) const {
    typename V::Int t;
    __builtin_memcpy(&t, target, sizeof(t));
    if (!weight) return {t >= 0 ? V::set1(A(1)).v : V::zero().v};
    V w;
    for (int l = 0; l < V::N; ++l) w.v[l] = weight_of(t[l]);
    return w;
  }
  FASTNN_VEC_FN A weight_of(int64_t t) const { return t < 0 ? A(0) : weight ? to_acc(weight[t]) : A(1); }

  // w_c q_c of one class in every lane (or of neighbouring classes), q_c = 1 for class indices.
  FASTNN_VEC_FN V share(V w, V t) const { return probabilities ? w * fma(V::set1(keep), t, V::set1(spread)) : w; }

  // What a row's loss is multiplied by in backward, before the class weight.
  FASTNN_VEC_FN A scale_of(int64_t row) const {
    const S* g = static_cast<const S*>(p.grad_output);
    if (p.reduction == Reduction::none) return to_acc(g[row]);
    return p.reduction == Reduction::mean ? to_acc(g[0]) / maximum[2 * rows] : to_acc(g[0]);
  }
};

// Whether forward can write the gradient too: of a reduced loss of class indices without smoothing, for a grad_output
// of 1. Not in 16 bits: what multiplies it comes after the rounding.
template <class S>
constexpr bool kRunsAhead = sizeof(S) > 2;

// The running sums of one block: the loss, and the class weights that divide a mean.
struct Sums {
  double loss = 0, weight = 0;
};

// ---- rows: the classes of a row are contiguous ---------------------------------------------------------------------

// sum_c w_c q_c z_c of one row; x and t at the row's first class.
template <class S>
FASTNN_INLINE acc_t<S> row_shares_loss(const Problem<S>& k, const S* x, const S* t, acc_t<S> m, acc_t<S> log_sum) {
  using A = acc_t<S>;
  using V = Vec<A>;
  V sum = V::zero();
  for_vectors<V::N>(k.p.classes, [&](int64_t c, int lanes, int) {
    const V z = V::set1(log_sum) - (load_some(x + c, lanes, m) - V::set1(m));
    const V w = k.weight ? load_some(k.weight + c, lanes, A(0)) : V::set1(A(1));
    const V share = k.share(w, k.probabilities ? load_some(t + c, lanes, A(0)) : w);
    const V term = share * z;
    sum = sum + (lanes == V::N ? term : first_lanes(term, lanes));
  });
  return reduce_add(sum);
}

// The classes of up to N rows, one per lane, and what the loss takes from them.
template <class S>
struct RowTargets {
  using A = acc_t<S>;
  using V = Vec<A>;
  using Lane = typename Problem<S>::Lane;
  Lane target[V::N];
  A logit[V::N];
  V weight;

  FASTNN_VEC_FN RowTargets(const Problem<S>& k, int64_t row, int count) {
    const typename V::Int none = every_lane<A>(-1);
    __builtin_memcpy(target, &none, kVecBytes);
    k.targets_of(row, count, target);
    weight = k.weights_of(target);
    const S* x = k.x + row * k.p.classes;
    for (int r = 0; r < V::N; ++r) logit[r] = target[r] >= 0 ? to_acc(x[r * k.p.classes + target[r]]) : A(0);
  }
  FASTNN_VEC_FN typename V::Int counts() const {
    typename V::Int t;
    __builtin_memcpy(&t, target, kVecBytes);
    return t >= 0;
  }
  // What exp(x - maximum) is multiplied by in the gradient of the reduced loss: zero where the row does not count,
  // whatever it holds. At the target kept() is taken off after that, not the sum before: 0.6 of the error.
  FASTNN_VEC_FN V factor(const Problem<S>& k, V sum) const {
    const V f = kept(k) / sum;
    return {counts() ? f.v : V::zero().v};
  }
  FASTNN_VEC_FN V kept(const Problem<S>& k) const { return V::set1(k.unit) * weight; }
};

// The loss of up to N rows and what backward needs of them; m and sum are one row per lane.
template <class S>
FASTNN_INLINE void finish_rows(const Problem<S>& k, int64_t row, int count, const RowTargets<S>* t, Vec<acc_t<S>> m,
                               Vec<acc_t<S>> sum, Sums& sums) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t n = k.p.classes;
  const S* x = k.x + row * n;
  const V log_sum = log(sum);
  store_some(m, k.maximum + row, count);
  store_some(log_sum, k.log_sum + row, count);
  V loss = V::zero();
  if (t) {
    const V of_row = V::set1(k.keep) * t->weight * (log_sum - (V::load(t->logit) - m));
    loss = V{t->counts() ? of_row.v : V::zero().v};
    sums.weight += reduce_add(t->weight);
  }
  if (k.probabilities || k.p.label_smoothing != 0) {
    for (int r = 0; r < count; ++r) {
      const S* q = k.probabilities ? k.probabilities + (row + r) * n : nullptr;
      if (q) loss.v[r] = row_shares_loss(k, x + r * n, q, m.v[r], log_sum.v[r]);
      else if (t->target[r] >= 0) loss.v[r] += k.spread * row_shares_loss(k, x + r * n, q, m.v[r], log_sum.v[r]);
    }
  }
  if (k.p.reduction == Reduction::none) store_some(loss, static_cast<S*>(k.p.loss) + row, count);
  sums.loss += reduce_add(first_lanes(loss, count));
}

// The gradient of rows [begin, end) with the loss. A function of its own, for registers of its own.
template <class S>
__attribute__((noinline)) void gradient_rows(const Problem<S>& k, int64_t begin, int64_t end, Sums& sums) {
  using V = Vec<S>;
  const int64_t n = k.p.classes;
  const S* x = k.x + begin * n;
  S* dx = static_cast<S*>(k.p.grad_input) + begin * n;
  if (n <= V::N) {
    typename V::Int iota;
    for (int l = 0; l < V::N; ++l) iota[l] = l;
    for (int64_t row = begin; row < end; row += V::N, x += V::N * n, dx += V::N * n) {
      const int count = int(min64(V::N, end - row));
      const RowTargets<S> t(k, row, count);
      S kept[V::N];
      t.kept(k).store(kept);
      group_scaled_exp(
          x, dx, n, count,
          [&](const ExpBelow<S>& below, V sum) __attribute__((always_inline)) {
            finish_rows(k, row, count, &t, below.m, below.whole(sum), sums);
            return t.factor(k, sum);
          },
          [&](int64_t r, V p) __attribute__((always_inline)) {
            const V less{iota == every_lane<S>(t.target[r]) ? p.v - V::set1(kept[r]).v : p.v};
            return t.target[r] >= 0 ? less : V::zero();
          });
    }
    return;
  }
  if (n <= kGroupClasses) {
    GroupExps<S> exps;
    S factor[V::N], kept[V::N];
    int64_t target[V::N];  // where kept is still to be taken off the gradient, or -1
    for (int64_t& at : target) at = -1;
    const auto take_off = [&] {
      for (int r = 0; r < V::N; ++r)
        if (target[r] >= 0) dx[target[r]] -= kept[r];
    };
    for_short_rows<true>(
        x, n, end - begin, exps,
        [&](int64_t row, int count, const ExpBelow<S>& below, V sum) __attribute__((always_inline)) {
          take_off();  // the group before is written by now
          const RowTargets<S> t(k, begin + row, count);
          t.factor(k, sum).store(factor);
          t.kept(k).store(kept);
          for (int r = 0; r < V::N; ++r) {
            S* const e = exps.of_row + r * exps.stride;
            target[r] = t.target[r] < 0 ? -1 : (row + r) * n + t.target[r];
            if (t.target[r] < 0) for_vectors<V::N>(exps.stride, [&](int64_t i, int, int) { V::zero().store(e + i); });
          }
          finish_rows(k, begin + row, count, &t, below.m, below.whole(sum), sums);
        },
        [&](int64_t row, int r, int64_t i, int lanes) __attribute__((always_inline)) {
          const V e = V::load(exps.of_row + r * exps.stride + i);
          store_some(e * V::set1(factor[r]), dx + row * n + i, lanes);
        });
    return take_off();
  }
  const bool streamed = streams_rows(dx, n, k.rows * n);
  bool known = false;  // the next row's maximum
  S maximum;
  for (int64_t row = begin; row < end; row += V::N, x += V::N * n, dx += V::N * n) {
    const int count = int(min64(V::N, end - row));
    const RowTargets<S> t(k, row, count);
    V m = V::zero(), sum = V::set1(S(1));
    for (int r = 0; r < count; ++r) {
      const int64_t target = t.target[r];
      const S kept = k.unit * t.weight.v[r];
      const S* const from = x + r * n;
      S* const to = dx + r * n;
      if (!known) maximum = reduce_max(row_max(from, n));
      known = kMaxAhead && !streamed && row + r + 1 < end;
      m.v[r] = maximum;
      row_scaled_exp(from, to, n, streamed, known, maximum, [&](const ExpBelow<S>&, S of_row) {
        sum.v[r] = of_row;
        return kept / of_row;
      });
      if (target >= 0) to[target] -= kept;
      else for_vectors<V::N>(n, [&](int64_t c, int lanes, int) { store_some(V::zero(), to + c, lanes); });
    }
    finish_rows(k, row, count, &t, m, ExpBelow<S>(m).whole(sum), sums);
  }
  end_streams(streamed);
}

// Rows [begin, end), a block of the loss.
template <class S>
FASTNN_INLINE void forward_rows(const Problem<S>& k, int64_t begin, int64_t end, Sums& sums) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t n = k.p.classes;
  const S* x = k.x + begin * n;
  if constexpr (kRunsAhead<S>) {
    if (k.p.grad_input && !k.probabilities) return gradient_rows(k, begin, end, sums);
  }
  const auto finish = [&](int64_t row, int count, V m, V sum) {
    if (k.probabilities) return finish_rows(k, row, count, static_cast<const RowTargets<S>*>(nullptr), m, sum, sums);
    const RowTargets<S> t(k, row, count);
    finish_rows(k, row, count, &t, m, sum, sums);
  };
  if (n > V::N && n <= kGroupClasses) {
    GroupExps<A> exps;
    return for_short_rows<false>(
        x, n, end - begin, exps,
        [&](int64_t row, int count, const ExpBelow<A>& below, V sum) {
          finish(begin + row, count, below.m, below.whole(sum));
        },
        [](int64_t, int, int64_t, int) {});
  }
  for (int64_t row = begin; row < end; row += V::N, x += V::N * n) {
    const int count = int(min64(V::N, end - row));
    V m = V::zero(), sum = V::set1(A(1));
    if (n <= V::N) {
      group_max_and_sum(x, n, count, m, sum);
    } else {
      for (int r = 0; r < count; ++r) {
        m.v[r] = reduce_max(row_max(x + r * n, n));
        sum.v[r] = reduce_add(row_sum_exp(x + r * n, n, n, ExpBelow<A>(V::set1(m.v[r])), [](int64_t, int, V) {}));
      }
      sum = ExpBelow<A>(m).whole(sum);
    }
    finish(row, count, m, sum);
  }
}

template <class S>
FASTNN_INLINE void backward_row(const Problem<S>& k, int64_t row) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t n = k.p.classes;
  const S* x = k.x + row * n;
  S* dx = static_cast<S*>(k.p.grad_input);
  S* dt = static_cast<S*>(k.p.grad_target);
  if (dx) dx += row * n;
  const A g = k.scale_of(row), m = k.maximum[row], log_sum = k.log_sum[row];
  if (k.probabilities) {
    const S* t = k.probabilities + row * n;
    V vsum = V::zero();
    for_vectors<V::N>(n, [&](int64_t c, int lanes, int) {
      const V w = k.weight ? load_some(k.weight + c, lanes, A(0)) : V::set1(A(1));
      const V share = k.share(w, load_some(t + c, lanes, A(0)));
      vsum = vsum + (lanes == V::N ? share : first_lanes(share, lanes));
    });
    const V sum = V::set1(g * reduce_add(vsum));
    for_vectors<V::N>(n, [&](int64_t c, int lanes, int) {
      const V w = k.weight ? load_some(k.weight + c, lanes, A(0)) : V::set1(A(1));
      const V log_p = (load_some(x + c, lanes, m) - V::set1(m)) - V::set1(log_sum);
      const V share = k.share(w, load_some(t + c, lanes, A(0)));
      if (dx) store_some(exp(log_p) * sum - V::set1(g) * share, dx + c, lanes);
      if (dt) store_some(V::set1(-g * k.keep) * w * log_p, dt + row * n + c, lanes);
    });
    return;
  }
  const int64_t t = k.class_of(row);
  if (t < 0) {
    for_vectors<V::N>(n, [&](int64_t c, int lanes, int) { store_some(V::zero(), dx + c, lanes); });
    return;
  }
  const A kept = g * k.keep * k.weight_of(t), spread = g * k.spread;
  const auto log_p = [&](int64_t c, int lanes) { return (load_some(x + c, lanes, m) - V::set1(m)) - V::set1(log_sum); };
  if (k.p.label_smoothing == 0) {
    for_exps<A>(n, log_p, [&](int64_t c, int lanes, int, V e) { store_some(e * V::set1(kept), dx + c, lanes); });
    if constexpr (sizeof(S) > 2) dx[t] -= kept;
    else dx[t] = from_acc<S>((exp((to_acc(x[t]) - m) - log_sum) - A(1)) * kept);
    return;
  }
  const A of_p = kept + spread * k.weight_sum;
  for_exps<A>(n, log_p, [&](int64_t c, int lanes, int, V e) {
    const V w = k.weight ? load_some(k.weight + c, lanes, A(0)) : V::set1(A(1));
    store_some(e * V::set1(of_p) - V::set1(spread) * w, dx + c, lanes);
  });
  const A w = k.weight_of(t);
  dx[t] = from_acc<S>(exp((to_acc(x[t]) - m) - log_sum) * of_p - spread * w - kept);
}

}  // namespace
}  // namespace fastnn::cpu::FASTNN_ISA_NS
