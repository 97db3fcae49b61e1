// Forward convolution (and, with the weight flipped, gradient of the input) by shifted reads of a padded band.
#include "conv2d_shift.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

namespace {

template <class A>
struct Tile {
  const A* weight;      // [taps][MR]
  const A* band;        // the first position
  const int32_t* taps;  // offset of each tap
  int64_t num_taps;
  int64_t half_stride;  // elements between the two rows of a vector
  const A* bias;        // [MR]
  A* scratch;           // [MR][NV * N], where kStore is false
  float* out;           // kStore: channel m's plane at out + m * out_stride, contiguous
  int64_t out_stride;
  int channels;        // kStore: how many of MR to write
  const Lanes* lanes;  // kStore: [NV]
};
template <class A>
using TileFn = void (*)(const Tile<A>& t);

// acc[m][v] = bias[m] + sum over taps of weight[tap][m] * band[taps[tap] + position v], left in scratch
// or, with kStore, its valid lanes compressed in the register and written straight to the output.
template <class A, int MR, int NV, bool kHalf, bool kStore>
void tile(const Tile<A>& job) {
  const A *w = job.weight, *band = job.band, *bias = job.bias;
  const int32_t* taps = job.taps;
  const int64_t num_taps = job.num_taps, half_stride = job.half_stride;
  using V = Vec<A>;
  using Raw = typename V::Raw;
  Raw acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = V::set1(bias[m]).v;
  // Long sums are cut: each kSumTaps terms are added up on their own, which keeps the rounding error at the level of a
  // blocked product.
  constexpr int64_t kSumTaps = 128;
  Raw total[MR][NV];
  for (int64_t t = 0, stop = min64(kSumTaps, num_taps);; stop = min64(stop + kSumTaps, num_taps)) {
    for (; t < stop; ++t, w += MR) {
      const A* p = band + taps[t];
      Raw x[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        if constexpr (kHalf) x[v] = V::load_halves(p + 2 * v * half_stride, p + (2 * v + 1) * half_stride).v;
        else x[v] = V::load(p + v * V::N).v;
      }
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Raw a = V::set1(w[m]).v;
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] += a * x[v];
      }
    }
    const bool first = stop <= kSumTaps, last = stop == num_taps;
    if (first && last) break;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        if (!first) acc[m][v] += total[m][v];
        if (!last) total[m][v] = acc[m][v], acc[m][v] = Raw{};
      }
    if (last) break;
  }
#if defined(__AVX512F__)
  if constexpr (kStore) {
    __mmask16 from[NV], to[NV];
    float* at[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      from[v] = __mmask16(job.lanes[v].mask);
      to[v] = __mmask16((1u << __builtin_popcount(job.lanes[v].mask)) - 1);
      at[v] = job.out + job.lanes[v].first;
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      if (m >= job.channels) return;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        _mm512_mask_storeu_ps(at[v] + m * job.out_stride, to[v], _mm512_maskz_compress_ps(from[v], (__m512)acc[m][v]));
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) Vec<A>{acc[m][v]}.store(job.scratch + (m * NV + v) * V::N);
}

// tile<A, mr, NV, kHalf, kStore> for a run-time mr in [1, MR].
template <class A, int MR, int NV, bool kHalf, bool kStore>
TileFn<A> find_tile(int mr) {
  if constexpr (MR == 0) return nullptr;
  else return mr == MR ? tile<A, MR, NV, kHalf, kStore> : find_tile<A, MR - 1, NV, kHalf, kStore>(mr);
}
template <class A, bool kHalf, bool kStore>
TileFn<A> find_tile(int mr, int nv) {
  switch (nv) {
    case 2: return find_tile<A, kAccumulators / 2, 2, kHalf, kStore>(mr);
    case 3: return find_tile<A, kAccumulators / 3, 3, kHalf, kStore>(mr);
    case 4: return find_tile<A, kAccumulators / 4, 4, kHalf, kStore>(mr);
  }
  return nullptr;
}

template <class S, class A>
FASTNN_INLINE void store_lanes(Vec<A> v, Lanes l, S* out, int64_t q, int64_t row_stride, int64_t column_stride,
                               bool dense) {
  constexpr uint32_t kAll = uint32_t((uint64_t(1) << Vec<A>::N) - 1);
  if (dense && l.mask == kAll) return v.store(out + l.first);
  A lane[Vec<A>::N];
  v.store(lane);
  int64_t at = l.first;
  for (uint32_t m = l.mask; m; m &= m - 1, ++at) {
    const int64_t to = dense ? at : at / q * row_stride + at % q * column_stride;
    out[to] = from_acc<S>(lane[__builtin_ctz(m)]);
  }
}

template <class S, class A>
void pack_weights(const ConvProblem& d, const ShiftPlan& s, A* packed, A* bias) {
  const S* w = static_cast<const S*>(d.weight);
  const int mr = s.tile.mr;
  for (int64_t b = 0; b < s.k_blocks; ++b)
    for (int m = 0; m < mr; ++m) {
      const int64_t k = b * mr + m;
      A* to = packed + b * s.taps * mr + m;
      bias[k] = k < d.k && d.bias ? to_acc(static_cast<const S*>(d.bias)[k]) : A(0);
      if (k >= d.k) {
        for (int64_t t = 0; t < s.taps; ++t) to[t * mr] = 0;
        continue;
      }
      for (int64_t c = 0; c < d.c; ++c)
        for (int64_t r = 0; r < d.r; ++r)
          for (int64_t q = 0; q < d.s; ++q, to += mr) *to = to_acc(w[k * d.wk + c * d.wc + r * d.wr + q * d.ws]);
    }
}

template <class S, class A>
void run_band(const ConvProblem& d, const ShiftPlan& s, int64_t group, int64_t k_begin, int64_t k_end, const A* packed,
              const A* bias, const int32_t* taps, A* band, Lanes* lanes, int64_t* lanes_rows) {
  constexpr int N = Vec<A>::N;
  const bool dense = d.yw == 1 && d.yh == d.q;
#if defined(__AVX512F__)
  const bool straight = __is_same(S, float) && dense;
#else
  constexpr bool straight = false;
#endif
  TileFn<A> run;
  if constexpr (__is_same(A, float))
    run = straight ? s.half ? find_tile<A, true, true>(s.tile.mr, s.tile.nv)
                            : find_tile<A, false, true>(s.tile.mr, s.tile.nv)
          : s.half ? find_tile<A, true, false>(s.tile.mr, s.tile.nv)
                   : find_tile<A, false, false>(s.tile.mr, s.tile.nv);
  else
    run = s.half ? find_tile<A, true, false>(s.tile.mr, s.tile.nv) : find_tile<A, false, false>(s.tile.mr, s.tile.nv);
  const int64_t p0 = group % s.bands * s.band_p, rows = min64(s.band_p, d.p - p0);
  const int64_t n0 = group / s.bands * s.images, images = min64(s.images, d.n - n0);
  const int64_t vectors = s.half ? ceil_div(rows, 2) : ceil_div((rows - 1) * s.pitch + d.q, N);
  if (*lanes_rows != rows) {
    fill_lanes(lanes, round_up(s.vectors, s.tile.nv), s, N, rows, d.q);
    *lanes_rows = rows;
  }
  const S* x = static_cast<const S*>(d.x) + n0 * d.xn;
  // In place: the image itself serves as the band, but for the very last one, past whose end a tile may read.
  const auto in_place = [&](int64_t i) { return s.in_place && n0 + i + 1 < d.n; };
  for (int64_t i = 0; i < images; ++i)
    if (!in_place(i)) fill_band<S, A>(d, s, x + i * d.xn, p0, rows, band + (s.in_place ? 0 : i * s.image));
  const int mr = s.tile.mr, nv = s.tile.nv;
  alignas(64) A out[kAccumulators * N];
  for (int64_t b = k_begin; b < k_end; ++b) {
    const int channels = int(min64(mr, d.k - b * mr));
    for (int64_t i = 0; i < images; ++i) {
      S* y = static_cast<S*>(d.y) + (n0 + i) * d.yn + b * mr * d.yk + p0 * d.yh;
      const A* image = band + (s.in_place ? 0 : i * s.image);
      if constexpr (__is_same(S, A)) image = in_place(i) ? x + i * d.xn : image;
      for (int64_t v = 0; v < vectors; v += nv) {
        const Tile<A> job{packed + b * s.taps * mr,
                          image + (s.half ? 2 * v * s.pitch : v * N),
                          taps,
                          s.taps,
                          s.pitch,
                          bias + b * mr,
                          out,
                          reinterpret_cast<float*>(y),
                          d.yk,
                          channels,
                          lanes + v};
        run(job);
        if (straight) continue;
        const int count = int(min64(nv, vectors - v));
        for (int m = 0; m < channels; ++m)
          for (int u = 0; u < count; ++u)
            store_lanes<S, A>(Vec<A>::load(out + (m * nv + u) * N), lanes[v + u], y + m * d.yk, d.q, d.yh, d.yw, dense);
      }
    }
  }
}

struct ShiftWorkspace {
  int64_t packed, bias, taps, band, lanes, worker, total;  // byte offsets; one band and one lane list per worker
};
template <class A>
ShiftWorkspace layout(const ShiftPlan& s, int64_t workers) {
  ShiftWorkspace o{};
  const auto pad = [](int64_t bytes) { return round_up(bytes, 64); };
  o.packed = 0;
  o.bias = o.packed + pad(s.k_blocks * s.tile.mr * s.taps * int64_t(sizeof(A)));
  o.taps = o.bias + pad(s.k_blocks * s.tile.mr * int64_t(sizeof(A)));
  o.band = o.taps + pad(s.taps * 4);
  o.lanes = pad(s.buffer * int64_t(sizeof(A)));
  o.worker = o.lanes + pad((s.vectors + 4) * int64_t(sizeof(Lanes)));
  o.total = o.band + workers * o.worker;
  return o;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

template <class S>
int64_t shift_workspace(const ConvProblem& d, int64_t workers) {
  return layout<acc_t<S>>(make_plan<S, acc_t<S>>(d), workers).total;
}

template <class S>
void shift_forward(const ConvProblem& d, int64_t workers, char* workspace) {
  using A = acc_t<S>;
  const ShiftPlan s = make_plan<S, A>(d);
  const ShiftWorkspace o = layout<A>(s, workers);
  A* packed = reinterpret_cast<A*>(workspace + o.packed);
  A* bias = reinterpret_cast<A*>(workspace + o.bias);
  int32_t* taps = reinterpret_cast<int32_t*>(workspace + o.taps);
  fill_taps(d, s, taps);
  pack_weights<S, A>(d, s, packed, bias);
  // Few bands: the channel blocks are shared out as well. Bands that do not come
  // out even: every thread takes its part of the channel blocks of every band.
  const bool uneven = s.groups % workers != 0 && s.groups < 8 * workers;
  const int64_t splits = uneven ? min64(s.k_blocks, workers) : 1;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      char* own = workspace + o.band + w * o.worker;
      int64_t lanes_rows = -1;
      for (int64_t item = w; item < s.groups * splits; item += workers) {
        const int64_t split = item % splits;
        run_band<S, A>(d, s, item / splits, s.k_blocks * split / splits, s.k_blocks * (split + 1) / splits, packed,
                       bias, taps, reinterpret_cast<A*>(own), reinterpret_cast<Lanes*>(own + o.lanes), &lanes_rows);
      }
    }
  });
}

#define FASTNN_INSTANTIATE(S)                                       \
  template int64_t shift_workspace<S>(const ConvProblem&, int64_t); \
  template void shift_forward<S>(const ConvProblem&, int64_t, char*);
FASTNN_INSTANTIATE(float)
FASTNN_INSTANTIATE(double)
FASTNN_INSTANTIATE(bf16)
FASTNN_INSTANTIATE(f16)

}  // namespace fastnn::cpu::FASTNN_ISA_NS
