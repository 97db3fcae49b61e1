// Batch norm forward: two-pass moments of blocks that stay in L1, joined in float64; then one sweep that normalises.
#include "batch_norm.h"
#include "isa.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// y = (x - shift) * scale + offset.
template <class A>
struct Coefficients {
  A shift, scale, offset;
};

// The mean in two parts (what the accumulation type holds of it, and the rest), so that a large mean costs no accuracy.
template <class A>
FASTNN_INLINE Coefficients<A> coefficients(double mean, double invstd, double weight, double bias) {
  const double scale = invstd * weight;
  const A shift = A(mean);
  return {shift, A(scale), A(bias - (mean - double(shift)) * scale)};
}

// Where backward takes the ReLU's mask from them.
template <class A>
FASTNN_INLINE void keep_affine(const BatchNormParams& p, int64_t c, Coefficients<A> k) {
  if (!p.affine) return;
  A* const affine = static_cast<A*>(p.affine);
  affine[c] = k.scale;
  affine[p.channels + c] = k.offset;
}

// Stores what backward needs and moves the running statistics of `count` channels from `first` on; calls keep(channel,
// coefficients). P: the parameters' type.
template <class P, class A, class F>
FASTNN_INLINE void finish_channels_of(const BatchNormParams& p, int64_t first, int64_t count, const double* mean,
                                      const double* m2, const F& keep) {
  A *means = static_cast<A*>(p.mean) + first, *invstds = static_cast<A*>(p.invstd) + first;
  const P* weight = p.weight ? static_cast<const P*>(p.weight) + first : nullptr;
  const P* bias = p.bias ? static_cast<const P*>(p.bias) + first : nullptr;
  P* running_mean = p.running_mean ? static_cast<P*>(p.running_mean) + first : nullptr;
  P* running_var = p.running_var ? static_cast<P*>(p.running_var) + first : nullptr;
  const double elements = double(p.batch) * double(p.inner), momentum = p.momentum, eps = p.eps;
  const auto blend = [&](P& running, double value) {
    running = from_acc<P>(acc_t<P>(momentum * value + (1 - momentum) * double(to_acc(running))));
  };
  for (int64_t c = 0; c < count; ++c) {
    const double invstd = 1 / __builtin_sqrt(m2[c] / elements + eps);
    means[c] = A(mean[c]);
    invstds[c] = A(invstd);
    if (running_mean) blend(running_mean[c], mean[c]);
    if (running_var) blend(running_var[c], m2[c] / (elements - 1));
    const Coefficients<A> k =
        coefficients<A>(mean[c], invstd, weight ? double(to_acc(weight[c])) : 1, bias ? double(to_acc(bias[c])) : 0);
    keep_affine(p, first + c, k);
    keep(first + c, k);
  }
}
template <class S, class F>
FASTNN_INLINE void finish_channels(const BatchNormParams& p, int64_t first, int64_t count, const double* mean,
                                   const double* m2, const F& keep) {
  using A = acc_t<S>;
  if (p.param_dtype == p.dtype) finish_channels_of<S, A>(p, first, count, mean, m2, keep);
  else finish_channels_of<A, A>(p, first, count, mean, m2, keep);
}

// ---- the sweep that normalises -------------------------------------------------------------------------------------

template <bool kStream, class S, class V>
FASTNN_INLINE void write_lanes(const S* x, const S* r, S* y, int lanes, bool relu, V shift, V scale, V offset) {
  V v = fma(load_lanes(x, lanes) - shift, scale, offset);
  if (r) v = v + load_lanes(r, lanes);
  if (relu) v = V{v.v < 0 ? V::zero().v : v.v};  // NaN passes
  store_lanes<kStream>(v, y, lanes);
}

// f(residual is there, relu): the two conditions as constants inside the loops.
template <class F>
FASTNN_INLINE void with_tail(bool residual, bool relu, const F& f) {
  if (residual) return relu ? f(true, true) : f(true, false);
  return relu ? f(false, true) : f(false, false);
}

// `count` planes, one after the other, the first one `at` elements into the tensor.
template <bool kStream, class S>
FASTNN_INLINE void normalise_planes_to(const BatchNormParams& p, int64_t at, int64_t count, bool add, bool relu,
                                       const Coefficients<acc_t<S>>* coefficients) {
  using V = Vec<acc_t<S>>;
  const S* x = static_cast<const S*>(p.input) + at;
  const S* r = static_cast<const S*>(p.residual) + (add ? at : 0);
  S* y = static_cast<S*>(p.output) + at;
  const int64_t inner = p.inner, ahead = p.training ? fetched_ahead(p) : 0;
  for (int64_t c = 0; c < count; ++c) {
    const Coefficients<acc_t<S>>& k = coefficients[c];
    const V shift = V::set1(k.shift), scale = V::set1(k.scale), offset = V::set1(k.offset);
    const auto write = [&](int64_t i, int lanes, int = 0) __attribute__((always_inline)) {
      write_lanes<kStream>(x + i, add ? r + i : nullptr, y + i, lanes, relu, shift, scale, offset);
      if (ahead) {
        __builtin_prefetch(x + i + ahead);
        if (!kStream) __builtin_prefetch(y + i + ahead, 1);
      }
    };
    if (is_short<V::N>(inner)) for_short<V::N>(at, inner, write);
    else for_lanes<V::N>(at, inner, write);
    at += inner, x += inner, y += inner;
    if (add) r += inner;
  }
}
template <class S>
FASTNN_INLINE void normalise_planes(const BatchNormParams& p, int64_t at, int64_t count, bool add, bool relu,
                                    bool stream, const Coefficients<acc_t<S>>* k) {
  if (stream) normalise_planes_to<true, S>(p, at, count, add, relu, k);
  else normalise_planes_to<false, S>(p, at, count, add, relu, k);
}

// Rows [begin, end) with the three coefficient arrays of the workspace.
template <bool kStream, class S>
void normalise_rows(const BatchNormParams& p, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const A* const shifts = static_cast<const A*>(p.workspace);
  const A* const sources[] = {shifts, shifts + p.channels, shifts + 2 * p.channels};
  with_tail(p.residual, p.relu, [&](bool add, bool relu) __attribute__((always_inline)) {
    const S *const inputs = static_cast<const S*>(p.input), *const residuals = static_cast<const S*>(p.residual);
    S* const outputs = static_cast<S*>(p.output);
    for_rows_together(p.channels, begin, end, sources,
                      [&](int64_t at, int64_t length, const auto& coefficients) __attribute__((always_inline)) {
                        const S *x = inputs + at, *r = add ? residuals + at : nullptr;
                        const A *shift = coefficients[0], *scale = coefficients[1], *offset = coefficients[2];
                        S* y = outputs + at;
                        for_lanes<V::N>(0, length, [=](int64_t c, int lanes, int) __attribute__((always_inline)) {
                          write_lanes<kStream>(x + c, add ? r + c : nullptr, y + c, lanes, relu,
                                               load_lanes(shift + c, lanes), load_lanes(scale + c, lanes),
                                               load_lanes(offset + c, lanes));
                        });
                      });
  });
}

template <class A>
FASTNN_INLINE void store_coefficients(const BatchNormParams& p, int64_t c, Coefficients<A> k) {
  A* w = static_cast<A*>(p.workspace);
  w[c] = k.shift;
  w[p.channels + c] = k.scale;
  w[2 * p.channels + c] = k.offset;
}

// ---- moments -------------------------------------------------------------------------------------------------------

// Adds a row of each of `count` neighbouring channels, `begin` elements into the tensor, to their sums.
template <class S, class V = Vec<acc_t<S>>>
FASTNN_INLINE void add_rows(const S* x, int64_t begin, int64_t length, int64_t inner, int64_t count, V* sums) {
  const bool brief = is_short<V::N>(length);
  for (int64_t c = 0; c < count; ++c) {
    V sum[4] = {sums[c], V::zero(), V::zero(), V::zero()};
    const auto add = [&](int64_t i, int lanes, int k = 0)
                         __attribute__((always_inline)) { sum[k] = sum[k] + load_lanes(x + i, lanes); };
    if (brief) for_short<V::N>(begin, length, add), sums[c] = sum[0];
    else for_lanes<V::N>(begin, length, add), sums[c] = join_four(sum);
    begin += inner, x += inner;
  }
}
// The same for x - near and its square.
template <class S, class A = acc_t<S>, class V = Vec<A>>
FASTNN_INLINE void add_deviations(const S* x, int64_t begin, int64_t length, int64_t inner, int64_t count,
                                  const A* nears, V* rests, V* squares) {
  const bool brief = is_short<V::N>(length);
  for (int64_t c = 0; c < count; ++c) {
    const A near = nears[c];
    const V vnear = V::set1(near);
    V rest[4] = {rests[c], V::zero(), V::zero(), V::zero()}, square[4] = {squares[c], rest[1], rest[1], rest[1]};
    const auto add = [&](int64_t i, int lanes, int k = 0) __attribute__((always_inline)) {
      const V d = load_lanes(x + i, lanes, near) - vnear;
      rest[k] = rest[k] + d;
      square[k] = fma(d, d, square[k]);
    };
    if (brief) for_short<V::N>(begin, length, add), rests[c] = rest[0], squares[c] = square[0];
    else for_lanes<V::N>(begin, length, add), rests[c] = join_four(rest), squares[c] = join_four(square);
    begin += inner, x += inner;
  }
}

// Mean and sum of squared deviations of `channels` neighbouring channels from `first` on.
template <class S>
void channel_moments(const BatchNormParams& p, int64_t first, int64_t channels, double* mean_out, double* m2_out) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t inner = p.inner, stride = p.channels * inner, start = first * inner;
  const S* x = static_cast<const S*>(p.input);
  double count = 0, mean[kGroup], m2[kGroup];
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  for_blocks(p.batch, inner, stride, [&](int64_t at, int64_t rows, int64_t length) {
    V sums[kGroup], rests[kGroup], squares[kGroup];
    A nears[kGroup];
    double deviations[kGroup];
    for (int64_t c = 0; c < channels; ++c) sums[c] = rests[c] = squares[c] = V::zero();
    const auto for_rows = [&](const auto& f) __attribute__((always_inline)) {
      for (int64_t r = 0, row = start + at; r < rows; ++r, row += stride) f(row);
    };
    for_rows([&](int64_t row)
                 __attribute__((always_inline)) { add_rows(x + row, row, length, inner, channels, sums); });
    const double n = double(rows) * double(length), total = count + n, share = n / total, spread = count * share;
    // Close to the block's mean; what it misses is in `rests`.
    sum_lanes(p, sums, channels, [&](int64_t c, double sum) { nears[c] = A(sum / n); });
    for_rows([&](int64_t row) __attribute__((always_inline)) {
      add_deviations(x + row, row, length, inner, channels, nears, rests, squares);
    });
    sum_lanes(p, rests, channels, [&](int64_t c, double rest) { deviations[c] = rest; });
    sum_lanes(p, squares, channels, [&](int64_t c, double square) {
      const double d = deviations[c], delta = double(nears[c]) + d / n - mean[c];
      mean[c] += delta * share;
      m2[c] += square - d * d / n + delta * delta * spread;
    });
    count = total;
  });
  for (int64_t c = 0; c < channels; ++c) {
    mean_out[c] = mean[c];
    m2_out[c] = m2[c] > 0 || m2[c] != m2[c] ? m2[c] : 0;
  }
}

// One chunk of rows: for every channel a value near its mean, and the sums of what is left and of its square. The value
// is the mean of a first strip of rows, so that the others are read once. Of strips the next is fetched, which the
// hardware does not do for tiles of a few cache lines (4x96x112x112 at AVX2 0.8 of the time).
template <class S>
void chunk_moments(const S* x, int64_t rows, int64_t channels, acc_t<S>* near_out) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int kLine = 64 / sizeof(S);
  const int64_t strip = max64(8, kBlock / channels);
  A *rest_out = near_out + channels, *square_out = rest_out + channels;
  for (int64_t begin = 0; begin < rows; begin += strip, x += strip * channels) {
    const int64_t count = min64(strip, rows - begin);
    for_tiles<V::N>(channels, [&]<int T, int U>(int64_t c, int lanes) __attribute__((always_inline)) {
      const S* tile = x + c;
      const auto at = [&](int64_t r, int t) { return load_lanes(tile + r * channels + t * V::N, lanes); };
      V both[2][T], near[T];
      if (begin == 0) {
        V sum[1][T];
        accumulate_rows<1, T, U>(count, sum, [&](int64_t r, int t, const auto& add) { add(0, at(r, t)); });
        const V scale = V::set1(A(1) / A(count));
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) near[t] = sum[0][t] * scale;
      } else {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) near[t] = load_lanes(near_out + c + t * V::N, lanes);
      }
      accumulate_rows<2, T, U>(count, both, [&](int64_t r, int t, const auto& add) {
        const V d = at(r, t) - near[t];
        if (t * V::N % kLine == 0) __builtin_prefetch(tile + (r + strip) * channels + t * V::N);
        add(0, d);
        add(1, d * d);
      });
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        A *const rest = rest_out + c + t * V::N, *const square = square_out + c + t * V::N;
        if (begin == 0) {
          store_lanes(near[t], near_out + c + t * V::N, lanes);
        } else {
          both[0][t] = both[0][t] + load_lanes(rest, lanes);
          both[1][t] = both[1][t] + load_lanes(square, lanes);
        }
        store_lanes(both[0][t], rest, lanes);
        store_lanes(both[1][t], square, lanes);
      }
    });
  }
}

// Joins the chunks' moments of `width` <= kJoined channels from
// c on, side by side: one alone would wait for its own sums.
template <class A>
void join_chunks(const BatchNormParams& p, int64_t c, int64_t width, int64_t chunk_rows, double* mean, double* m2) {
  const int64_t channels = p.channels;
  const A* chunks = static_cast<const A*>(p.workspace) + 3 * channels + c;
  const int64_t count = ceil_div(p.batch, chunk_rows);
  const auto rows_of = [&](int64_t k) { return double(min64(chunk_rows, p.batch - k * chunk_rows)); };
  for (int64_t i = 0; i < width; ++i) mean[i] = m2[i] = 0;
  for (int64_t k = 0; k < count; ++k) {
    const A* s = chunks + 3 * k * channels;
    const double rows = rows_of(k);
    for (int64_t i = 0; i < width; ++i) mean[i] += rows * double(s[i]) + double(s[channels + i]);
  }
  for (int64_t i = 0; i < width; ++i) mean[i] /= double(p.batch);
  for (int64_t k = 0; k < count; ++k) {
    // About the common mean: sum (d + e)^2 = sum d^2 + 2 e sum d + n e^2, e being the distance of `near` to it.
    const A* s = chunks + 3 * k * channels;
    const double rows = rows_of(k);
    for (int64_t i = 0; i < width; ++i) {
      const double e = double(s[i]) - mean[i];
      m2[i] += double(s[2 * channels + i]) + e * (2 * double(s[channels + i]) + rows * e);
    }
  }
  for (int64_t i = 0; i < width; ++i) m2[i] = m2[i] > 0 || m2[i] != m2[i] ? m2[i] : 0;
}

// ---- layouts -------------------------------------------------------------------------------------------------------

template <class S>
void train_planes(const BatchNormParams& p) {
  const int64_t grain = ceil_div(kParallelElements, p.batch * p.inner), together = channels_together(p);
  const bool stream = streams(p, p.output, 3 << 20);
  parallel_for(0, p.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += together) {
      const int64_t count = min64(together, end - first);
      double mean[kGroup], m2[kGroup];
      Coefficients<acc_t<S>> k[kGroup];
      channel_moments<S>(p, first, count, mean, m2);
      finish_channels<S>(p, first, count, mean, m2, [&](int64_t c, auto coefficients) { k[c - first] = coefficients; });
      with_tail(p.residual, p.relu, [&](bool add, bool relu) __attribute__((always_inline)) {
        for (int64_t n = p.batch - 1; n >= 0; --n)  // the planes read last are still in the cache
          normalise_planes<S>(p, (n * p.channels + first) * p.inner, count, add, relu, stream, k);
      });
    }
    end_streams(stream);
  });
}

template <class S>
void sweep_rows(const BatchNormParams& p) {
  const bool streamed = p.training ? streams(p, p.output, 3 << 20) : streams_evaluation(p);
  parallel_rows(p, streamed, [&](int64_t begin, int64_t end, bool stream) {
    if (stream) normalise_rows<true, S>(p, begin, end);
    else normalise_rows<false, S>(p, begin, end);
    end_streams(stream);
  });
}

template <class S>
void train_rows(const BatchNormParams& p) {
  using A = acc_t<S>;
  const int64_t channels = p.channels, rows = batch_norm_chunk_rows(p.batch, channels);
  parallel_for(0, ceil_div(p.batch, rows), ceil_div(kParallelElements, rows * channels),
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin; k < end; ++k)
                   chunk_moments(static_cast<const S*>(p.input) + k * rows * channels, min64(rows, p.batch - k * rows),
                                 channels, static_cast<A*>(p.workspace) + 3 * (k + 1) * channels);
               });
  for_channel_groups(p, ceil_div(p.batch, rows), [&](int64_t first, int64_t width) {
    double mean[kJoined], m2[kJoined];
    join_chunks<A>(p, first, width, rows, mean, m2);
    finish_channels<S>(p, first, width, mean, m2, [&](int64_t c, auto k) { store_coefficients(p, c, k); });
  });
  sweep_rows<S>(p);
}

template <class S>
void evaluate(const BatchNormParams& p) {
  using A = acc_t<S>;
  for (int64_t c = 0; c < p.channels; ++c) {
    const double mean = read_param(p.running_mean, p.param_dtype, c, 0);
    const double invstd = 1 / __builtin_sqrt(read_param(p.running_var, p.param_dtype, c, 1) + p.eps);
    static_cast<A*>(p.mean)[c] = A(mean);
    static_cast<A*>(p.invstd)[c] = A(invstd);
    const auto k = coefficients<A>(mean, invstd, read_param(p.weight, p.param_dtype, c, 1),
                                   read_param(p.bias, p.param_dtype, c, 0));
    keep_affine(p, c, k);
    store_coefficients(p, c, k);
  }
  if (p.inner == 1) return sweep_rows<S>(p);
  const A* w = static_cast<const A*>(p.workspace);
  const bool stream = streams_evaluation(p);
  parallel_for(0, p.batch * p.channels, ceil_div(kParallelElements, p.inner), [&](int64_t begin, int64_t end) {
    with_tail(p.residual, p.relu, [&](bool add, bool relu) __attribute__((always_inline)) {
      for (int64_t i = begin, c = begin % p.channels; i < end; ++i, c = c + 1 < p.channels ? c + 1 : 0) {
        const Coefficients<A> k{w[c], w[p.channels + c], w[2 * p.channels + c]};
        normalise_planes<S>(p, i * p.inner, 1, add, relu, stream, &k);
      }
    });
    end_streams(stream);
  });
}

}  // namespace

Status batch_norm_forward(const BatchNormParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (!p.training) evaluate<S>(p);
    else if (p.inner == 1) train_rows<S>(p);
    else train_planes<S>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
