// Depthwise convolution in NHWC: channels in the lanes, the image read in place, no tap outside it is visited.
#include "../../parallel.h"
#include "lanes.h"
#include "packed_conv2d.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;
// Neighbouring vectors of channels summed together: whole cache lines, runs of which the caches fetch ahead, are read
// once (batch 8, four against one, 1024x14x14 890 -> 530 us, 960x7x7 178 -> 108). As many sums as registers hold.
constexpr int kTogether = kVecBytes == 64 ? 4 : 2;
// A last vector of fewer channels is summed with the one before.
constexpr bool kMasks = kVecBytes == 64;
constexpr int kSums = kVecBytes == 64 ? 16 : 8;

// The taps [begin, end) of a kernel line of `taps` that fall on a line of `size` from `at`, `dilation` apart.
struct Taps {
  int64_t begin, end;
};
FASTNN_INLINE Taps taps_inside(int64_t at, int64_t taps, int64_t dilation, int64_t size) {
  const int64_t begin = at >= 0 ? 0 : ceil_div(-at, dilation);
  const int64_t end = at >= size ? 0 : min64(taps, (size - 1 - at) / dilation + 1);
  return {begin, max64(begin, end)};
}

struct Row {
  const float* x;         // tap (0, 0) of output column 0
  const float* w;         // of each vector of channels [r][s][N], bias[N]
  const float* residual;  // or null
  float* y;
  Clamp clamp;
  Taps r;
  int lanes;
  const float* below;  // what the row of outputs below is the first to read, at output column 0; or null
};

// What the row of outputs below is the first to read, for COUNT outputs from column q.
template <int COUNT, int G>
FASTNN_INLINE void fetch_below(const PackedConv2dParams& p, const Row& row, int64_t q) {
  for (int64_t i = 0; i < p.stride_h; ++i)
    for (int64_t j = 0; j < COUNT * p.stride_w; ++j)
      for (int64_t c = 0; c < G * N; c += 16)
        __builtin_prefetch(row.below + i * p.input_stride_h + (q * p.stride_w + j) * p.input_stride_w + c, 0, 2);
}

// Vector `g` of G; where they are not FULL the last has `lanes`.
template <int G, bool FULL>
FASTNN_INLINE Raw load(const Row& row, const float* from, int g) {
  return FULL || g < G - 1 ? V::load(from).v : V::load_n(from, row.lanes).v;
}

template <int COUNT, int G, bool FULL>
FASTNN_INLINE void store(const PackedConv2dParams& p, const Row& row, int64_t q, int64_t count,
                         const Raw (&acc)[COUNT][G]) {
#pragma GCC unroll 8
  for (int j = 0; j < COUNT; ++j) {
    if (j == count) return;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Raw value = acc[j][g];
      if (row.residual) value = value + load<G, FULL>(row, row.residual + (q + j) * p.residual_stride_w + g * N, g);
      float* const to = row.y + (q + j) * p.output_stride_w + g * N;
      if (FULL || g < G - 1) V{row.clamp(value)}.store(to);
      else V{row.clamp(value)}.store_n(to, row.lanes);
    }
  }
}

// COUNT outputs of a row from column q, of G vectors of channels, by a kernel KS wide: what is loaded of x serves every
// tap that it meets. EDGE: some of its columns may lie outside, and only the first `count` outputs be wanted.
template <int COUNT, int G, int KS, int STRIDE, bool EDGE, bool FULL>
FASTNN_INLINE void outputs(const PackedConv2dParams& p, const Row& row, int64_t q, int64_t count) {
  const int64_t taps = p.R * KS * N, group = taps + N, step = p.input_stride_w, left = q * STRIDE - p.pad_w;
  if (!EDGE && row.below) fetch_below<COUNT, G>(p, row, q);
  Raw acc[COUNT][G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; ++j) acc[j][g] = V::load(row.w + g * group + taps).v;
  for (int64_t r = row.r.begin; r < row.r.end; ++r) {
    const float* const x = row.x + r * p.dilation_h * p.input_stride_h + q * STRIDE * step;
    const float* const w = row.w + r * KS * N;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Raw a[KS];
#pragma GCC unroll 8
      for (int s = 0; s < KS; ++s) a[s] = V::load(w + g * group + s * N).v;
#pragma GCC unroll 32
      for (int i = 0; i < (COUNT - 1) * STRIDE + KS; ++i) {
        if (EDGE && uint64_t(left + i) >= uint64_t(p.W)) continue;
        const Raw v = load<G, FULL>(row, x + i * step + g * N, g);
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; ++j)
          if (i >= j * STRIDE && i - j * STRIDE < KS) acc[j][g] += a[i - j * STRIDE] * v;
      }
    }
  }
  store<COUNT, G, FULL>(p, row, q, count, acc);
}

template <int G, int KS, int STRIDE, bool FULL>
void whole_row(const PackedConv2dParams& p, const Row& row) {
  constexpr int kCount = G * 8 <= kSums ? 8 : 4;
  for (int64_t q = 0; q < p.Q;) {
    const int64_t left = q * STRIDE - p.pad_w;
    if (left >= 0 && left + (kCount - 1) * STRIDE + KS <= p.W && q + kCount <= p.Q) {
      outputs<kCount, G, KS, STRIDE, false, FULL>(p, row, q, kCount);
      q += kCount;
    } else if (q + 4 <= p.Q) {
      outputs<4, G, KS, STRIDE, true, FULL>(p, row, q, 4);
      q += 4;
    } else if (q + 3 == p.Q) {
      return outputs<3, G, KS, STRIDE, true, FULL>(p, row, q, 3);
    } else {
      return outputs<2, G, KS, STRIDE, true, FULL>(p, row, q, p.Q - q);
    }
  }
}

// The same of any kernel, stride and dilation: the taps `s` of its lines.
template <int COUNT, int G, bool FULL>
FASTNN_INLINE void any_outputs(const PackedConv2dParams& p, const Row& row, int64_t q, Taps s) {
  const int64_t step = p.stride_w * p.input_stride_w, next = p.dilation_w * p.input_stride_w;
  const int64_t taps = p.R * p.S * N, group = taps + N;
  if (COUNT > 1 && row.below) fetch_below<COUNT, G>(p, row, q);
  Raw acc[COUNT][G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; ++j) acc[j][g] = V::load(row.w + g * group + taps).v;
  for (int64_t r = row.r.begin; r < row.r.end; ++r) {
    const float* x = row.x + r * p.dilation_h * p.input_stride_h + q * step;
    const float* w = row.w + r * p.S * N;
    for (int64_t i = s.begin; i < s.end; ++i) {
      Raw a[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) a[g] = V::load(w + g * group + i * N).v;
#pragma GCC unroll 8
      for (int j = 0; j < COUNT; ++j)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[j][g] += a[g] * load<G, FULL>(row, x + i * next + j * step + g * N, g);
    }
  }
  store<COUNT, G, FULL>(p, row, q, COUNT, acc);
}

template <int G, bool FULL>
void any_row(const PackedConv2dParams& p, const Row& row) {
  // Columns whose taps all lie inside.
  const int64_t reach = (p.S - 1) * p.dilation_w;
  const int64_t first = min64(p.Q, ceil_div(p.pad_w, p.stride_w));
  const int64_t last =
      p.W + p.pad_w - reach <= 0 ? first : max64(first, min64(p.Q, (p.W + p.pad_w - reach - 1) / p.stride_w + 1));
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q)
      any_outputs<1, G, FULL>(p, row, q, taps_inside(q * p.stride_w - p.pad_w, p.S, p.dilation_w, p.W));
  };
  edge(0, first);
  const Taps all{0, p.S};
  int64_t q = first;
  for (; q + 4 <= last; q += 4) any_outputs<4, G, FULL>(p, row, q, all);
  for (; q < last; ++q) any_outputs<1, G, FULL>(p, row, q, all);
  edge(last, p.Q);
}

using RowFn = void (*)(const PackedConv2dParams&, const Row&);
template <int G, bool FULL>
RowFn find_row(const PackedConv2dParams& p) {
  if constexpr (FULL || kMasks) {
    if (p.dilation_w == 1 && p.stride_w == 1) {
      if (p.S == 3) return whole_row<G, 3, 1, FULL>;
      if (p.S == 5) return whole_row<G, 5, 1, FULL>;
      if (p.S == 7) return whole_row<G, 7, 1, FULL>;
    }
    if (p.dilation_w == 1 && p.stride_w == 2) {
      if (p.S == 3) return whole_row<G, 3, 2, FULL>;
      if (p.S == 5) return whole_row<G, 5, 2, FULL>;
    }
  }
  return any_row<G, FULL>;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t packed_depthwise_bytes(const PackedConv2dParams& p) {
  return ceil_div(p.C, N) * (p.R * p.S + 1) * kVecBytes + 64;
}

// Per group of channels: [r][s][lane], then the bias. Taps that lie side by side, in order or turned round, are
// transposed: one by one they took as long as the sums of a small image (1x960x7x7).
void packed_depthwise_pack(const PackedConv2dParams& p) {
  float* to = p.packed;
  const int64_t last = depthwise_3x3_takes(p) ? p.C - N : p.C, taps = p.R * p.S, step = p.weight_stride_s;
  const bool together = (step == 1 || step == -1) && p.weight_stride_r == p.S * step;
  for (int64_t i = 0; i < p.C; i += N, to += (taps + 1) * N) {
    const int64_t c = min64(i, last);
    const int lanes = int(min64(N, p.C - c));
    const float* const from = p.weight + c * p.weight_stride_k;
    if (together) {
      alignas(64) float block[N * N];
      const float* const lowest = step == 1 ? from : from - (taps - 1);
      for (int64_t t = 0; t < taps; t += N) {
        const int count = int(min64(N, taps - t));
        transpose_block(lowest + t, p.weight_stride_k, 1, lanes, count, block);
        for (int j = 0; j < count; ++j) V::load(block + j * N).store(to + (step == 1 ? t + j : taps - 1 - t - j) * N);
      }
    } else {
      for (int64_t t = 0; t < taps; ++t)
        for (int l = 0; l < N; ++l)
          to[t * N + l] = l < lanes ? from[l * p.weight_stride_k + t / p.S * p.weight_stride_r + t % p.S * step] : 0.f;
    }
    (p.bias ? load_upto(p.bias + c, lanes) : V::zero()).store(to + taps * N);
  }
}

void packed_depthwise_run(const PackedConv2dParams& p) {
  if (depthwise_3x3_takes(p)) return depthwise_3x3_run(p);
  const RowFn most = find_row<kTogether, true>(p), two[] = {find_row<2, false>(p), find_row<2, true>(p)},
              one[] = {find_row<1, false>(p), find_row<1, true>(p)};
  const int64_t taps = p.R * p.S;
  // What a row of outputs adds to the one above is fetched a row ahead where the input leaves L2 far behind: groups of
  // channels are no run that the hardware follows (8x96x112x112 at stride 2 0.75 of the time, of 6 MB 1.04).
  const bool far = p.N * p.H * p.W * p.C > 1 << 21;
  const int64_t below = ((p.R - 1) * p.dilation_h + 1) * p.input_stride_h;
  parallel_for(0, p.N * p.P, max64(1, (1 << 15) / (p.Q * p.C)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.P, h = item % p.P, at = h * p.stride_h - p.pad_h;
      const Taps r = taps_inside(at, p.R, p.dilation_h, p.H);
      const float* const x = p.input + n * p.input_stride_n + at * p.input_stride_h - p.pad_w * p.input_stride_w;
      for (int64_t c = 0, vectors; c < p.C; c += vectors * N) {
        const int64_t left = p.C - c;
        vectors = left >= kTogether * N ? kTogether : left >= 2 * N || (kMasks && left > N) ? 2 : 1;
        const Row row{x + c,
                      p.packed + c * (taps + 1),
                      p.residual ? p.residual + n * p.residual_stride_n + h * p.residual_stride_h + c : nullptr,
                      p.output + n * p.output_stride_n + h * p.output_stride_h + c,
                      Clamp(p),
                      r,
                      int(min64(N, left - (vectors - 1) * N)),
                      far ? x + c + below : nullptr};
        (vectors == kTogether ? most : vectors == 2 ? two[left >= 2 * N] : one[left >= N])(p, row);
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
