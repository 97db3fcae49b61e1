// Gradient of the weight over a batch of small images with one image per vector lane.
//
// A register tile of KB output channels x TB taps runs over the positions of a band
// with aligned loads and no masks; its lanes are added up only once, at the end.
#include "conv2d_batch.h"

#include "../../parallel.h"
#include "conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

#if defined(__AVX512F__)
constexpr int kK = 5, kT = 5;
#else
constexpr int kK = 3, kT = 3;
#endif

// Positions a tile sums before the next: what its channels and taps read then stays in L1.
constexpr int64_t kPositions = 64;

struct Plan {
  int64_t columns, rows, bands, in_rows;
  int64_t groups, slices;  // image groups are dealt to slices by shape alone; slices are added in order
  int64_t taps;
  int64_t slice;                                              // sums: [k][taps], then [k] for the bias
  int64_t offsets, band, grad, sums, workers, worker, total;  // bytes
};

Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kBandBytes = 384 << 10, kGradBytes = 272 << 10, kSlices = 4, kSliceBytes = 8 << 20;
  Plan p{};
  p.taps = d.c * d.r * d.s;
  p.columns = (d.q - 1) * d.stride_w + (d.s - 1) * d.dil_w + 1;
  const int64_t reach = (d.r - 1) * d.dil_h + 1, in_row = (d.c | 1) * p.columns * kVecBytes;
  const int64_t grad_row = (d.k | 1) * d.q * kVecBytes;
  p.rows = min64(kBandBytes / in_row - reach, kGradBytes / grad_row);
  p.rows = max64(1, min64(d.p, p.rows));
  p.bands = ceil_div(d.p, p.rows);
  p.rows = ceil_div(d.p, p.bands);
  p.in_rows = (p.rows - 1) * d.stride_h + reach;
  p.groups = ceil_div(d.n, N);
  p.slice = d.k * (p.taps + 1);
  p.slices = max64(1, min64(min64(kSlices, p.groups), kSliceBytes / (p.slice * kVecBytes)));
  const auto pad = [](int64_t bytes) { return round_up(bytes, 64); };
  p.offsets = pad(p.slices * p.slice * 4);
  p.workers = p.offsets + pad(p.taps * 8);
  p.band = 0;
  p.grad = in_row * p.in_rows;
  p.sums = p.grad + grad_row * p.rows;
  p.worker = p.sums + p.slice * kVecBytes;
  p.total = p.workers + min64(workers, p.slices) * p.worker;
  return p;
}

struct Job {
  const float *grad, *x;
  const int64_t* taps;  // elements each tap adds to a position in the band
  int64_t rows, columns;
  int64_t grad_k, grad_h, grad_w, x_h, x_w;  // elements
  float* out;                                // [k][taps] vectors
  int64_t out_k;                             // elements
  bool add;
};

template <int KB, int TB>
void tile(const Job& job) {
  const Job j = job;
  Raw acc[KB][TB];
  const float* at[TB];
#pragma GCC unroll 8
  for (int t = 0; t < TB; ++t) at[t] = j.x + j.taps[t];
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 8
    for (int t = 0; t < TB; ++t) acc[k][t] = j.add ? V::load(j.out + k * j.out_k + t * N).v : Raw{};
  for (int64_t h = 0; h < j.rows; ++h) {
    const float* g = j.grad + h * j.grad_h;
    int64_t x = h * j.x_h;
    for (int64_t w = 0; w < j.columns; ++w, g += j.grad_w, x += j.x_w) {
      Raw gv[KB];
#pragma GCC unroll 8
      for (int k = 0; k < KB; ++k) gv[k] = V::load(g + k * j.grad_k).v;
#pragma GCC unroll 8
      for (int t = 0; t < TB; ++t) {
        const Raw xv = V::load(at[t] + x).v;
#pragma GCC unroll 8
        for (int k = 0; k < KB; ++k) acc[k][t] += gv[k] * xv;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 8
    for (int t = 0; t < TB; ++t) V{acc[k][t]}.store(j.out + k * j.out_k + t * N);
}

template <int KB, int TB>
void (*find_tile(int kb, int tb))(const Job&) {
  if constexpr (KB == 0 || TB == 0) return nullptr;
  else if (kb < KB) return find_tile<KB - 1, TB>(kb, tb);
  else if (tb < TB) return find_tile<KB, TB - 1>(kb, tb);
  else return tile<KB, TB>;
}

void run_slice(const ConvProblem& d, const Plan& p, int64_t slice, const LaneLayout& in, const LaneLayout& to,
               const int64_t* taps, bool bias, char* own, float* out) {
  float* sums = reinterpret_cast<float*>(own + p.sums);
  float* band = reinterpret_cast<float*>(own + p.band);
  float* grad = reinterpret_cast<float*>(own + p.grad);
  float* bias_sums = sums + d.k * p.taps * N;
  for (int64_t k = 0; k < d.k; ++k) V::zero().store(bias_sums + k * N);
  ConvProblem g{};  // grad_output read as an image
  g.xn = d.yn, g.xc = d.yk, g.xh = d.yh, g.c = d.k, g.w = d.q;
  bool first = true;
  for (int64_t group = p.groups * slice / p.slices; group < p.groups * (slice + 1) / p.slices; ++group) {
    const int64_t n0 = group * N;
    const int lanes = int(min64(N, d.n - n0));
    for (int64_t b = 0; b < p.bands; ++b, first = false) {
      const int64_t p0 = b * p.rows, rows = min64(p.rows, d.p - p0);
      const int64_t h0 = p0 * d.stride_h - d.pad_h, in_rows = (rows - 1) * d.stride_h + (d.r - 1) * d.dil_h + 1;
      const int64_t begin = min64(in_rows, max64(0, -h0)), end = max64(begin, min64(in_rows, d.h - h0));
      gather_band(d, static_cast<const float*>(d.x) + n0 * d.xn, lanes, h0 + begin, end - begin, d.pad_w, p.columns, in,
                  band + begin * in.h * N);
      for (int64_t c = 0; c < (in.together ? 1 : d.c); ++c)  // rows above and below the image
        for (int64_t h = 0; h < in_rows; ++h)
          if (h < begin || h >= end)
            for (int64_t i = 0; i < in.h; ++i) V::zero().store(band + (c * in.c + h * in.h + i) * N);
      gather_band(g, static_cast<const float*>(d.y) + n0 * d.yn, lanes, p0, rows, 0, d.q, to, grad);
      if (bias) add_bias(grad, to, d.k, rows, d.q, bias_sums);
      Job j{};
      j.columns = d.q;
      j.grad_k = to.c * N, j.grad_h = to.h * N, j.grad_w = to.w * N;
      j.x_h = d.stride_h * in.h * N, j.x_w = d.stride_w * in.w * N;
      j.out_k = p.taps * N;
      const int64_t step = max64(1, kPositions / d.q);
      for (int64_t row = 0; row < rows; row += step) {
        j.rows = min64(step, rows - row), j.x = band + row * j.x_h, j.add = !first || row > 0;
        for (int64_t t = 0; t < p.taps; t += kT)
          for (int64_t k = 0; k < d.k; k += kK) {
            j.grad = grad + row * j.grad_h + k * j.grad_k, j.taps = taps + t, j.out = sums + (k * p.taps + t) * N;
            find_tile<kK, kT>(int(min64(kK, d.k - k)), int(min64(kT, p.taps - t)))(j);
          }
      }
    }
  }
  sum_lanes(sums, bias ? p.slice : d.k * p.taps, out);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t batch_grad_workspace(const ConvProblem& d, int64_t workers) { return make_plan(d, workers).total; }

void batch_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers, char* workspace) {
  const Plan p = make_plan(d, workers);
  float* sums = reinterpret_cast<float*>(workspace);
  int64_t* taps = reinterpret_cast<int64_t*>(workspace + p.offsets);
  const LaneLayout in = odd_lane_layout(d.xw != 1 || d.xh != d.w, d.c, p.in_rows, p.columns);
  const LaneLayout to = odd_lane_layout(d.yw != 1 || d.yh != d.q, d.k, p.rows, d.q);
  for (int64_t t = 0; t < p.taps; ++t)
    taps[t] = (t / (d.r * d.s) * in.c + t / d.s % d.r * d.dil_h * in.h + t % d.s * d.dil_w * in.w) * N;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t s = w; s < p.slices; s += workers)
        run_slice(d, p, s, in, to, taps, grad_bias, workspace + p.workers + w * p.worker, sums + s * p.slice);
  });
  for (int64_t slice = 1; slice < p.slices; ++slice)
    for (int64_t i = 0; i < p.slice; ++i) sums[i] += sums[slice * p.slice + i];
  const float* from = sums;
  for (int64_t k = 0; k < d.k; ++k)
    for (int64_t c = 0; c < d.c; ++c)
      for (int64_t r = 0; r < d.r; ++r)
        for (int64_t s = 0; s < d.s; ++s) grad_weight[k * d.wk + c * d.wc + r * d.wr + s * d.ws] = *from++;
  if (grad_bias)
    for (int64_t k = 0; k < d.k; ++k) grad_bias[k] = *from++;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
