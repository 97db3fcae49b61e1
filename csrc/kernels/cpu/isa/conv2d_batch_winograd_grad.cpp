// Gradient of a 5x5 weight by Winograd's F(4x4, 5x5) with one image per vector lane.
//
// The points of every tile of the input times those of the same tile of grad_output, summed over tiles and lanes,
// become the weight's gradient by one transform at the end. Of a tile's rows of points two at a time are made and used:
// a line of the transform gives the points p and -p for little more than one of them, and what two rows sum into stays
// in L2.
#include "../../parallel.h"
#include "conv2d.h"
#include "conv2d_batch.h"
#include "conv2d_winograd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

#if defined(__AVX512F__)
constexpr int kK = 5, kC = 5;
#else
constexpr int kK = 3, kC = 3;
#endif
constexpr int kTaps = 5, kOut = 4;
using L = Lines<kTaps>;
constexpr int kPoints = kTileIn<kTaps>;

struct Plan {
  int64_t th, tw, tile_rows, bands, tiles;  // tiles of a band
  int64_t groups, slices, together;         // image groups: dealt to slices by shape alone, so many of them at once
  int64_t in_rows, in_columns;
  int64_t sums;                          // of a slice: [point][k][c], then [k] for the bias
  int64_t x, grad, v, p;                 // floats, of one group of images
  int64_t at_grad, at_v, at_p, at_sums;  // bytes
  int64_t workers, worker, total;        // bytes
};

Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kBytes = 640 << 10, kSlices = 4;
  Plan p{};
  p.th = ceil_div(d.p, kOut), p.tw = ceil_div(d.q, kOut);
  p.in_columns = p.tw * kOut + kTaps - 1;
  const auto bytes = [&](int64_t rows) {
    p.tiles = rows * p.tw, p.in_rows = rows * kOut + kTaps - 1;
    p.x = d.c * p.in_rows * p.in_columns * N, p.grad = d.k * p.tiles * kOut * kOut * N;
    p.v = 2 * kPoints * d.c * p.tiles * N, p.p = 2 * kPoints * d.k * p.tiles * N;
    return (p.x + p.grad + p.v + p.p) * 4;
  };
  p.tile_rows = p.th;
  while (p.tile_rows > 1 && bytes(p.tile_rows) > kBytes) --p.tile_rows;
  p.bands = ceil_div(p.th, p.tile_rows);
  p.tile_rows = ceil_div(p.th, p.bands);
  const int64_t each = bytes(p.tile_rows);
  p.groups = ceil_div(d.n, N);
  p.slices = max64(1, min64(kSlices, p.groups / 2));
  p.together = p.bands > 1 ? 1 : max64(1, min64(kBytes / each, ceil_div(p.groups, p.slices)));
  p.sums = kPoints * kPoints * d.k * d.c + d.k;
  p.at_grad = p.together * p.x * 4;
  p.at_v = p.at_grad + p.together * p.grad * 4;
  p.at_p = p.at_v + p.together * p.v * 4;
  p.at_sums = p.at_p + p.together * p.p * 4;
  p.worker = p.at_sums + p.sums * kVecBytes;
  p.workers = round_up(p.slices * p.sums * 4, 64);
  p.total = p.workers + min64(workers, p.slices) * p.worker;
  return p;
}

// Rows FIRST and SECOND of a tile's points, side by side.
template <auto kLine, int IN, int POINTS, int FIRST, int SECOND, class Load, class Store>
FASTNN_INLINE void two_rows(const Load& load, const Store& store) {
  Raw mid[2][IN];
#pragma GCC unroll 8
  for (int s = 0; s < IN; ++s) {
    Raw in[IN], out[POINTS];
#pragma GCC unroll 8
    for (int r = 0; r < IN; ++r) in[r] = load(r, s);
    kLine(in, out);
    mid[0][s] = out[FIRST], mid[1][s] = out[SECOND];
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    Raw out[POINTS];
    kLine(mid[i], out);
#pragma GCC unroll 8
    for (int s = 0; s < POINTS; ++s) store(i * POINTS + s, out[s]);
  }
}

// s[KB][CB] = (or +=) the sum over the tiles of g[tile][KB] x[tile][CB].
template <int KB, int CB>
void product(const float* g, int64_t g_tile, const float* x, int64_t x_tile, int64_t tiles, float* s, int64_t s_k,
             bool add) {
  Raw acc[KB][CB];
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) acc[k][c] = add ? V::load(s + k * s_k + c * N).v : Raw{};
  for (int64_t t = 0; t < tiles; ++t, g += g_tile, x += x_tile) {
    Raw gv[KB];
#pragma GCC unroll 8
    for (int k = 0; k < KB; ++k) gv[k] = V::load(g + k * N).v;
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) {
      const Raw xv = V::load(x + c * N).v;
#pragma GCC unroll 8
      for (int k = 0; k < KB; ++k) acc[k][c] += gv[k] * xv;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) V{acc[k][c]}.store(s + k * s_k + c * N);
}
using Product = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
template <int KB, int CB>
Product find_product(int64_t kb, int64_t cb) {
  if constexpr (KB == 0 || CB == 0) return nullptr;
  else if (kb < KB) return find_product<KB - 1, CB>(kb, cb);
  else if (cb < CB) return find_product<KB, CB - 1>(kb, cb);
  else return product<KB, CB>;
}

struct Bands {
  const float *x, *grad;
  LaneLayout in, to;
  float *v, *p;
  int64_t images, tiles;  // groups of images side by side, tiles of each
};

// Rows FIRST and SECOND of the points of all tiles, multiplied and added to sums[point][k][c].
template <int FIRST, int SECOND>
void add_rows(const ConvProblem& d, const Plan& p, const Bands& b, float* sums, bool add) {
  const int64_t all = b.images * b.tiles;
  for (int64_t t = 0; t < all; ++t) {
    const int64_t image = t / b.tiles, row = t % b.tiles / p.tw * kOut, column = t % p.tw * kOut;
    const float* const x = b.x + image * p.x + (row * b.in.h + column * b.in.w) * N;
    const float* const g = b.grad + image * p.grad + (row * b.to.h + column * b.to.w) * N;
    for (int64_t c = 0; c < d.c; ++c)
      two_rows<L::input, kPoints, kPoints, FIRST, SECOND>(
          [&](int r, int s)
              __attribute__((always_inline)) { return V::load(x + (c * b.in.c + r * b.in.h + s * b.in.w) * N).v; },
          [&](int i, Raw y) __attribute__((always_inline)) { V{y}.store(b.v + ((i * all + t) * d.c + c) * N); });
    for (int64_t k = 0; k < d.k; ++k)
      two_rows<L::grad, kOut, kPoints, FIRST, SECOND>(
          [&](int r, int s)
              __attribute__((always_inline)) { return V::load(g + (k * b.to.c + r * b.to.h + s * b.to.w) * N).v; },
          [&](int i, Raw y) __attribute__((always_inline)) { V{y}.store(b.p + ((i * all + t) * d.k + k) * N); });
  }
  for (int i = 0; i < 2 * kPoints; ++i) {
    const int64_t point = (i < kPoints ? FIRST : SECOND) * kPoints + i % kPoints;
    for (int64_t k = 0; k < d.k; k += kK)
      for (int64_t c = 0; c < d.c; c += kC)
        find_product<kK, kC>(min64(kK, d.k - k), min64(kC, d.c - c))(
            b.p + (i * all * d.k + k) * N, d.k * N, b.v + (i * all * d.c + c) * N, d.c * N, all,
            sums + ((point * d.k + k) * d.c + c) * N, d.c * N, add);
  }
}

void run_slice(const ConvProblem& d, const Plan& p, int64_t slice, bool bias, char* own, float* out) {
  float *x = reinterpret_cast<float*>(own), *grad = reinterpret_cast<float*>(own + p.at_grad);
  float* sums = reinterpret_cast<float*>(own + p.at_sums);
  float* bias_sums = sums + kPoints * kPoints * d.k * d.c * N;
  for (int64_t k = 0; k < d.k; ++k) V::zero().store(bias_sums + k * N);
  ConvProblem g{};  // grad_output read as an image
  g.xn = d.yn, g.xc = d.yk, g.xh = d.yh, g.xw = d.yw, g.c = d.k, g.h = d.p, g.w = d.q;
  Bands b{x, grad, {}, {}, reinterpret_cast<float*>(own + p.at_v), reinterpret_cast<float*>(own + p.at_p), 0, 0};
  b.in = lane_layout(d.xw != 1 || d.xh != d.w, d.c, p.in_rows, p.in_columns);
  b.to = lane_layout(d.yw != 1 || d.yh != d.q, d.k, p.tile_rows * kOut, p.tw * kOut);
  const int64_t first = p.groups * slice / p.slices, last = p.groups * (slice + 1) / p.slices;
  for (int64_t group = first; group < last; group += p.together) {
    b.images = min64(p.together, last - group);
    for (int64_t band = 0; band < p.bands; ++band) {
      const int64_t row = band * p.tile_rows * kOut, tile_rows = min64(p.tile_rows, p.th - band * p.tile_rows);
      b.tiles = tile_rows * p.tw;
      for (int64_t i = 0; i < b.images; ++i) {
        const int64_t n0 = (group + i) * N;
        const int lanes = int(min64(N, d.n - n0));
        gather_padded(d, static_cast<const float*>(d.x) + n0 * d.xn, lanes, row - d.pad_h, p.in_rows, d.pad_w,
                      p.in_columns, b.in, x + i * p.x);
        gather_padded(g, static_cast<const float*>(d.y) + n0 * d.yn, lanes, row, p.tile_rows * kOut, 0, p.tw * kOut,
                      b.to, grad + i * p.grad);
        if (bias) add_bias(grad + i * p.grad, b.to, d.k, tile_rows * kOut, p.tw * kOut, bias_sums);
      }
      const bool add = group > first || band > 0;
      add_rows<0, kPoints - 1>(d, p, b, sums, add);
      add_rows<1, 2>(d, p, b, sums, add);
      add_rows<3, 4>(d, p, b, sums, add);
      add_rows<5, 6>(d, p, b, sums, add);
    }
  }
  sum_lanes(sums, bias ? p.sums : p.sums - d.k, out);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t batch_winograd_grad_workspace(const ConvProblem& d, int64_t workers) { return make_plan(d, workers).total; }

void batch_winograd_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers,
                                char* workspace) {
  const Plan p = make_plan(d, workers);
  float* const sums = reinterpret_cast<float*>(workspace);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t s = w; s < p.slices; s += workers)
        run_slice(d, p, s, grad_bias, workspace + p.workers + w * p.worker, sums + s * p.sums);
  });
  for (int64_t slice = 1; slice < p.slices; ++slice)
    for (int64_t i = 0; i < p.sums; ++i) sums[i] += sums[slice * p.sums + i];
  const int64_t weights = d.k * d.c;
  for (int64_t i = 0; i < weights; i += N) {
    const int64_t lanes = min64(N, weights - i);
    alignas(64) float taps[kTaps * kTaps][N];
    transform_tile<L::grad_weight, kPoints, kTaps>(
        [&](int r, int s)
            __attribute__((always_inline)) { return V::load_n(sums + (r * kPoints + s) * weights + i, lanes).v; },
        [&](int r, int s, Raw y) __attribute__((always_inline)) { V{y}.store(taps[r * kTaps + s]); });
    for (int64_t l = 0; l < lanes; ++l)
      for (int tap = 0; tap < kTaps * kTaps; ++tap)
        grad_weight[(i + l) / d.c * d.wk + (i + l) % d.c * d.wc + tap / kTaps * d.wr + tap % kTaps * d.ws] =
            taps[tap][l];
  }
  if (grad_bias)
    for (int64_t k = 0; k < d.k; ++k) grad_bias[k] = sums[p.sums - d.k + k];
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
