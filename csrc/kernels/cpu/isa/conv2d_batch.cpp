// Forward convolution, and gradient of the input, of a batch of small images with one image per vector lane.
//
// A band of input rows is laid out in lanes, a register tile of MR output channels x NV neighbouring columns runs over
// the taps that exist for its row and columns, and the finished rows go back. The gradient of the input of a strided
// convolution is several problems (see conv2d.cpp), whose outputs interleave while they are in the cache.
#include "conv2d_batch.h"

#include "../../parallel.h"
#include "conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

#if defined(__AVX512F__)
constexpr int kAccumulators = 28;  // of 32 registers
#else
constexpr int kAccumulators = 12;  // of 16
#endif
constexpr int64_t kSumTaps = 128;  // longer sums are added up in pieces, as a blocked product would

struct Plan {
  int mr, nv;
  int64_t k_blocks;
  int64_t columns;            // of the band: every column a tap may read
  int64_t rows, bands;        // output rows per band
  int64_t in_rows;            // of the band
  int64_t chunk;              // channels summed in one go
  int64_t packed, band, out;  // bytes
};

// Taps [begin, end) of a row of `taps` that read inside [0, size) from at least one of the positions [q0, q1].
struct Taps {
  int64_t begin, end;
};
Taps taps_inside(int64_t q0, int64_t q1, int64_t stride, int64_t dilation, int64_t pad, int64_t taps, int64_t size) {
  Taps t{0, taps};
  while (t.begin < t.end && q1 * stride + t.begin * dilation - pad < 0) ++t.begin;
  while (t.begin < t.end && q0 * stride + (t.end - 1) * dilation - pad >= size) --t.end;
  return t;
}

Plan make_plan(const ConvProblem& d) {
  constexpr int64_t kBandBytes = 384 << 10, kOutBytes = 256 << 10;
  Plan p{};
  double best = 0;
  for (int nv = 2; nv <= 4; ++nv) {
    const int64_t blocks = ceil_div(d.k, kAccumulators / nv);
    const int mr = int(ceil_div(d.k, blocks));
    double cycles = 0;
    for (int64_t q = 0; q < d.q; q += nv) {
      const int64_t n = min64(nv, d.q - q);
      const Taps s = taps_inside(q, q + n - 1, d.stride_w, d.dil_w, d.pad_w, d.s, d.w);
      const double work = double(mr * n) / 2, loads = double(mr + n) / 2, latency = 4;
      const double tap = work > loads ? work : loads;
      cycles += double(s.end - s.begin) * ((tap > latency ? tap : latency) + 0.5);
    }
    if (best == 0 || double(blocks) * cycles < best) best = double(blocks) * cycles, p.mr = mr, p.nv = nv;
  }
  p.k_blocks = ceil_div(d.k, p.mr);
  p.columns = (d.q - 1) * d.stride_w + (d.s - 1) * d.dil_w + 1;
  const int64_t reach = (d.r - 1) * d.dil_h + 1;
  const int64_t in_row = d.c * p.columns * kVecBytes, out_row = d.k * d.q * kVecBytes;
  p.rows = min64(kBandBytes / in_row - reach, kOutBytes / out_row);
  p.rows = max64(1, min64(d.p, p.rows));
  p.bands = ceil_div(d.p, p.rows);
  p.rows = ceil_div(d.p, p.bands);
  p.in_rows = (p.rows - 1) * d.stride_h + reach;
  p.chunk = max64(1, kSumTaps / (d.r * d.s));
  p.packed = round_up(d.k * (d.c * d.r * d.s + 1) * 4, 64);  // with the bias
  p.band = in_row * p.in_rows;
  p.out = out_row * p.rows;
  return p;
}

struct Job {
  const float* weight;  // [c][r][s][MR]
  const float* x;       // of the first tap that exists
  const float* bias;    // [MR] or null: add to what is there
  float* out;
  int64_t c, r, s;             // how many
  int64_t weight_c, weight_r;  // elements
  int64_t x_c, x_r, x_s, x_v;  // elements; x_v between columns of outputs
  int64_t out_m, out_v;        // elements
};

template <int MR, int NV>
void tile(const Job& job) {
  const Job j = job;
  Raw acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      acc[m][v] = j.bias ? V::set1(j.bias[m]).v : V::load(j.out + m * j.out_m + v * j.out_v).v;
  for (int64_t c = 0; c < j.c; ++c)
    for (int64_t r = 0; r < j.r; ++r) {
      const float *w = j.weight + c * j.weight_c + r * j.weight_r, *p = j.x + c * j.x_c + r * j.x_r;
      for (int64_t s = 0; s < j.s; ++s, w += MR, p += j.x_s) {
        Raw x[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) x[v] = V::load(p + v * j.x_v).v;
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const Raw a = V::set1(w[m]).v;
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[m][v] += a * x[v];
        }
      }
    }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) V{acc[m][v]}.store(j.out + m * j.out_m + v * j.out_v);
}

using TileFn = void (*)(const Job&);
template <int MR, int NV>
TileFn find_tile(int mr) {
  if constexpr (MR == 0) return nullptr;
  else return mr == MR ? tile<MR, NV> : find_tile<MR - 1, NV>(mr);
}
TileFn find_tile(int mr, int nv) {
  switch (nv) {
    case 1: return find_tile<kAccumulators / 2, 1>(mr);
    case 2: return find_tile<kAccumulators / 2, 2>(mr);
    case 3: return find_tile<kAccumulators / 3, 3>(mr);
    default: return find_tile<kAccumulators / 4, 4>(mr);
  }
}

// Output channels of block b: the last may have fewer than MR.
int channels(const ConvProblem& d, const Plan& p, int64_t b) { return int(min64(p.mr, d.k - b * p.mr)); }

// [block][c][r][s][its channels], then the bias.
void pack(const ConvProblem& d, const Plan& p, float* to) {
  const float* w = static_cast<const float*>(d.weight);
  for (int64_t b = 0; b < p.k_blocks; ++b)
    for (int64_t c = 0; c < d.c; ++c)
      for (int64_t r = 0; r < d.r; ++r)
        for (int64_t s = 0; s < d.s; ++s)
          for (int m = 0; m < channels(d, p, b); ++m) *to++ = w[(b * p.mr + m) * d.wk + c * d.wc + r * d.wr + s * d.ws];
  for (int64_t k = 0; k < d.k; ++k) *to++ = d.bias ? static_cast<const float*>(d.bias)[k] : 0;
}

void run_band(const ConvProblem& d, const Plan& p, const float* packed, int64_t n0, int64_t band_index, float* band,
              float* out) {
  const int lanes = int(min64(N, d.n - n0));
  const int64_t p0 = band_index * p.rows, rows = min64(p.rows, d.p - p0);
  const int64_t h_begin = max64(0, p0 * d.stride_h - d.pad_h);
  const int64_t h_end = min64(d.h, (p0 + rows - 1) * d.stride_h - d.pad_h + (d.r - 1) * d.dil_h + 1);
  const LaneLayout in = lane_layout(d.xw != 1 || d.xh != d.w, d.c, p.in_rows, p.columns);
  const LaneLayout to = lane_layout(d.yk == 1 && d.k > 1, d.k, p.rows, d.q);
  if (h_begin < h_end)
    gather_band(d, static_cast<const float*>(d.x) + n0 * d.xn, lanes, h_begin, h_end - h_begin, d.pad_w, p.columns, in,
                band);
  const float* bias = packed + d.k * d.c * d.r * d.s;
  for (int64_t b = 0; b < p.k_blocks; ++b) {
    const int mr = channels(d, p, b);
    for (int64_t row = 0; row < rows; ++row) {
      const Taps r = taps_inside(p0 + row, p0 + row, d.stride_h, d.dil_h, d.pad_h, d.r, d.h);
      const int64_t ih = (p0 + row) * d.stride_h + r.begin * d.dil_h - d.pad_h - h_begin;
      for (int64_t q = 0; q < d.q; q += p.nv) {
        const int nv = int(min64(p.nv, d.q - q));
        const Taps s = taps_inside(q, q + nv - 1, d.stride_w, d.dil_w, d.pad_w, d.s, d.w);
        Job j{};
        j.weight = packed + b * p.mr * d.c * d.r * d.s + (r.begin * d.s + s.begin) * mr;
        j.weight_c = d.r * d.s * mr, j.weight_r = d.s * mr;
        j.x = band + (ih * in.h + (q * d.stride_w + s.begin * d.dil_w) * in.w) * N;
        j.x_c = in.c * N, j.x_r = d.dil_h * in.h * N, j.x_s = d.dil_w * in.w * N, j.x_v = d.stride_w * in.w * N;
        j.out = out + (b * p.mr * to.c + row * to.h + q * to.w) * N;
        j.out_m = to.c * N, j.out_v = to.w * N;
        j.r = r.end - r.begin, j.s = s.end - s.begin;
        const TileFn run = find_tile(mr, nv);
        for (int64_t c = 0; c < d.c; c += p.chunk) {
          j.c = min64(p.chunk, d.c - c);
          j.bias = c ? nullptr : bias + b * p.mr;
          run(j);
          j.weight += p.chunk * j.weight_c;
          j.x += p.chunk * j.x_c;
        }
      }
    }
  }
  store_band(d, to, out, p0, rows, lanes, static_cast<float*>(d.y) + n0 * d.yn);
}

struct Layout {
  int64_t packed, band, worker, total;  // bytes
};
Layout make_layout(const ConvProblem* parts, int count, int64_t workers) {
  Layout o{};
  int64_t out = 0;
  for (int i = 0; i < count; ++i) {
    const Plan p = make_plan(parts[i]);
    o.packed += p.packed;
    o.band = max64(o.band, p.band);
    out = max64(out, p.out);
  }
  o.worker = o.band + out;
  o.total = o.packed + workers * o.worker + kStoreSlack;
  return o;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t batch_workspace(const ConvProblem* parts, int count, int64_t workers) {
  return make_layout(parts, count, workers).total;
}

void batch_forward(const ConvProblem* parts, int count, int64_t workers, char* workspace) {
  const Layout o = make_layout(parts, count, workers);
  char* at = workspace;
  for (int i = 0; i < count; ++i) {
    const Plan p = make_plan(parts[i]);
    pack(parts[i], p, reinterpret_cast<float*>(at));
    at += p.packed;
  }
  const int64_t groups = ceil_div(parts[0].n, N);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      float* band = reinterpret_cast<float*>(workspace + o.packed + w * o.worker);
      float* out = reinterpret_cast<float*>(workspace + o.packed + w * o.worker + o.band);
      for (int64_t g = w; g < groups; g += workers) {
        const char* packed = workspace;
        for (int i = 0; i < count; ++i) {
          const Plan p = make_plan(parts[i]);
          for (int64_t b = 0; b < p.bands; ++b)
            run_band(parts[i], p, reinterpret_cast<const float*>(packed), g * N, b, band, out);
          packed += p.packed;
        }
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
