// The row kernels' buffer: rows of a plane, widened to the accumulator's type, with the padding written out, so that
// every tap of every lane is a plain load.
#pragma once
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

constexpr int64_t kBuffer = 4096;   // elements: 16 KB of floats stay in L1
constexpr int64_t kSlack = 160;     // what the last row's vectors may read past the end
constexpr int64_t kTileOut = 1024;  // outputs of a tile at most

// Output columns [begin, end) and the input columns their windows read.
struct Tile {
  int64_t begin, end;
  int64_t left;      // columns of padding before the first valid one
  int64_t from, to;  // valid input columns
  int64_t pitch;     // of a buffer row
};

// How many outputs a tile has when `rows` rows of it share the buffer; less than 1 when they do not fit.
FASTNN_INLINE int64_t tile_outputs(const Pool2dParams& p, int64_t rows) {
  const int64_t room = kBuffer / rows - reach_of(p.w);
  return room < 0 ? 0 : min64(min64(room / p.w.stride + 1, kTileOut), p.w.out);
}
FASTNN_INLINE Tile tile_at(const Axis& w, int64_t begin, int64_t outputs) {
  Tile t;
  t.begin = begin;
  t.end = min64(w.out, begin + outputs);
  const int64_t first = begin * w.stride - w.padding;
  t.pitch = (t.end - t.begin - 1) * w.stride + reach_of(w);
  t.left = min64(max64(0, -first), t.pitch);
  t.from = max64(0, first);
  t.to = max64(t.from, min64(w.in, first + t.pitch));
  return t;
}

template <class A>
FASTNN_INLINE void fill(A* p, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// Lanes at p, p + stride, p + 2 stride ...; kStride 0 is any stride, and reads no more than `count` lanes.
template <int kStride, class A>
FASTNN_INLINE Vec<A> load_strided(const A* p, int64_t stride, int count) {
  using V = Vec<A>;
  if constexpr (kStride == 1) return V::load(p);
  else if constexpr (kStride == 2) return evens(V::load(p), V::load(p + V::N));
  if (stride == 3) {  // as in MaxPool2d(3): 2 shuffles instead of a scalar load for each lane
    const V ab = pick_lanes<[](int i, int n) { return 3 * i < 2 * n ? 3 * i : 0; }>(V::load(p), V::load(p + V::N));
    return pick_lanes<[](int i, int n) { return 3 * i < 2 * n ? i : 3 * i - n; }>(ab, V::load(p + 2 * V::N));
  }
  A lanes[V::N] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i * stride];
  return V::load(lanes);
}

// Calls f(stride constant, kernel width constant) for the pairs worth a copy of the code; 0 stands for any.
template <class F>
FASTNN_INLINE void dispatch_windows(const PoolAxis& w, const F& f) {
  using Any = Constant<0>;
  using One = Constant<1>;
  using Two = Constant<2>;
  using Three = Constant<3>;
  const bool three = w.kernel == 3 && w.dilation == 1;
  if (w.stride == 1) return three ? f(One{}, Three{}) : f(One{}, Any{});
  if (w.stride == 2) return three ? f(Two{}, Three{}) : f(Two{}, Any{});
  return f(Any{}, Any{});
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
