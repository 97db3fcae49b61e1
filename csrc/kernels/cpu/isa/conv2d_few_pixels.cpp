// Convolution of few output pixels as a product whose rows are the weight's, read where they lie: they are most of what
// such a layer reads, and copying them into panels, as conv2d_gemm.cpp does, takes a fifth of its time. The pixels
// become panels instead, once for all threads. One to four pixels past the last whole vector (7x7, 14x14) are dot
// products with rows that the tiles have just read, rather than a vector of mostly empty lanes.
#include "conv2d_im2col.h"
#include "gemm_dot.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Axis = ConvStore::Axis;

constexpr int64_t kMaxRest = min64(V::N / 4, kDotRows);
constexpr int64_t kMaxChunk = 1024, kChunkBytes = 512 << 10;  // taps of a chunk; all pixels' panels of it stay in L2

struct Plan {
  int64_t taps;
  int64_t lanes, rest;  // pixels in panels and past them
  int64_t width;        // of all panels together
  int64_t tiles;        // of rows
  int mr;
  int64_t kc, sum_k;
  int64_t packed;  // elements: the panels of a chunk, then all taps of the rest
  int64_t bytes() const { return round_up(packed + rest * taps, 16) * int64_t(sizeof(float)); }
};
// As many for every thread that has enough to do, with fewer rows each: on two threads NHWC 32x16x16->64 3x3/2
// takes 22.1 us instead of 24.2, NCHW 256x14x14->64 35.4 instead of 41.9.
int64_t even_tiles(int64_t tiles, int64_t products) {
  const int64_t workers = max64(1, min64(num_threads(), products / kGemmThreadFma));
  return tiles < 8 * workers ? round_up(tiles, workers) : tiles;
}
Plan make_plan(const ConvProblem& d) {
  const int64_t pixels = d.n * d.p * d.q;
  Plan p{};
  p.taps = d.c * d.r * d.s;
  p.rest = pixels > V::N && pixels % V::N <= kMaxRest ? pixels % V::N : 0;
  p.lanes = pixels - p.rest;
  p.width = round_up(p.lanes, V::N);
  const int64_t tiles = ceil_div(d.k, gemm_rows_in_place<float>(d.wk));
  p.mr = int(ceil_div(d.k, even_tiles(tiles, d.k * p.lanes * p.taps)));
  p.tiles = ceil_div(d.k, p.mr);
  const int64_t max_chunk = min64(kMaxChunk, kChunkBytes / (p.width * int64_t(sizeof(float))));
  const int64_t chunk = ceil_div(p.taps, ceil_div(p.taps, max_chunk)), sums = ceil_div(chunk, kGemmSum);
  p.sum_k = ceil_div(chunk, sums);
  p.kc = p.sum_k * sums;
  p.packed = round_up(p.width * min64(p.kc, p.taps), 16);
  return p;
}

// A weight's row as it lies in memory, in the order of taps that the image's layout asks for.
bool row_dense(const ConvProblem& d) {
  if (d.r * d.s == 1) return d.wc == 1;
  if (channels_together(d)) return d.wc == 1 && d.ws == d.c && d.wr == d.s * d.c;
  return d.ws == 1 && d.wr == d.s && d.wc == d.r * d.s;
}

// Lanes [n0, n0 + nb) of taps [k0, k0 + kb).
GemmPanel<float> pack(const ConvProblem& d, float* to, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) {
  if (!channels_together(d)) return pack_pixel_columns(d, to, nr, k0, kb, n0, nb);
  for (int64_t k = 0; k < kb; k += kMaxKc)
    pack_pixel_rows<kNr>(d, to + k * nr, nr, n0, nb, k0 + k, min64(kMaxKc, kb - k));
  return {to, nr};
}

void pack_rest(const ConvProblem& d, const Plan& p, float* to) {
  float scratch[kMaxRest * kMaxKc + V::N];
  for (int64_t k0 = 0; k0 < p.taps; k0 += kMaxKc) {
    const int64_t kb = min64(kMaxKc, p.taps - k0);
    const GemmPanel<float> from = pack(d, scratch, int(p.rest), k0, kb, p.lanes, int(p.rest));
    for (int64_t i = 0; i < p.rest; ++i)
      for (int64_t k = 0; k < kb; ++k) to[i * p.taps + k0 + k] = from.p[k * from.ld + i];
  }
}

// Lanes [n0, n0 + nb) of taps [k0, k0 + kb) at `to`, or where they lie in the image.
GemmPanel<float> panel(const ConvProblem& d, float* to, int64_t k0, int64_t kb, int64_t n0, int nb, bool write) {
  const int nr = nb > V::N ? kNr : V::N;
  if (d.n == 1 && is_pointwise(d) && !channels_together(d) && d.xw == 1 && nb == nr)
    return {static_cast<const float*>(d.x) + k0 * d.xc + n0, d.xc};
  if (write) {
    const GemmPanel<float> from = pack(d, to, nr, k0, kb, n0, nb);
    if (from.p != to)  // of one of several images
      for (int64_t k = 0; k < kb; ++k)
        for (int j = 0; j < nr; j += V::N) V::load(from.p + k * from.ld + j).store(to + k * nr + j);
  }
  return {to, nr};
}

// Products of a tile of rows with the rest of the pixels, added to y. Rows go in fours, wherever tiles begin (one alone
// is rounded in another order): a tile takes the fours that begin in it.
void add_rest(const ConvProblem& d, const Plan& p, const float* rest, int64_t tile, int64_t k0, int64_t kb) {
  const int64_t m0 = min64(d.k, round_up(tile * p.mr, 4)), m1 = min64(d.k, round_up((tile + 1) * p.mr, 4));
  const float *const w = static_cast<const float*>(d.weight) + k0, *const bias = static_cast<const float*>(d.bias);
  float sums[kMaxRest * kDotGroup] = {};
  for (int64_t m = m0; m < m1;) {
    const int count = m1 - m >= 4 ? 4 : 1;
    dot_tile_of<float, int(kMaxRest)>(int(p.rest), count)(kb, rest + k0, p.taps, w + m * d.wk, d.wk, sums + (m - m0));
    m += count;
  }
  for (int64_t i = 0; i < p.rest; ++i) {
    const int64_t pixel = p.lanes + i, row = pixel / d.q;
    float* const y = static_cast<float*>(d.y) + row / d.p * d.yn + row % d.p * d.yh + pixel % d.q * d.yw;
    for (int64_t m = m0; m < m1; ++m) {
      float& to = y[m * d.yk];
      to = sums[i * kDotGroup + m - m0] + (k0 ? to : bias ? bias[m] : 0.f);
    }
  }
}

template <class Store>
void multiply(const ConvProblem& d, const Plan& p, float* packed, const float* rest, const Store& store) {
  const float* const w = static_cast<const float*>(d.weight);
  for (int64_t k0 = 0; k0 < p.taps; k0 += p.kc) {
    const int64_t kb = min64(p.kc, p.taps - k0);
    const bool first = k0 == 0, last = k0 + kb == p.taps;
    const auto lanes = [&](int64_t n) { return int(min64(kNr, p.lanes - n)); };
    parallel_for(0, ceil_div(p.lanes, kNr), max64(1, (1 << 14) / (kNr * kb)), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * kNr; n < min64(p.lanes, end * kNr); n += kNr)
        panel(d, packed + n * kb, k0, kb, n, lanes(n), true);
    });
    const int64_t grain = max64(1, kGemmThreadFma / (p.mr * kb * p.width));
    parallel_for(0, p.tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t m0 = tile * p.mr, m1 = min64(d.k, m0 + p.mr);
        const GemmRows<float> rows{w + m0 * d.wk + k0, d.wk};
        for (int64_t n = 0; n < p.lanes; n += kNr)
          gemm_strip_rows<float, kGemmMaxMr>(int(m1 - m0), rows, panel(d, packed + n * kb, k0, kb, n, lanes(n), false),
                                             kb, p.sum_k, m0, m1, n, lanes(n), store, first, last);
        if (p.rest) add_rest(d, p, rest, tile, k0, kb);
      }
    });
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

// Against conv2d_gemm.cpp's ways of 3000 random layers (one thread, their weights in cache): NCHW x1.15, NHWC 3x3 x1.1.
// Pointwise NHWC packs pixels by transposing them and stores tiles so: it pays where the weight is much larger (from
// memory 512x7x7->2048 x1.4, 256x14x14->1024 x1.04; 384x14x14->64 would be x0.85), and not where a vector is eight
// lanes: of 16 such layers packing took x0.51 to x1.06 of its time (geometric mean x0.82).
bool few_pixels_takes(const ConvProblem& d) {
  const int64_t pixels = d.n * d.p * d.q, taps = d.c * d.r * d.s;
  if (pixels > 256 || !row_dense(d)) return false;
  if (!channels_together(d)) return is_pointwise(d) ? pixels >= 9 && taps >= 60 : taps >= 30;
  const bool flat = (d.p == 1 || d.yh == d.q * d.yw) && (d.n == 1 || d.yn == d.p * d.q * d.yw);
  return flat && (is_pointwise(d) ? V::N >= 16 && d.k >= 3 * pixels && d.k * d.c >= 1 << 17
                                  : pixels >= 9 && taps >= (pixels > 64 ? 280 : 100));
}

int64_t few_pixels_workspace(const ConvProblem& d) { return make_plan(d).bytes(); }

void few_pixels_forward(const ConvProblem& d, char* workspace) {
  const Plan p = make_plan(d);
  float* const packed = reinterpret_cast<float*>(workspace);
  float* const rest = packed + p.packed;
  if (p.rest) pack_rest(d, p, rest);
  if (channels_together(d)) {
    const ColumnStore<float> store{static_cast<float*>(d.y), d.yw, static_cast<const float*>(d.bias), 0, false};
    multiply(d, p, packed, rest, store);
  } else {
    const ConvStore store{&d,    static_cast<float*>(d.y),          Axis::channels, Axis::pixels,
                          false, static_cast<const float*>(d.bias), nullptr};
    multiply(d, p, packed, rest, store);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
