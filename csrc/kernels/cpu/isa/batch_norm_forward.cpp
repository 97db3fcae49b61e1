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
FASTNN_INLINE Coefficients<A> coefficients(const BatchNormParams& p, int64_t c, double mean, double invstd) {
  const double scale = invstd * read_param(p.weight, p.param_dtype, c, 1);
  const A shift = A(mean);
  return {shift, A(scale), A(read_param(p.bias, p.param_dtype, c, 0) - (mean - double(shift)) * scale)};
}

// Stores what backward needs, moves the running statistics, and returns the coefficients of channel c.
template <class A>
Coefficients<A> finish_channel(const BatchNormParams& p, int64_t c, double mean, double m2) {
  const double count = double(p.batch) * double(p.inner);
  const double invstd = 1 / __builtin_sqrt(m2 / count + p.eps);
  static_cast<A*>(p.mean)[c] = A(mean);
  static_cast<A*>(p.invstd)[c] = A(invstd);
  const auto blend = [&](void* running, double value) {
    write_param(running, p.param_dtype, c,
                p.momentum * value + (1 - p.momentum) * read_param(running, p.param_dtype, c, 0));
  };
  blend(p.running_mean, mean);
  blend(p.running_var, m2 / (count - 1));
  return coefficients<A>(p, c, mean, invstd);
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

template <bool kStream, class S>
FASTNN_INLINE void normalise_plane_to(const BatchNormParams& p, int64_t at, bool add, bool relu,
                                      const Coefficients<acc_t<S>>& k) {
  using V = Vec<acc_t<S>>;
  const S* x = static_cast<const S*>(p.input) + at;
  const S* r = static_cast<const S*>(p.residual) + (add ? at : 0);
  S* y = static_cast<S*>(p.output) + at;
  const V shift = V::set1(k.shift), scale = V::set1(k.scale), offset = V::set1(k.offset);
  for_lanes<V::N>(p.inner, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    write_lanes<kStream>(x + i, add ? r + i : nullptr, y + i, lanes, relu, shift, scale, offset);
  });
}
template <class S>
FASTNN_INLINE void normalise_plane(const BatchNormParams& p, int64_t at, bool add, bool relu, bool stream,
                                   const Coefficients<acc_t<S>>& k) {
  if (stream) normalise_plane_to<true, S>(p, at, add, relu, k);
  else normalise_plane_to<false, S>(p, at, add, relu, k);
}

// Rows [begin, end) with the three coefficient arrays of the workspace.
template <class S>
void normalise_rows(const BatchNormParams& p, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t channels = p.channels;
  const A* shift = static_cast<const A*>(p.workspace);
  const A *scale = shift + channels, *offset = scale + channels;
  with_tail(p.residual, p.relu, [&](bool add, bool relu) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * channels;
      const S* x = static_cast<const S*>(p.input) + at;
      const S* r = static_cast<const S*>(p.residual) + (add ? at : 0);
      S* y = static_cast<S*>(p.output) + at;
      for_lanes<V::N>(channels, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
        write_lanes<false>(x + c, add ? r + c : nullptr, y + c, lanes, relu, load_lanes(shift + c, lanes),
                           load_lanes(scale + c, lanes), load_lanes(offset + c, lanes));
      });
    }
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

// Mean and sum of squared deviations of `channels` neighbouring channels.
template <class S>
void channel_moments(const BatchNormParams& p, const S* x, int64_t channels, double* mean_out, double* m2_out) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t stride = p.channels * p.inner;
  double count = 0, mean[kGroup] = {}, m2[kGroup] = {};
  for_blocks(p.batch, p.inner, stride, [&](int64_t at, int64_t rows, int64_t length) {
    const auto for_planes = [&](const auto& f) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c) f(c, x + at + r * stride + c * p.inner);
    };
    V sums[kGroup], rests[kGroup], squares[kGroup];
    A nears[kGroup];
    for (int64_t c = 0; c < channels; ++c) sums[c] = rests[c] = squares[c] = V::zero();
    for_planes([&](int64_t c, const S* row) __attribute__((always_inline)) {
      V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for_lanes<V::N>(length, [&](int64_t i, int lanes, int k)
                                  __attribute__((always_inline)) { sum[k] = sum[k] + load_lanes(row + i, lanes); });
      sums[c] = sums[c] + join_four(sum);
    });
    const double n = double(rows) * double(length);
    // Close to the block's mean; what it misses is in `rest`.
    for (int64_t c = 0; c < channels; ++c) nears[c] = A(double(reduce_add(sums[c])) / n);
    for_planes([&](int64_t c, const S* row) __attribute__((always_inline)) {
      const A near = nears[c];
      const V vnear = V::set1(near);
      V rest[4] = {V::zero(), V::zero(), V::zero(), V::zero()}, square[4] = {rest[0], rest[0], rest[0], rest[0]};
      for_lanes<V::N>(length, [&](int64_t i, int lanes, int k) __attribute__((always_inline)) {
        const V d = load_lanes(row + i, lanes, near) - vnear;
        rest[k] = rest[k] + d;
        square[k] = fma(d, d, square[k]);
      });
      rests[c] = rests[c] + join_four(rest);
      squares[c] = squares[c] + join_four(square);
    });
    const double total = count + n;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = reduce_add(rests[c]), block_mean = double(nears[c]) + d / n, delta = block_mean - mean[c];
      mean[c] += delta * (n / total);
      m2[c] += double(reduce_add(squares[c])) - d * d / n + delta * delta * (count * n / total);
    }
    count = total;
  });
  for (int64_t c = 0; c < channels; ++c) {
    mean_out[c] = mean[c];
    m2_out[c] = m2[c] > 0 || m2[c] != m2[c] ? m2[c] : 0;
  }
}

// One chunk of rows: for every channel a value near its mean, and the sums of what is left and of its square.
template <class S>
void chunk_moments(const S* x, int64_t rows, int64_t channels, acc_t<S>* near_out) {
  using A = acc_t<S>;
  using V = Vec<A>;
  A *rest_out = near_out + channels, *square_out = rest_out + channels;
  for_tiles<V::N>(channels, [&]<int T, int U>(int64_t c, int lanes) __attribute__((always_inline)) {
    const S* tile = x + c;
    const auto at = [&](int64_t r, int t) { return load_lanes(tile + r * channels + t * V::N, lanes); };
    V sum[1][T], both[2][T], near[T];
    accumulate_rows<1, T, U>(rows, sum, [&](int64_t r, int t, const auto& add) { add(0, at(r, t)); });
    const V scale = V::set1(A(1) / A(rows));
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) near[t] = sum[0][t] * scale;
    accumulate_rows<2, T, U>(rows, both, [&](int64_t r, int t, const auto& add) {
      const V d = at(r, t) - near[t];
      add(0, d);
      add(1, d * d);
    });
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      store_lanes(near[t], near_out + c + t * V::N, lanes);
      store_lanes(both[0][t], rest_out + c + t * V::N, lanes);
      store_lanes(both[1][t], square_out + c + t * V::N, lanes);
    }
  });
}

// Joins the chunks' moments of `width` <= kGroup channels from
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
      channel_moments(p, static_cast<const S*>(p.input) + first * p.inner, count, mean, m2);
      for (int64_t c = 0; c < count; ++c) k[c] = finish_channel<acc_t<S>>(p, first + c, mean[c], m2[c]);
      with_tail(p.residual, p.relu, [&](bool add, bool relu) __attribute__((always_inline)) {
        for (int64_t n = p.batch - 1; n >= 0; --n)  // the planes read last are still in the cache
          for (int64_t c = 0; c < count; ++c)
            normalise_plane<S>(p, (n * p.channels + first + c) * p.inner, add, relu, stream, k[c]);
      });
    }
    end_streams(stream);
  });
}

template <class S>
void sweep_rows(const BatchNormParams& p) {
  parallel_for(0, p.batch, ceil_div(kParallelElements, p.channels),
               [&](int64_t begin, int64_t end) { normalise_rows<S>(p, begin, end); });
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
    double mean[kGroup], m2[kGroup];
    join_chunks<A>(p, first, width, rows, mean, m2);
    for (int64_t i = 0; i < width; ++i)
      store_coefficients(p, first + i, finish_channel<A>(p, first + i, mean[i], m2[i]));
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
    store_coefficients(p, c, coefficients<A>(p, c, mean, invstd));
  }
  if (p.inner == 1) return sweep_rows<S>(p);
  const A* w = static_cast<const A*>(p.workspace);
  const bool stream = streams(p, p.output, 4 << 20);
  parallel_for(0, p.batch * p.channels, ceil_div(kParallelElements, p.inner), [&](int64_t begin, int64_t end) {
    with_tail(p.residual, p.relu, [&](bool add, bool relu) __attribute__((always_inline)) {
      for (int64_t i = begin, c = begin % p.channels; i < end; ++i, c = c + 1 < p.channels ? c + 1 : 0)
        normalise_plane<S>(p, i * p.inner, add, relu, stream, {w[c], w[p.channels + c], w[2 * p.channels + c]});
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
