// Winograd's F(4x4, 3x3) and F(4x4, 5x5) with one image per vector lane, for batches of small images of few channels:
// 36 and 64 multiplications for 16 outputs instead of 144 and 400, and transforms that need no shuffles.
//
// A band of input is laid out in lanes, as for the direct sums of conv2d_batch.cpp. Two neighbouring tiles at a time
// become V[point][channel], a product of V with the transformed weight for each point gives
// M[point][output channel], and that the outputs. A gradient of the input may run transposed: tiles of the output's
// gradient, which are fewer where there is no padding, become points and end as overlapping tiles of the input's.
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
constexpr int kRows = 14;  // output channels in registers, by two tiles
#else
constexpr int kRows = 6;
#endif
constexpr int kTiles = 2, kOut = 4;

struct Plan {
  bool back;       // transposed
  int64_t th, tw;  // tiles per image
  int64_t mr, k_blocks;
  int64_t ldu;                 // floats between two channels of U
  int64_t tile_rows, bands;    // per band
  int64_t in_rows, columns;    // of the band
  int64_t u, v, m, band, out;  // bytes
  int64_t at_m, at_band, at_out, worker, total;
};

template <int TAPS>
Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kBandBytes = 384 << 10, kOutBytes = 256 << 10, kBackBytes = 768 << 10, kPoints = kTilePoints<TAPS>;
  Plan p{};
  const int64_t forth = ceil_div(d.p, kOut) * ceil_div(d.q, kOut), back = ceil_div(d.h, kOut) * ceil_div(d.w, kOut);
  const int64_t out_row = d.k * d.q * kVecBytes;
  p.back = back < forth && out_row * d.p <= kBackBytes;
  p.th = ceil_div(p.back ? d.h : d.p, kOut), p.tw = ceil_div(p.back ? d.w : d.q, kOut);
  p.k_blocks = ceil_div(d.k, kRows);
  p.mr = ceil_div(d.k, p.k_blocks);
  p.ldu = round_up(d.k, N);
  p.columns = p.tw * kOut + (p.back ? 0 : TAPS - 1);
  const int64_t reach = p.back ? 0 : TAPS - 1, in_row = d.c * p.columns * kVecBytes;
  p.tile_rows = min64((kBandBytes / in_row - reach) / kOut, p.back ? p.th : kOutBytes / out_row / kOut);
  p.tile_rows = max64(1, min64(p.th, p.tile_rows));
  p.bands = ceil_div(p.th, p.tile_rows);
  if (!p.back) p.bands = max64(p.bands, min64(p.th, ceil_div(workers, ceil_div(d.n, N))));  // a thread takes a band
  p.tile_rows = ceil_div(p.th, p.bands);
  p.bands = ceil_div(p.th, p.tile_rows);
  p.in_rows = p.tile_rows * kOut + reach;
  p.u = round_up(kPoints * d.c * p.ldu * 4, 64);
  p.v = kPoints * d.c * kTiles * kVecBytes;
  p.m = kPoints * p.mr * kTiles * kVecBytes;
  p.band = in_row * p.in_rows;
  p.out = out_row * (p.back ? d.p : p.tile_rows * kOut);
  p.at_m = p.v, p.at_band = p.at_m + p.m, p.at_out = p.at_band + p.band;
  p.worker = p.at_out + p.out;
  p.total = p.u + workers * p.worker + kStoreSlack;
  return p;
}

// U[point][c][k], transposed from the weight where it lies flipped.
template <int TAPS>
void transform_weight(const ConvProblem& d, const Plan& p, float* u) {
  using L = Lines<TAPS>;
  const float* w = static_cast<const float*>(d.weight);
  int64_t wr = d.wr, ws = d.ws;
  if (p.back) w += (TAPS - 1) * (wr + ws), wr = -wr, ws = -ws;
  for (int64_t c = 0; c < d.c; ++c)
    for (int64_t k = 0; k < d.k; k += N) {
      alignas(64) float taps[TAPS * TAPS][N] = {};
      for (int r = 0; r < TAPS; ++r)
        for (int s = 0; s < TAPS; ++s)
          for (int64_t l = 0; l < min64(N, d.k - k); ++l)
            taps[r * TAPS + s][l] = w[(k + l) * d.wk + c * d.wc + r * wr + s * ws];
      transform_tile<L::weight, TAPS, kTileIn<TAPS>>(
          [&](int r, int s) __attribute__((always_inline)) { return V::load(taps[r * TAPS + s]).v; },
          [&](int r, int s, Raw x)
              __attribute__((always_inline)) { V{x}.store(u + ((r * kTileIn<TAPS> + s) * d.c + c) * p.ldu + k); });
    }
}

// m[MR][NV] = the sum over the channels of u[c][MR] v[c][NV].
template <int MR, int NV>
void product(const float* u, int64_t ldu, const float* v, int64_t channels, float* m) {
  Raw acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = Raw{};
  for (int64_t c = 0; c < channels; ++c, u += ldu, v += NV * N) {
    Raw x[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) x[j] = V::load(v + j * N).v;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Raw a = V::set1(u[i]).v;
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += a * x[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) V{acc[i][j]}.store(m + (i * NV + j) * N);
}
using Product = void (*)(const float*, int64_t, const float*, int64_t, float*);
template <int MR, int NV>
Product find_product(int64_t mr) {
  if constexpr (MR == 0) return nullptr;
  else return mr == MR ? product<MR, NV> : find_product<MR - 1, NV>(mr);
}

// One tile of outputs from its points, those inside rows x columns.
template <int TAPS>
void finish(const float* m, int64_t xi, Raw bias, int64_t rows, int64_t columns, float* out, int64_t out_h,
            int64_t out_w) {
  using L = Lines<TAPS>;
  const auto load = [=](int r, int s)
                        __attribute__((always_inline)) { return V::load(m + (r * kTileIn<TAPS> + s) * xi).v; };
  if (rows >= kOut && columns >= kOut)
    transform_tile<L::output, kTileIn<TAPS>, kOut>(load, [&](int r, int s, Raw y) __attribute__((always_inline)) {
      V{y + bias}.store(out + r * out_h + s * out_w);
    });
  else
    transform_tile<L::output, kTileIn<TAPS>, kOut>(load, [&](int r, int s, Raw y) __attribute__((always_inline)) {
      if (r < rows && s < columns) V{y + bias}.store(out + r * out_h + s * out_w);
    });
}

// One overlapping tile whose first output is (row, column), added to what is there.
template <int TAPS>
void add_back(const float* m, int64_t xi, int64_t row, int64_t column, int64_t rows, int64_t columns, float* out,
              int64_t out_h, int64_t out_w) {
  using L = Lines<TAPS>;
  const auto load = [=](int r, int s)
                        __attribute__((always_inline)) { return V::load(m + (r * kTileIn<TAPS> + s) * xi).v; };
  out += row * out_h + column * out_w;
  const auto add = [&](int r, int s, Raw y) __attribute__((always_inline)) {
    float* const at = out + r * out_h + s * out_w;
    V{V::load(at).v + y}.store(at);
  };
  if (row >= 0 && column >= 0 && row + kTileIn<TAPS> <= rows && column + kTileIn<TAPS> <= columns)
    transform_tile<L::input_back, kTileIn<TAPS>, kTileIn<TAPS>>(load, add);
  else
    transform_tile<L::input_back, kTileIn<TAPS>, kTileIn<TAPS>>(
        load, [&](int r, int s, Raw y) __attribute__((always_inline)) {
          if (row + r >= 0 && row + r < rows && column + s >= 0 && column + s < columns) add(r, s, y);
        });
}

template <int TAPS>
void run_images(const ConvProblem& d, const Plan& p, const float* u, int64_t n0, int64_t band0, int64_t band1,
                char* own) {
  using L = Lines<TAPS>;
  constexpr int64_t kPoints = kTilePoints<TAPS>;
  float *v = reinterpret_cast<float*>(own), *m = reinterpret_cast<float*>(own + p.at_m);
  float *band = reinterpret_cast<float*>(own + p.at_band), *out = reinterpret_cast<float*>(own + p.at_out);
  const int lanes = int(min64(N, d.n - n0));
  const float* bias = static_cast<const float*>(d.bias);
  const LaneLayout in = lane_layout(d.xw != 1 || d.xh != d.w, d.c, p.in_rows, p.columns);
  const LaneLayout to = lane_layout(d.yk == 1 && d.k > 1, d.k, p.back ? d.p : p.tile_rows * kOut, d.q);
  if (p.back)
    for (int64_t k = 0; k < d.k; ++k)
      for (int64_t i = 0; i < d.p * d.q; ++i) V::set1(bias ? bias[k] : 0.f).store(out + (k * to.c + i * to.w) * N);
  for (int64_t b = band0; b < band1; ++b) {
    const int64_t t0 = b * p.tile_rows, tile_rows = min64(p.tile_rows, p.th - t0), tiles = tile_rows * p.tw;
    gather_padded(d, static_cast<const float*>(d.x) + n0 * d.xn, lanes, t0 * kOut - (p.back ? 0 : d.pad_h), p.in_rows,
                  p.back ? 0 : d.pad_w, p.columns, in, band);
    for (int64_t t = 0; t < tiles; t += kTiles) {
      const int nv = int(min64(kTiles, tiles - t));
      for (int j = 0; j < nv; ++j) {
        const float* from = band + ((t + j) / p.tw * kOut * in.h + (t + j) % p.tw * kOut * in.w) * N;
        for (int64_t c = 0; c < d.c; ++c) {
          const auto load = [&](int r, int s) __attribute__((always_inline)) {
            return V::load(from + (c * in.c + r * in.h + s * in.w) * N).v;
          };
          const auto store = [&](int r, int s, Raw x) __attribute__((always_inline)) {
            V{x}.store(v + (((r * kTileIn<TAPS> + s) * d.c + c) * nv + j) * N);
          };
          if (p.back) transform_tile<L::grad, kOut, kTileIn<TAPS>>(load, store);
          else transform_tile<L::input, kTileIn<TAPS>, kTileIn<TAPS>>(load, store);
        }
      }
      for (int64_t k = 0; k < d.k; k += p.mr) {
        const int64_t mr = min64(p.mr, d.k - k);
        const Product run = nv == 2 ? find_product<kRows, 2>(mr) : find_product<kRows, 1>(mr);
        const int64_t xi = mr * nv * N;
        for (int64_t i = 0; i < kPoints; ++i)
          run(u + i * d.c * p.ldu + k, p.ldu, v + i * d.c * nv * N, d.c, m + i * xi);
        for (int64_t i = 0; i < mr; ++i)
          for (int j = 0; j < nv; ++j) {
            const int64_t row = (t + j) / p.tw * kOut, column = (t + j) % p.tw * kOut;
            const float* const points = m + (i * nv + j) * N;
            float* const plane = out + (k + i) * to.c * N;
            if (p.back)
              add_back<TAPS>(points, xi, t0 * kOut + row - (TAPS - 1 - d.pad_h), column - (TAPS - 1 - d.pad_w), d.p,
                             d.q, plane, to.h * N, to.w * N);
            else
              finish<TAPS>(points, xi, bias ? V::set1(bias[k + i]).v : Raw{}, d.p - t0 * kOut - row, d.q - column,
                           plane + (row * to.h + column * to.w) * N, to.h * N, to.w * N);
          }
      }
    }
    if (!p.back)
      store_band(d, to, out, t0 * kOut, min64(tile_rows * kOut, d.p - t0 * kOut), lanes,
                 static_cast<float*>(d.y) + n0 * d.yn);
  }
  if (p.back) store_band(d, to, out, 0, d.p, lanes, static_cast<float*>(d.y) + n0 * d.yn);
}

template <int TAPS>
void run(const ConvProblem& d, int64_t workers, char* workspace) {
  const Plan p = make_plan<TAPS>(d, workers);
  float* const u = reinterpret_cast<float*>(workspace);
  transform_weight<TAPS>(d, p, u);
  // Of a transposed pass the bands of an image overlap: it is one job.
  const int64_t bands = p.back ? 1 : p.bands, jobs = ceil_div(d.n, N) * bands;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t i = jobs * w / workers; i < jobs * (w + 1) / workers; ++i) {
        const int64_t g = i / bands, b = i % bands;
        run_images<TAPS>(d, p, u, g * N, b, p.back ? p.bands : b + 1, workspace + p.u + w * p.worker);
      }
  });
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t batch_winograd_workspace(const ConvProblem& d, int64_t workers) {
  return d.r == 3 ? make_plan<3>(d, workers).total : make_plan<5>(d, workers).total;
}

void batch_winograd_forward(const ConvProblem& d, int64_t workers, char* workspace) {
  if (d.r == 3) run<3>(d, workers, workspace);
  else run<5>(d, workers, workspace);
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
