// Depthwise convolution in NHWC: channels in the lanes, the image read in place, no tap outside it is visited.
#include "../../parallel.h"
#include "packed_conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;
// Neighbouring vectors of channels summed together: whole cache lines, runs of which the caches fetch ahead, are read
// once (batch 8, four against one, 1024x14x14 890 -> 530 us, 960x7x7 178 -> 108). As many sums as registers hold.
constexpr int kTogether = kVecBytes == 64 ? 4 : 2;
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

// COUNT outputs of a row from column q, of G vectors of channels. KS: the width of the kernel when known, with
// dilation 1.
template <int COUNT, int G, int KS, bool FULL>
FASTNN_INLINE void outputs(const PackedConv2dParams& p, const Row& row, int64_t q, Taps s) {
  const auto load = [&](const float* from) { return FULL ? V::load(from) : V::load_n(from, row.lanes); };
  const int64_t step = p.stride_w * p.input_stride_w, next = (KS ? 1 : p.dilation_w) * p.input_stride_w;
  const int64_t taps = p.R * p.S * N, group = taps + N;
  if (KS) s = {0, KS};
  if (COUNT > 1 && row.below) {
    for (int64_t i = 0; i < p.stride_h; ++i)
      for (int64_t j = 0; j < COUNT * p.stride_w; ++j)
        for (int64_t c = 0; c < G * N; c += 16)
          __builtin_prefetch(row.below + i * p.input_stride_h + q * step + j * p.input_stride_w + c, 0, 2);
  }
  Raw acc[COUNT][G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; ++j) acc[j][g] = V::load(row.w + g * group + taps).v;
  for (int64_t r = row.r.begin; r < row.r.end; ++r) {
    const float* x = row.x + r * p.dilation_h * p.input_stride_h + q * step;
    const float* w = row.w + r * p.S * N;
#pragma GCC unroll 5
    for (int64_t i = s.begin; i < s.end; ++i) {
      Raw a[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) a[g] = V::load(w + g * group + i * N).v;
#pragma GCC unroll 8
      for (int j = 0; j < COUNT; ++j)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[j][g] += a[g] * load(x + i * next + j * step + g * N).v;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < COUNT; ++j)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Raw value = acc[j][g];
      if (row.residual) value = value + load(row.residual + (q + j) * p.residual_stride_w + g * N).v;
      float* const to = row.y + (q + j) * p.output_stride_w + g * N;
      if (FULL) V{row.clamp(value)}.store(to);
      else V{row.clamp(value)}.store_n(to, row.lanes);
    }
}

template <int G, int KS, bool FULL>
void whole_row(const PackedConv2dParams& p, const Row& row) {
  // Columns whose taps all lie inside.
  const int64_t reach = (p.S - 1) * p.dilation_w;
  const int64_t first = min64(p.Q, ceil_div(p.pad_w, p.stride_w));
  const int64_t last =
      p.W + p.pad_w - reach <= 0 ? first : max64(first, min64(p.Q, (p.W + p.pad_w - reach - 1) / p.stride_w + 1));
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q)
      outputs<1, G, 0, FULL>(p, row, q, taps_inside(q * p.stride_w - p.pad_w, p.S, p.dilation_w, p.W));
  };
  edge(0, first);
  const Taps all{0, p.S};
  int64_t q = first;
  if constexpr (G * 8 <= kSums)
    for (; q + 8 <= last; q += 8) outputs<8, G, KS, FULL>(p, row, q, all);
  for (; q + 4 <= last; q += 4) outputs<4, G, KS, FULL>(p, row, q, all);
  for (; q < last; ++q) outputs<1, G, KS, FULL>(p, row, q, all);
  edge(last, p.Q);
}

using RowFn = void (*)(const PackedConv2dParams&, const Row&);
template <int G, bool FULL>
RowFn find_row(const PackedConv2dParams& p) {
  if (p.dilation_w == 1 && p.S == 3) return whole_row<G, 3, FULL>;
  if (p.dilation_w == 1 && p.S == 5) return whole_row<G, 5, FULL>;
  return whole_row<G, 0, FULL>;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t packed_depthwise_bytes(const PackedConv2dParams& p) {
  return ceil_div(p.C, N) * (p.R * p.S + 1) * kVecBytes + 64;
}

// Per group of channels: [r][s][lane], then the bias.
void packed_depthwise_pack(const PackedConv2dParams& p) {
  float* to = p.packed;
  for (int64_t c = 0; c < p.C; c += N) {
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s)
        for (int l = 0; l < N; ++l)
          *to++ =
              c + l < p.C ? p.weight[(c + l) * p.weight_stride_k + r * p.weight_stride_r + s * p.weight_stride_s] : 0.f;
    for (int l = 0; l < N; ++l) *to++ = p.bias && c + l < p.C ? p.bias[c + l] : 0.f;
  }
}

void packed_depthwise_run(const PackedConv2dParams& p) {
  const RowFn most = find_row<kTogether, true>(p), two = find_row<2, true>(p), one = find_row<1, true>(p),
              part = find_row<1, false>(p);
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
        vectors = left >= kTogether * N ? kTogether : left >= 2 * N ? 2 : 1;
        const Row row{x + c,
                      p.packed + c * (taps + 1),
                      p.residual ? p.residual + n * p.residual_stride_n + h * p.residual_stride_h + c : nullptr,
                      p.output + n * p.output_stride_n + h * p.output_stride_h + c,
                      Clamp(p),
                      r,
                      int(min64(N, left)),
                      far ? x + c + below : nullptr};
        (vectors == kTogether ? most : vectors == 2 ? two : left >= N ? one : part)(p, row);
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
