// Backward pooling of contiguous planes, without scattering: each input row gathers the gradients of the windows that
// cover it, one residue of the stride per accumulator.
#include "pool2d_rows.h"

#include "../../parallel.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least
constexpr int64_t kMaxStride = 4;    // accumulators
constexpr int64_t kMaxTaps = 255;

// Input columns q * stride + residue; tap j of output q - lag(j) reaches residue(j).
struct Lags {
  int residue[kMaxTaps];
  int lag[kMaxTaps];
  int64_t behind, ahead;  // how far outputs before and after q are read

  explicit Lags(const PoolAxis& w) : behind(0), ahead(0) {
    for (int64_t j = 0; j < w.kernel; ++j) {
      const int64_t at = j - w.padding;
      residue[j] = int(((at % w.stride) + w.stride) % w.stride);
      lag[j] = int((at - residue[j]) / w.stride);
      behind = max64(behind, lag[j]);
      ahead = max64(ahead, -lag[j]);
    }
  }
};

#if defined(__AVX512F__)
// Lanes 16 * part ... of a0 b0 c0 a1 b1 c1 ...
FASTNN_INLINE Vec<float> interleave3(Vec<float> a, Vec<float> b, Vec<float> c, int part) {
  i32v from_ab, from_c;
  unsigned is_c = 0;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int at = 16 * part + i;
    from_ab[i] = at / 3 + (at % 3 == 1 ? 16 : 0);
    from_c[i] = at / 3;
    is_c |= unsigned(at % 3 == 2) << i;
  }
  const __m512 ab = _mm512_permutex2var_ps(a.v, (__m512i)from_ab, b.v);
  return {_mm512_mask_permutexvar_ps(ab, __mmask16(is_c), (__m512i)from_c, c.v)};
}
#endif

// One vector per residue to `left` neighbouring columns at dx.
template <int kStride, class S, class A = acc_t<S>>
FASTNN_INLINE void store_residues(const Vec<A>* sums, int64_t stride, S* dx, int64_t left) {
  using V = Vec<A>;
  if constexpr (kStride == 1) {
    store_upto(sums[0], dx, left);
  } else if constexpr (kStride == 2) {
    store_upto(interleave_low(sums[0], sums[1]), dx, left);
    store_upto(interleave_high(sums[0], sums[1]), dx + V::N, left - V::N);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(A, float)) {
      if (stride == 3) {
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part)
          store_upto(interleave3(sums[0], sums[1], sums[2], part), dx + part * V::N, left - part * V::N);
        return;
      }
    }
#endif
    const A* lanes = reinterpret_cast<const A*>(sums);
    for (int64_t i = 0, q = 0; i < left && q < V::N; ++q)
      for (int64_t c = 0; c < stride && i < left; ++c, ++i) dx[i] = from_acc<S>(lanes[c * V::N + q]);
  }
}

// Gradients of output rows [top, bottom), columns [begin - behind, end + ahead), zero outside the plane.
struct Window {
  int64_t top, bottom;
  int64_t from, columns;
};

template <class S, class A, class Scale>
void copy_row(const S* g, int64_t out, const Window& w, A* to, const Scale& scale) {
  using V = Vec<A>;
  const int64_t from = max64(0, w.from), end = max64(from, min64(out, w.from + w.columns)),
                left = min64(from - w.from, w.columns);
  for_vectors<V::N>(
      end - from, [&](int64_t i, int lanes) { scale(from + i, load_some(g + from + i, lanes)).store(to + left + i); });
  fill(to, left, A(0));
  fill(to + left + (end - from), w.columns - left - (end - from), A(0));
}
FASTNN_INLINE void copy_taps(const uint8_t* taps, int64_t out, const Window& w, uint8_t* to) {
  const int64_t from = max64(0, w.from), end = max64(from, min64(out, w.from + w.columns)),
                left = min64(from - w.from, w.columns);
  __builtin_memset(to, 0, uint64_t(w.columns));
  __builtin_memcpy(to + left, taps + from, uint64_t(end - from));
}

// One input row: sums(q, accumulators) for every vector of q, then stored.
template <int kStride, class S, class Sums>
FASTNN_INLINE void write_row(S* dx, int64_t n, int64_t stride, const Sums& sums) {
  using V = Vec<acc_t<S>>;
  for (int64_t q = 0; q * stride < n; q += V::N) {
    V acc[kStride ? kStride : kMaxStride];
#pragma GCC unroll 4
    for (int c = 0; c < (kStride ? kStride : int(kMaxStride)); ++c) acc[c] = V::zero();
    sums(q, acc);
    store_residues<kStride>(acc, stride, dx + q * stride, n - q * stride);
  }
}

// The windows that cover one input row: where their gradients lie in the buffer, and the code of their first tap there.
struct Cover {
  int64_t at, code;
};

// kOdd: whether tap 0 reaches residue 1 (stride 2 only).
template <int kStride, int kKernel, bool kOdd, class S>
FASTNN_INLINE void max_row(const Pool2dParams& p, const Lags& lags, const Cover* covers, int64_t count,
                           const acc_t<S>* g, const uint8_t* taps, S* dx, int64_t n) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t kernel = kKernel == 3 ? 3 : p.w.kernel;
  const int64_t lag0 = lags.lag[0], lag1 = lags.lag[kKernel == 3], lag2 = lags.lag[kKernel == 3 ? 2 : 0];
  write_row<kStride>(dx, n, kStride ? kStride : p.w.stride, [&](int64_t q, V* acc) __attribute__((always_inline)) {
    for (const Cover *cover = covers, *end = covers + count; cover != end; ++cover) {
      const int64_t at = cover->at + q, code = cover->code;
      if constexpr (kKernel == 3) {
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const int c = kStride == 1 ? 0 : (j + (kOdd ? 1 : 0)) % 2;
          const int64_t from = at - (j == 0 ? lag0 : j == 1 ? lag1 : lag2);
          acc[c] = add_where_bytes(acc[c], taps + from, code + j, V::load(g + from));
        }
      } else {
        for (int64_t j = 0; j < kernel; ++j) {
          const int64_t from = at - lags.lag[j];
          V& sum = acc[kStride == 1 ? 0 : lags.residue[j]];
          sum = add_where_bytes(sum, taps + from, code + j, V::load(g + from));
        }
      }
    }
  });
}

template <int kStride, int kKernel, bool kOdd, class A, class S>
FASTNN_INLINE void avg_row(const Pool2dParams& p, const Lags& lags, const A* row, S* dx, int64_t n) {
  using V = Vec<A>;
  write_row<kStride>(dx, n, p.w.stride, [&](int64_t q, V* acc) {
    const A* at = row + lags.behind + q;
    if constexpr (kKernel == 3) {
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        constexpr int first = kOdd ? 1 : 0;
        const int c = kStride == 1 ? 0 : (j + first) % 2;
        acc[c] = acc[c] + V::load(at - lags.lag[j]);
      }
    } else {
      for (int64_t j = 0; j < p.w.kernel; ++j) {
        V& sum = acc[kStride == 1 ? 0 : lags.residue[j]];
        sum = sum + V::load(at - lags.lag[j]);
      }
    }
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Outputs of a tile that `rows` buffered rows allow; less than 1 when none fit.
FASTNN_INLINE int64_t tile_columns(const Pool2dParams& p, const Lags& lags, int64_t rows) {
  return min64(kBuffer / rows - lags.behind - lags.ahead - 64, ceil_div(p.w.in, p.w.stride));
}
// Most output rows that cover one input row.
FASTNN_INLINE int64_t covering_rows(const PoolAxis& h) { return (reach_of(h) - 1) / h.stride + 1; }

// Calls f(plane, first input row, last, tile of q, window, buffers) for blocks whose windows fit the buffer.
template <class A, class F>
void for_blocks(const Pool2dParams& p, const Lags& lags, const F& f) {
  const Axis h = axis_h(p);
  const int64_t width = tile_columns(p, lags, covering_rows(h));
  const int64_t grain = max64(1, kGrain / p.w.in);
  parallel_for(0, p.batch * p.channels * h.in, grain, [&](int64_t begin, int64_t end) {
    for (int64_t column = 0; column * p.w.stride < p.w.in; column += width) {
      Window window;
      window.from = column - lags.behind;
      const int64_t q_count = min64(width, ceil_div(p.w.in - column * p.w.stride, p.w.stride));
      window.columns = q_count + lags.behind + lags.ahead;
      // Rows of the buffer, and the input rows that so many output rows complete.
      const int64_t room = (kBuffer - 64) / window.columns;
      const int64_t rows = max64(1, (room - covering_rows(h)) * h.stride);
      for (int64_t r = begin, next; r < end; r = next) {
        const int64_t plane = r / h.in, first = plane * h.in;
        next = min64(min64(r + rows, end), first + h.in);
        window.top = h.low(r - first);
        window.bottom = max64(window.top, h.high(next - 1 - first));
        f(plane, r - first, next - first, column, min64(p.w.in - column * p.w.stride, q_count * p.w.stride), window);
      }
    }
  });
}

template <int kStride, int kKernel, bool kOdd, class S>
void max_backward(const Pool2dParams& p) {
  using A = acc_t<S>;
  const Axis h = axis_h(p);
  const Lags lags(p.w);
  for_blocks<A>(p, lags,
                [&](int64_t plane, int64_t begin, int64_t end, int64_t column, int64_t n, const Window& window) {
                  A g[kBuffer + kSlack];
                  uint8_t taps[kBuffer + kSlack];
                  for (int64_t oh = window.top; oh < window.bottom; ++oh) {
                    const int64_t from = (plane * h.out + oh) * p.w.out, to = (oh - window.top) * window.columns;
                    copy_row(static_cast<const S*>(p.grad_output) + from, p.w.out, window, g + to,
                             [](int64_t, Vec<A> v) { return v; });
                    copy_taps(static_cast<const uint8_t*>(p.offsets) + from, p.w.out, window, taps + to);
                  }
                  S* dx = static_cast<S*>(p.grad_input) + plane * h.in * p.w.in + column * p.w.stride;
                  for (int64_t ih = begin; ih < end; ++ih) {
                    Cover covers[kMaxTaps];
                    int64_t count = 0;
                    for (int64_t oh = h.low(ih), high = h.high(ih); oh < high; ++oh) {
                      const int64_t i = h.tap(ih, oh);
                      if (i >= 0) covers[count++] = {(oh - window.top) * window.columns + lags.behind, i * p.w.kernel};
                    }
                    max_row<kStride, kKernel, kOdd>(p, lags, covers, count, g, taps, dx + ih * p.w.in, n);
                  }
                });
}

template <int kStride, int kKernel, bool kOdd, class S>
void avg_backward(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p), w = axis_w(p);
  const Lags lags(p.w);
  for_blocks<A>(
      p, lags, [&](int64_t plane, int64_t begin, int64_t end, int64_t column, int64_t n, const Window& window) {
        A g[kBuffer + kSlack], row[kBuffer + kSlack], counts[kBuffer + kSlack];
        const int64_t first = max64(0, window.from), last = min64(w.out, window.from + window.columns);
        bool uniform = true;
        for (int64_t ow = first; ow < last; ++ow) {
          counts[ow - first] = A(p.divisor ? 1 : w.count(ow, p.count_include_pad));
          uniform = uniform && counts[ow - first] == counts[0];
        }
        for (int64_t oh = window.top; oh < window.bottom; ++oh) {
          const int64_t from = (plane * h.out + oh) * w.out, to = (oh - window.top) * window.columns;
          const S* source = static_cast<const S*>(p.grad_output) + from;
          const int64_t rows = p.divisor ? p.divisor : h.count(oh, p.count_include_pad);
          const Divide<A> divide(uniform && last > first ? rows * int64_t(counts[0]) : 1);
          if (uniform) copy_row(source, w.out, window, g + to, [&](int64_t, V v) { return divide(v); });
          else
            copy_row(source, w.out, window, g + to,
                     [&](int64_t ow, V v) { return v / (V::load(counts + (ow - first)) * V::set1(A(rows))); });
        }
        S* dx = static_cast<S*>(p.grad_input) + plane * h.in * w.in + column * w.stride;
        for (int64_t ih = begin; ih < end; ++ih) {
          const int64_t low = h.low(ih), high = h.high(ih);
          const A* source = g + (low - window.top) * window.columns;
          if (high - low != 1) {  // the rows that cover this one, added up
            for (int64_t c = 0; c < window.columns; c += V::N) {
              V sum = V::zero();
              for (int64_t k = 0; k < high - low; ++k) sum = sum + V::load(source + k * window.columns + c);
              sum.store(row + c);
            }
            source = row;
          }
          avg_row<kStride, kKernel, kOdd>(p, lags, source, dx + ih * w.in, n);
        }
      });
}

template <class F>
void dispatch_backward(const Pool2dParams& p, const F& f) {
  dispatch_windows(p.w, [&](auto stride, auto kernel) {
    if constexpr (decltype(stride)::value == 2 && decltype(kernel)::value == 3) {
      if (p.w.padding % 2) return f(stride, kernel, Constant<1>{});
    }
    f(stride, kernel, Constant<0>{});
  });
}

}  // namespace

bool fits_rows_backward(const Pool2dParams& p) {
  if (p.adaptive || p.wide || p.w.dilation != 1 || p.w.stride > kMaxStride || p.w.kernel > kMaxTaps) return false;
  const Lags lags(p.w);
  return tile_columns(p, lags, covering_rows(p.h) + 1) >= min64(32, ceil_div(p.w.in, p.w.stride));
}

Status max_pool2d_backward_rows(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    dispatch_backward(p, [&](auto stride, auto kernel, auto odd) {
      max_backward<decltype(stride)::value, decltype(kernel)::value, decltype(odd)::value,
                   typename decltype(tag)::type>(p);
    });
    return Status::ok;
  });
}

Status avg_pool2d_backward_rows(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    dispatch_backward(p, [&](auto stride, auto kernel, auto odd) {
      avg_backward<decltype(stride)::value, decltype(kernel)::value, decltype(odd)::value,
                   typename decltype(tag)::type>(p);
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
