// Forward pooling of contiguous planes whose rows have fewer windows than a vector has lanes: as many planes as there
// are lanes are transposed at a time, and every lane pools its own plane.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;             // input elements per thread at least
constexpr int64_t kPixels = 65536 / kVecBytes;  // vectors of a tile: it stays in L2

// Outputs of neighbouring planes, and the taps they came from: written when there are as many as lanes.
template <class S, class O>
struct Outputs {
  using A = acc_t<S>;
  using V = Vec<A>;
  using Int = typename V::Int;
  S* y;
  O* taps;        // null where nobody asks
  int64_t pitch;  // from one plane to the next
  int planes;
  int count = 0;
  A values[V::N * V::N], codes[V::N * V::N];

  Outputs(const Pool2dParams& p, int64_t plane, int planes)
      : y(static_cast<S*>(p.output)), taps(static_cast<O*>(p.offsets)), pitch(p.h.out * p.w.out), planes(planes) {
    y += plane * pitch;
    if (taps) taps += plane * pitch;
  }
  FASTNN_VEC_FN void add(V value, Int code = Int{}) {
    value.store(values + count * V::N);
    if (taps) __builtin_memcpy(codes + count * V::N, &code, sizeof(code));
    if (++count == V::N) flush();
  }
  void flush() {
    untranspose_block(values, y, pitch, 1, planes, count);
    y += count;
    if (taps) {
      A rows[V::N * V::N];
      untranspose_block(codes, rows, V::N, 1, V::N, V::N);
      for (int l = 0; l < planes; ++l) {
        Int row;
        __builtin_memcpy(&row, rows + l * V::N, sizeof(row));
        store_taps<A>(row, taps + l * pitch, count);
      }
      taps += count;
    }
    count = 0;
  }
};

// The taps of a window that lie inside its plane, the first of them at `first`, and their distances.
template <class A>
struct Taken {
  const A* first;
  int64_t i0, i1, j0, j1, row_step, column_step;

  // Calls f(value, i, j) for each of them.
  template <class F>
  FASTNN_VEC_FN void each(const F& f) const {
    const A* row = first;
    for (int64_t i = i0; i < i1; ++i, row += row_step) {
      const A* at = row;
      for (int64_t j = j0; j < j1; ++j, at += column_step) f(Vec<A>::load(at), i, j);
    }
  }
};

// Calls pool(outputs, window, oh, ow) for all windows of all planes, in the order of the outputs.
template <class S, class O, class Pool>
void for_windows(const Pool2dParams& p, const Pool& pool) {
  using A = acc_t<S>;
  constexpr int N = Vec<A>::N;
  const Axis h = axis_h(p);
  const int64_t planes = p.batch * p.channels, width = p.w.in, plane_in = h.in * width;
  parallel_for(0, ceil_div(planes, N), max64(1, kGrain / (N * plane_in)), [&](int64_t begin, int64_t end) {
    const Columns w(axis_w(p), 0);
    alignas(kVecBytes) A tile[kPixels * N];
    for (int64_t plane = begin * N; plane < min64(planes, end * N); plane += N) {
      const S* const x = static_cast<const S*>(p.input) + plane * plane_in;
      const int count = int(min64(N, planes - plane));
      Outputs<S, O> outputs(p, plane, count);
      int64_t top = 0, bottom = 0;  // the rows in the tile
      for (int64_t oh = 0; oh < h.out; ++oh) {
        const int64_t first = h.first(oh), i0 = h.begin(oh), i1 = h.end(oh), from = first + i0 * h.dilation;
        if (i0 < i1 && first + (i1 - 1) * h.dilation >= bottom) {
          // Not from: the taps of a padded window, dilated, may begin below the next one's.
          top = max64(0, first), bottom = min64(h.in, top + kPixels / width);
          const int64_t pixels = (bottom - top) * width;
          for (int64_t i = 0; i < pixels; i += N)
            transpose_block(x + top * width + i, plane_in, 1, count, int(min64(N, pixels - i)), tile + i * N);
        }
        for (int64_t o = 0; o < w.count; ++o) {
          const A* at = tile + ((from - top) * width + w.first[o] + w.begin[o] * p.w.dilation) * N;
          pool(outputs, Taken<A>{at, i0, i1, w.begin[o], w.end[o], h.dilation * width * N, p.w.dilation * N}, oh, o);
        }
      }
      if (outputs.count > 0) outputs.flush();
    }
  });
}

template <class S, class O>
void max_forward(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const auto with_taps = [&](auto& outputs, const Taken<A>& window, int64_t, int64_t) __attribute__((always_inline)) {
    V best = V::set1(kLowest<A>);
    Taps<A> taps(window.i0 * p.w.kernel + window.j0);
    window.each([&](V v, int64_t i, int64_t j)
                    __attribute__((always_inline)) { taps.update(best, v, i * p.w.kernel + j); });
    outputs.add(best, taps.taps);
  };
  const auto alone = [&](auto& outputs, const Taken<A>& window, int64_t, int64_t) __attribute__((always_inline)) {
    V best = V::set1(kLowest<A>);
    window.each([&](V v, int64_t, int64_t) __attribute__((always_inline)) { best.v = beats(v, best) ? v.v : best.v; });
    outputs.add(best);
  };
  if (p.offsets) for_windows<S, O>(p, with_taps);
  else for_windows<S, O>(p, alone);
}

template <class S>
void avg_forward(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p), w = axis_w(p);
  for_windows<S, uint8_t>(
      p, [&](auto& outputs, const Taken<A>& window, int64_t oh, int64_t ow) __attribute__((always_inline)) {
        V sum = V::zero();
        window.each([&](V v, int64_t, int64_t) __attribute__((always_inline)) { sum = sum + v; });
        const int64_t taps = h.count(oh, p.count_include_pad) * w.count(ow, p.count_include_pad);
        outputs.add(sum / V::set1(A(p.divisor ? p.divisor : taps)));
      });
}

}  // namespace

bool fits_planes(const Pool2dParams& p) {
  const int64_t reach = (p.h.kernel - 1) * p.h.dilation + 1;
  if (p.w.out > Columns::kMost || min64(p.h.in, reach) * p.w.in > kPixels) return false;
  return 2 * p.batch * p.channels >= lanes_of(p);
}

Status max_pool2d_forward_planes(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) max_forward<S, int32_t>(p);
    else max_forward<S, uint8_t>(p);
    return Status::ok;
  });
}
Status avg_pool2d_forward_planes(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    avg_forward<S>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
