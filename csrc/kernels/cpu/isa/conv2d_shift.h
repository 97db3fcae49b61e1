// Convolution without im2col, shared parts: a padded copy of a band
// of the image is read at shifted addresses, one shift per tap.
//
// Rows of the band have pitch >= Q, so output (p, q) sits at flat position p * pitch + q and tap (c, r, s) reads the
// band at that position plus a constant. A register tile of MR output channels x NV vectors of flat positions then runs
// over all taps with nothing but loads and FMAs. Lanes past the end of a row compute garbage that is dropped when the
// tile is stored: Q / pitch of the work is useful. Narrow images (Q at most half a vector) put two rows in one vector
// instead. A stride splits the band into phases: rows r mod
// stride_h and columns s mod stride_w become planes of their own.
#pragma once
#include "../../parallel.h"
#include "conv2d_problem.h"
#include "lanes.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
constexpr int kAccumulators = 28;  // of 32 registers
#else
constexpr int kAccumulators = 12;  // of 16
#endif

// Which lanes of a vector are outputs, and where the first of them goes in an image's [P, Q] plane.
struct Lanes {
  uint32_t mask;
  int32_t first;
};

// The tile that wastes least on `k` channels and `vectors` vectors; ties go to the tile with more channels.
struct TileShape {
  int mr, nv;
};
inline TileShape choose_tile(int64_t k, int64_t vectors) {
  TileShape best{1, 4};
  double best_cost = 1e300;
  for (int nv = 2; nv <= 4; ++nv) {
    const int max_mr = kAccumulators / nv;
    const int64_t blocks = ceil_div(k, max_mr);
    const int mr = int(ceil_div(k, blocks));
    // Cycles per tap: two FMAs a cycle against two loads a cycle (a vector that crosses a cache line is two loads).
    const double fma = mr * nv / 2.0, loads = (2.0 * nv + mr) / 2.0, latency = 4;
    double cycles = fma > loads ? fma : loads;
    cycles = (cycles > latency ? cycles : latency) + 0.5;
    const double cost = double(blocks) * double(ceil_div(vectors, nv)) * cycles;
    if (cost < best_cost) best_cost = cost, best = {mr, nv};
  }
  return best;
}

struct ShiftPlan {
  int64_t phases_h, phases_w;  // planes per channel
  int64_t reach_h, reach_w;    // rows and columns a plane has beyond the outputs'
  int64_t pitch;               // elements per plane row
  int64_t band_p;              // output rows per band
  int64_t bands;               // bands per image
  int64_t images;              // images per band (1 when bands > 1)
  int64_t groups;              // ceil(n / images) * bands
  int64_t plane;               // elements per plane
  int64_t image;               // elements per image in the band buffer
  int64_t buffer;              // elements of the band buffer
  int64_t taps;
  int64_t vectors;  // per image of a whole band
  TileShape tile;
  int64_t k_blocks;
  bool half;
  bool in_place;  // stride 1, no padding, dense rows: the image is its own band
};

template <class S, class A>
ShiftPlan make_plan(const ConvProblem& d) {
  constexpr int64_t kBandBytes = 256 << 10;  // a quarter of L2
  constexpr int N = Vec<A>::N;
  ShiftPlan s{};
  s.phases_h = min64(d.stride_h, (d.r - 1) * d.dil_h + 1);
  s.phases_w = min64(d.stride_w, (d.s - 1) * d.dil_w + 1);
  s.reach_h = (d.r - 1) * d.dil_h / d.stride_h;
  s.reach_w = (d.s - 1) * d.dil_w / d.stride_w;
  s.pitch = d.q + s.reach_w;
  s.taps = d.c * d.r * d.s;
  s.half = d.q <= N / 2 && d.p > 1;
  // Tiles may read past the last output: at most 4 vectors, or 8 rows in half mode.
  const int64_t past = max64(4 * N, 8 * s.pitch + N);
  s.in_place = __is_same(S, A) && d.stride_h == 1 && d.stride_w == 1 && d.pad_h == 0 && d.pad_w == 0 && d.xw == 1 &&
               d.xh == s.pitch && d.w == s.pitch && d.h == d.p + s.reach_h && d.xc == d.h * d.w &&
               d.c * d.h * d.w >= past &&                               // which the next image has to hold
               d.c * d.h * d.w * int64_t(sizeof(A)) <= 2 * kBandBytes;  // beyond that, a copied band that stays in L2
  const int64_t row = d.c * s.phases_h * s.phases_w * s.pitch * int64_t(sizeof(A));
  const int64_t rows = s.in_place ? d.p : max64(2, kBandBytes / max64(1, row) - s.reach_h);
  s.bands = max64(1, ceil_div(d.p, rows));
  if (s.bands > 1 && d.n * s.bands < 16) s.bands = min64(d.p, round_up(s.bands, 4));  // even shares for a few threads
  s.band_p = ceil_div(d.p, s.bands);
  s.bands = ceil_div(d.p, s.band_p);
  s.plane = (s.band_p + s.reach_h) * s.pitch;
  s.image = d.c * s.phases_h * s.phases_w * s.plane;
  s.images = s.bands > 1 ? 1 : max64(1, min64(d.n, kBandBytes / max64(1, s.image * int64_t(sizeof(A)))));
  s.groups = ceil_div(d.n, s.images) * s.bands;
  s.buffer = (s.in_place ? 1 : s.images) * s.image + past + N;
  s.vectors = s.half ? ceil_div(s.band_p, 2) : ceil_div((s.band_p - 1) * s.pitch + d.q, N);
  s.tile = choose_tile(d.k, s.vectors);
  s.k_blocks = ceil_div(d.k, s.tile.mr);
  return s;
}

inline void fill_lanes(Lanes* lanes, int64_t count, const ShiftPlan& s, int N, int64_t rows, int64_t q) {
  for (int64_t v = 0; v < count; ++v) {
    Lanes l{0, 0};
    for (int i = N - 1; i >= 0; --i) {
      const int64_t flat = v * N + i;
      const int64_t row = s.half ? 2 * v + (i >= N / 2) : flat / s.pitch;
      const int64_t column = s.half ? i % (N / 2) : flat % s.pitch;
      if (row >= rows || column >= q) continue;
      l.mask |= 1u << i;
      l.first = int32_t(row * q + column);
    }
    lanes[v] = l;
  }
}

// Copies one image's rows for output rows [p0, p0 + rows) into `band`, padded and split into phases.
template <class S, class A>
void fill_band(const ConvProblem& d, const ShiftPlan& s, const S* x, int64_t p0, int64_t rows, A* band) {
  for (int64_t c = 0; c < d.c; ++c)
    for (int64_t a = 0; a < s.phases_h; ++a)
      for (int64_t b = 0; b < s.phases_w; ++b) {
        A* plane = band + ((c * s.phases_h + a) * s.phases_w + b) * s.plane;
        // Columns i with 0 <= i * stride_w + b - pad_w < w.
        const int64_t shift = b - d.pad_w;
        const int64_t begin = min64(s.pitch, shift >= 0 ? 0 : ceil_div(-shift, d.stride_w));
        const int64_t end = max64(begin, min64(s.pitch, d.w - shift <= 0 ? 0 : ceil_div(d.w - shift, d.stride_w)));
        for (int64_t j = 0; j < rows + s.reach_h; ++j) {
          A* to = plane + j * s.pitch;
          const int64_t ih = (p0 + j) * d.stride_h + a - d.pad_h;
          int64_t i = 0;
          if (ih >= 0 && ih < d.h) {
            const S* from = x + c * d.xc + ih * d.xh + shift * d.xw;
            for (; i < begin; ++i) to[i] = 0;
            const int64_t step = d.stride_w * d.xw;
            if (step == 1) {
              for (; i + Vec<A>::N <= end; i += Vec<A>::N) Vec<A>::load(from + i).store(to + i);
              if (i < end) Vec<A>::load_n(from + i, end - i).store_n(to + i, end - i);
            } else {
              using V = Vec<A>;
              const auto pair = [&](const S* at) { return evens(V::load(at), V::load(at + V::N)); };
              if (step == 2)
                for (; i + V::N <= end && (i + V::N) * 2 + shift <= d.w; i += V::N) pair(from + 2 * i).store(to + i);
              if (step == 4)
                for (; i + V::N <= end && (i + V::N) * 4 + shift <= d.w; i += V::N)
                  evens(pair(from + 4 * i), pair(from + 4 * i + 2 * V::N)).store(to + i);
              for (; i < end; ++i) to[i] = to_acc(from[i * step]);
            }
            i = end;
          }
          for (; i < s.pitch; ++i) to[i] = 0;
        }
      }
}

// The constant each tap (c, r, s) adds to a position in the band.
inline void fill_taps(const ConvProblem& d, const ShiftPlan& s, int32_t* taps) {
  const int64_t rs = d.r * d.s;
  for (int64_t t = 0; t < s.taps; ++t) {
    const int64_t c = t / rs, r = t % rs / d.s * d.dil_h, q = t % d.s * d.dil_w;
    taps[t] = int32_t(((c * s.phases_h + r % d.stride_h) * s.phases_w + q % d.stride_w) * s.plane +
                      r / d.stride_h * s.pitch + q / d.stride_w);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
