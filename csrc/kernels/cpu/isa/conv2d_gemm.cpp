// Convolution as an implicit GEMM: im2col rows are copied straight into the panels
// of the GEMM driver, and its tiles are stored straight into the result. NCHW:
// channels x pixels; NHWC: pixels x channels; weight gradient: channels x taps.
#include "conv2d_im2col.h"

#include "gemm_dot.h"
#include "packed_conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Axis = ConvStore::Axis;

struct Product {
  int64_t m, n, k;
};
Product forward_product(const ConvProblem& d) {
  const int64_t pixels = d.n * d.p * d.q, taps = d.c * d.r * d.s;
  return channels_together(d) ? Product{pixels, d.k, taps} : Product{d.k, pixels, taps};
}
GemmPlan plan_for(const Product& p, int64_t workers, int64_t max_rows = 1 << 30, int max_mr = kGemmMaxMr) {
  return gemm_plan<float>(p.m, p.n, p.k, int(workers), true, max_rows, 1, kGemmL1Bytes, max_mr);
}

// ---- NCHW: C[k, pixels] = W[k, taps] X[taps, pixels] ---------------------------------------------------------------

// Of planes a multiple of 4 KB apart, all rows of a panel go to the same few sets of L1: where sums are so short that a
// layer is all stores, one tile of rows runs over all pixels before the next (16x4x32x32->96 x0.42 of the time,
// 8x3x64x64->64 x0.51; sums of 16 gain nothing, planes of 30x30 lose a tenth).
GemmPlan rows_plan(const ConvProblem& d, int64_t workers) {
  const Product p = forward_product(d);
  const bool thin = p.k <= 8 && d.p * d.q % 1024 == 0;
  return plan_for(p, workers, thin ? kGemmMaxMr : 1 << 30);
}

void pack_weight_rows(const ConvProblem& d, float* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) {
  const float* w = static_cast<const float*>(d.weight) + m0 * d.wk;
  if (d.r * d.s == 1) return gemm_pack_panel<float>(dst, mr, w + k0 * d.wc, d.wk, d.wc, mb, kb);
  if (d.ws == 1 && d.wr == d.s && d.wc == d.r * d.s) return gemm_pack_panel<float>(dst, mr, w + k0, d.wk, 1, mb, kb);
  Tap t = tap_crs(d, k0);
  for (int64_t p = 0; p < kb; ++p, dst += mr, next_crs(d, t)) {
    const float* from = w + t.c * d.wc + t.r * d.wr + t.s * d.ws;
    for (int i = 0; i < mr; ++i) dst[i] = i < mb ? from[i * d.wk] : 0.f;
  }
}

// Packed rows of the weight. With every row of a panel the part of one AHEAD panels on is fetched: of images read in
// place these are as many streams as channels, more than the hardware follows. Few rows are multiplied before the next
// panel's part has come, so theirs is the one after it: 8x32x112x112->16 47 -> 70 GFLOP/s, 8x64x56x56->64 85 -> 89; of
// 96 rows and more x0.95 to x0.99.
constexpr int64_t kFewRows = 64;
template <int AHEAD>
struct WeightRows {
  const float* p;
};
template <int AHEAD>
FASTNN_INLINE WeightRows<AHEAD> next_rows(WeightRows<AHEAD> a, int64_t mr, int64_t kb) {
  return {a.p + mr * kb};
}

template <class A, int MR, int NV, int AHEAD>
FASTNN_INLINE void gemm_micro(GemmTile<A, MR, NV>& tile, int64_t k, int64_t sum_k, WeightRows<AHEAD> rows, const A* b,
                              int64_t ldb) {
  constexpr int kWidth = NV * V::N, kLine = 16;
  const float* a = rows.p;
  gemm_sums(tile, k, sum_k, [&](GemmTile<A, MR, NV>& c, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < n; ++p) {
#pragma GCC unroll 2
      for (int j = 0; j < kWidth; j += kLine) __builtin_prefetch(b + AHEAD * kWidth + j, 0, AHEAD > 1 ? 2 : 3);
      add_products(c, b, [&](int i) __attribute__((always_inline)) { return a[i]; });
      a += MR;
      b += ldb;
    }
  });
}

// Whether whole tiles are written past the caches, which a large result leaves anyway: from 12 MB on x1.1 to x2 of the
// layer's speed, x1.05 to x1.5 with the relu or batch norm that reads it (Zen 4); 10 MB are x0.75 with them on Zen 5.
// AVX2's tiles in NCHW, one line wide, gain a tenth and lose as much with a relu.
bool streams_result(const ConvProblem& d, const GemmPlan& plan) {
  const bool last = channels_together(d);
  const int64_t plane = d.p * d.q;
  const bool pays = kVecBytes >= (last ? 32 : 64) && d.n * d.k * plane >= kStreamedResult;
  const bool aligned = last ? d.yw % 16 == 0 : d.yk % 16 == 0 && plane % 16 == 0;
  return pays && aligned && d.yn % 16 == 0 && uintptr_t(d.y) % 64 == 0 && plan.k <= plan.kc;
}

// Whether a tile of a result larger than L2 is fetched while it is computed: NHWC 8x1024x14x14->256 90 -> 96 GFLOP/s,
// the gradient of its input 91 -> 101, 8x256x56x56->64 96 -> 105; of smaller results it took x0.97 to x1.0. Not for
// sums of few products, which it would hold up (NHWC 3x32x32->16 x0.8), nor tiles of channels by pixels that are only
// written (x0.92 to x1.0).
constexpr int64_t kFetchedResult = 1 << 18;
bool fetches_result(const ConvProblem& d, const GemmPlan& plan) {
  const bool pays = plan.k >= 128 && (channels_together(d) || plan.k > plan.kc);
  const bool flat = d.yh == d.q * d.yw && (d.n == 1 || d.yn == d.p * d.q * d.yw);
  return pays && d.n * d.k * d.p * d.q >= kFetchedResult && (channels_together(d) ? flat : d.yw == 1);
}

template <int AHEAD>
void forward_rows(const ConvProblem& d, const GemmPlan& plan, char* workspace) {
  ConvStore store{&d,    static_cast<float*>(d.y),          Axis::channels, Axis::pixels,
                  false, static_cast<const float*>(d.bias), nullptr,        streams_result(d, plan)};
  store.fetches = fetches_result(d, plan);
  gemm_blocked<float>(
      plan, workspace,
      [&](float* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) -> WeightRows<AHEAD> {
        pack_weight_rows(d, dst, mr, m0, mb, k0, kb);
        return {dst};
      },
      [&](float* dst, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) {
        return pack_pixel_columns(d, dst, nr, k0, kb, n0, nb);
      },
      store);
}
void forward_rows(const ConvProblem& d, int64_t workers, char* workspace) {
  const GemmPlan plan = rows_plan(d, workers);
  if (plan.m <= kFewRows) forward_rows<2>(d, plan, workspace);
  else forward_rows<1>(d, plan, workspace);
}

// ---- NHWC: C[pixels, k] = X[pixels, taps] W[taps, k] ---------------------------------------------------------------

// Panels of kNr channels by all taps, then the bias padded to whole panels.
struct PackedWeight {
  int64_t panels, taps;
  int64_t bytes() const { return round_up(panels * kNr * (taps + 1) + V::N, 16) * 4; }
};
PackedWeight packed_weight(const ConvProblem& d) { return {ceil_div(d.k, kNr), d.c * d.r * d.s}; }

// A pointwise layer's pixels are the rows of a matrix already: read in place.
bool pixels_are_rows(const ConvProblem& d) { return is_pointwise(d) && (d.n == 1 || d.xn == d.q * d.xw); }

// Many pixels of a pointwise layer: few at a time, so that L2 keeps them for all panels. In place they fill only a part
// of its sets (one thread: 1024x14x14->256 193 and 214 GFLOP/s, 256x56x56->64 169 and 190).
GemmPlan columns_plan(const ConvProblem& d, int64_t workers) {
  const Product p = forward_product(d);
  return plan_for(p, workers, is_pointwise(d) && p.m >= 1024 ? 9 * kGemmMaxMr : p.m,
                  pixels_are_rows(d) ? gemm_rows_in_place<float>(d.xw) : kGemmMaxMr);
}

void forward_columns(const ConvProblem& d, int64_t workers, char* workspace) {
  const PackedWeight w = packed_weight(d);
  float* const packed = reinterpret_cast<float*>(workspace);
  float* const bias = packed + w.panels * kNr * w.taps + V::N;
  parallel_for(0, w.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t k = panel * kNr;
      const int lanes = int(min64(kNr, d.k - k)), nr = lanes > V::N ? kNr : V::N;
      float* const to = packed + k * w.taps;
      for (int64_t rs = 0; rs < d.r * d.s; ++rs) {
        const float* from = static_cast<const float*>(d.weight) + k * d.wk + rs / d.s * d.wr + rs % d.s * d.ws;
        gemm_pack_panel<float>(to + rs * d.c * nr, nr, from, d.wk, d.wc, lanes, d.c);
      }
    }
  });
  for (int64_t k = 0; k < w.panels * kNr; ++k) bias[k] = d.bias && k < d.k ? static_cast<const float*>(d.bias)[k] : 0.f;
  const GemmPlan plan = columns_plan(d, workers);
  ConvStore store{&d,      static_cast<float*>(d.y), Axis::pixels,           Axis::channels, false,
                  nullptr, d.bias ? bias : nullptr,  streams_result(d, plan)};
  store.fetches = fetches_result(d, plan);
  const auto panel = [&](float*, int nr, int64_t k0, int64_t, int64_t n0, int) {
    return GemmPanel<float>{packed + n0 * w.taps + k0 * nr, nr};
  };
  if (pixels_are_rows(d)) {
    const float* x = static_cast<const float*>(d.x);
    gemm_blocked<float>(
        plan, workspace + w.bytes(), [&](int64_t m0, int64_t k0) { return GemmRows<float>{x + m0 * d.xw + k0, d.xw}; },
        panel, store);
    return;
  }
  gemm_blocked<float>(
      plan, workspace + w.bytes(),
      [&](float* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) {
        pack_pixel_rows<kGemmMaxMr>(d, dst, mr, m0, mb, k0, kb);
      },
      panel, store);
}

// ---- one small image: C[pixels, k] as dot products of pixels with the weight's rows, which are read once, in place --

// Against packing (one thread): 832x7x7->384 165 and 137 GFLOP/s, 256x7x7->256 123 and 136, 512x8x8->512 160 and 190.
bool by_dots(const ConvProblem& d) {
  return is_pointwise(d) && d.n == 1 && d.q <= kDotMaxM && d.wc == 1 && (d.q <= 16 || (d.c >= 512 && d.q % kNr != 0));
}
bool pixels_in_place(const ConvProblem& d) { return d.xc == 1; }
int64_t dots_workspace(const ConvProblem& d) { return pixels_in_place(d) ? 0 : d.q * d.c * int64_t(sizeof(float)); }

void transpose_pixels(const ConvProblem& d, float* to) {
  parallel_for(0, ceil_div(d.c, V::N), max64(1, (1 << 14) / (V::N * d.q)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t q = 0; q < d.q; q += V::N) {
        const int64_t c = block * V::N;
        V r[V::N];
        for (int i = 0; i < V::N; ++i)
          r[i] =
              c + i < d.c ? load_lanes(static_cast<const float*>(d.x) + (c + i) * d.xc + q * d.xw, d.q - q) : V::zero();
        transpose_square<float>(r);
        for (int i = 0; i < min64(V::N, d.q - q); ++i) {
          if (d.c - c >= V::N) r[i].store(to + (q + i) * d.c + c);
          else r[i].store_n(to + (q + i) * d.c + c, d.c - c);
        }
      }
  });
}

void forward_dots(const ConvProblem& d, char* workspace) {
  const float* pixels = static_cast<const float*>(d.x);
  int64_t step = d.xw;
  if (!pixels_in_place(d)) {
    transpose_pixels(d, reinterpret_cast<float*>(workspace));
    pixels = reinterpret_cast<const float*>(workspace), step = d.c;
  }
  const GemmStore<float> store{
      static_cast<float*>(d.y), d.yw, d.yk, static_cast<const float*>(d.bias), 0, 1, 1, 1, false};
  gemm_dot<float>(d.q, d.k, d.c, pixels, step, static_cast<const float*>(d.weight), d.wk, store);
}

// ---- weight gradient: C[k, taps] = G[k, pixels] X[pixels, taps] ----------------------------------------------------

struct GradPacker {
  const ConvProblem& d;
  void operator()(float* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) const {
    const float* g = static_cast<const float*>(d.y) + m0 * d.yk;
    const int64_t plane = d.p * d.q;  // grad_output is dense: an image's pixels are equally far apart
    for (int64_t done = 0; done < kb;) {
      const int64_t n = (k0 + done) / plane, at = (k0 + done) % plane, length = min64(plane - at, kb - done);
      gemm_pack_panel<float>(dst + done * mr, mr, g + n * d.yn + at * d.yw, d.yk, d.yw, mb, length);
      done += length;
    }
  }
  bool side_by_side() const { return d.yk == 1 && (d.n == 1 || d.yn == d.p * d.q * d.yw); }
  bool whole(float* dst, int mr, int64_t m0, int64_t m1, int64_t k0, int64_t kb) const {
    if (!side_by_side() || mr > V::N) return false;
    gemm_pack_side_by_side<float>(dst, mr, static_cast<const float*>(d.y) + m0 + k0 * d.yw, d.yw, m1 - m0, kb);
    return true;
  }
};

// Taps in the order (c, r, s): im2col rows of a chunk of pixels, transposed.
GemmPanel<float> pack_tap_columns(const ConvProblem& d, float* dst, int nr, int64_t k0, int64_t kb, int64_t n0,
                                  int nb) {
  if (is_pointwise(d)) {
    for (int64_t done = 0; done < kb;) {
      const int64_t n = (k0 + done) / d.q, at = (k0 + done) % d.q, length = min64(d.q - at, kb - done);
      const float* from = static_cast<const float*>(d.x) + n * d.xn + n0 * d.xc + at * d.xw;
      gemm_pack_panel<float>(dst + done * nr, nr, from, d.xc, d.xw, nb, length);
      done += length;
    }
    return {dst, nr};
  }
  float rows[kNr * kMaxKc];
  Tap t = tap_crs(d, n0);
  for (int j = 0; j < nb; ++j, next_crs(d, t))
    for_runs(d, k0, kb, [&](int64_t at, int64_t length, int64_t n, int64_t p, int64_t q) {
      copy_window(d, window(d, at, length, n, p, q), t, rows + j * kMaxKc);
    });
  gemm_pack_panel<float>(dst, nr, rows, kMaxKc, 1, nb, kb);
  return {dst, nr};
}

// Taps in the order (r, s, c) of an NHWC image: each pixel gives runs of channels.
GemmPanel<float> pack_tap_runs(const ConvProblem& d, float* dst, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) {
  if (is_pointwise(d) && nb == nr && d.xn == d.q * d.xw) {
    const float* from = static_cast<const float*>(d.x) + k0 * d.xw + n0;
    if (d.xw % 64 != 0 || d.k <= 3 * kGemmMaxMr) return {from, d.xw};
    gemm_pack_panel<float>(dst, nr, from, 1, d.xw, nb, kb);  // in place its rows would share a few sets of L1
    return {dst, nr};
  }
  const int64_t step = d.stride_w * d.xw;
  for (int done = 0; done < nb;) {
    const int64_t t = n0 + done, c = t % d.c, r = t / d.c / d.s * d.dil_h, s = t / d.c % d.s * d.dil_w;
    const int lanes = int(min64(d.c - c, nb - done));
    for_runs(d, k0, kb, [&](int64_t at, int64_t length, int64_t n, int64_t p, int64_t q) {
      const Window v = window(d, at, length, n, p, q);
      Inside in{0, 0};
      if (v.h + r >= 0 && v.h + r < d.h) in = inside(v.w + s, d.stride_w, d.w, length);
      const float* from = v.x + r * d.xh + s * d.xw + c;
      float* to = dst + at * nr + done;
      for (int64_t i = 0; i < length; ++i, from += step, to += nr)
        copy_row(to, lanes, from, 1, {0, i >= in.begin && i < in.end ? lanes : 0});
    });
    done += lanes;
  }
  if (nb < nr)
    for (int64_t p = 0; p < kb; ++p)
      for (int j = nb; j < nr; ++j) dst[p * nr + j] = 0;
  return {dst, nr};
}

// Few input channels in NHWC are no run that im2col could copy: the kernel of frozen models reads them in place, on a
// weight packed for this call (1x3x32x32 to 16 channels by 3x3 34 -> 12 us, to 32 by 5x5 115 -> 50).
bool direct_takes(const ConvProblem& d) {
  return d.xc == 1 && d.yk == 1 && d.c > 1 && d.c <= 4 && d.k % 16 == 0 && d.r * d.s > 1 && d.pad_h >= 0 &&
         d.pad_w >= 0;
}
PackedConv2dParams as_direct(const ConvProblem& d, char* workspace) {
  PackedConv2dParams p{};
  p.input = static_cast<const float*>(d.x), p.weight = static_cast<const float*>(d.weight);
  p.bias = static_cast<const float*>(d.bias), p.output = static_cast<float*>(d.y);
  p.N = d.n, p.C = d.c, p.H = d.h, p.W = d.w, p.K = d.k, p.R = d.r, p.S = d.s, p.P = d.p, p.Q = d.q;
  p.stride_h = d.stride_h, p.stride_w = d.stride_w, p.pad_h = d.pad_h, p.pad_w = d.pad_w;
  p.dilation_h = d.dil_h, p.dilation_w = d.dil_w, p.groups = 1;
  p.input_stride_n = d.xn, p.input_stride_c = d.xc, p.input_stride_h = d.xh, p.input_stride_w = d.xw;
  p.weight_stride_k = d.wk, p.weight_stride_c = d.wc, p.weight_stride_r = d.wr, p.weight_stride_s = d.ws;
  p.output_stride_n = d.yn, p.output_stride_h = d.yh, p.output_stride_w = d.yw;
  p.low = -__builtin_inff(), p.high = __builtin_inff();
  p.algorithm = PackedConv2dAlgorithm::direct;
  p.packed = reinterpret_cast<float*>(workspace);
  p.workspace = workspace + round_up(packed_direct_bytes(p), 64);
  return p;
}

Product grad_product(const ConvProblem& d) { return {d.k, d.c * d.r * d.s, d.n * d.p * d.q}; }

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t gemm_conv_workspace(const ConvProblem& problem, int64_t workers) {
  const ConvProblem d = flatten_pointwise(problem);
  if (few_channels_takes(d)) return 0;
  if (few_pixels_takes(d)) return few_pixels_workspace(d);
  if (direct_takes(d)) {
    const PackedConv2dParams p = as_direct(d, nullptr);
    return round_up(packed_direct_bytes(p), 64) + packed_direct_workspace(p);
  }
  if (by_dots(d)) return dots_workspace(d);
  if (channels_together(d)) return columns_plan(d, workers).workspace_bytes + packed_weight(d).bytes();
  return rows_plan(d, workers).workspace_bytes;
}

void gemm_conv_forward(const ConvProblem& problem, int64_t workers, char* workspace) {
  const ConvProblem d = flatten_pointwise(problem);
  if (few_channels_takes(d)) return few_channels_forward(d);
  if (few_pixels_takes(d)) return few_pixels_forward(d, workspace);
  if (direct_takes(d)) {
    const PackedConv2dParams p = as_direct(d, workspace);
    packed_direct_pack(p);
    return packed_direct_run(p);
  }
  if (by_dots(d)) forward_dots(d, workspace);
  else if (channels_together(d)) forward_columns(d, workers, workspace);
  else forward_rows(d, workers, workspace);
}

int64_t gemm_conv_grad_workspace(const ConvProblem& d, int64_t workers) {
  return plan_for(grad_product(d), workers).workspace_bytes;
}

void gemm_conv_grad_weight(const ConvProblem& problem, float* grad_weight, int64_t workers, char* workspace) {
  const ConvProblem d = flatten_pointwise(problem);
  const bool last = channels_together(d);
  const GemmPlan plan = plan_for(grad_product(d), workers);
  ConvStore store{&d, grad_weight, Axis::channels, Axis::taps, last, nullptr, nullptr};
  store.fetches = plan.m * plan.n >= kFetchedResult;
  const auto panel = [&](float* dst, int nr, int64_t k0, int64_t kb, int64_t n0, int nb) {
    return last ? pack_tap_runs(d, dst, nr, k0, kb, n0, nb) : pack_tap_columns(d, dst, nr, k0, kb, n0, nb);
  };
  const GradPacker grad{d};
  if (plan.n <= kNr && grad.side_by_side()) {  // nothing would read a packed panel twice
    const float* g = static_cast<const float*>(d.y);
    gemm_blocked<float>(
        plan, workspace, [&](int64_t m0, int64_t k0) { return GemmLanes<float>{g + k0 * d.yw + m0, d.yw}; }, panel,
        store);
  } else {
    gemm_blocked<float>(plan, workspace, grad, panel, store);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
