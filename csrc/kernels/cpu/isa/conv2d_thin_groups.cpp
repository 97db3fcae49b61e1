// Pointwise convolution of dense NHWC images in groups of few results or of few channels: all groups of a run of pixels
// before the next run. Products would go through the images group by group, in tiles that are mostly empty.
#include "../../parallel.h"
#include "conv2d_gemm.h"
#include "gemm_dot.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
constexpr int64_t kThin = 8;  // results, or channels, of a group

// ---- few results: dot products of pixels with the rows of the weight -----------------------------------------------

void pixel_dots(const ConvProblem& d, int64_t groups, int64_t weight_step, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(d.k, int64_t(kDotRows));
  // A group's channels are a short part of every pixel, no stream that the hardware would follow: the next run's are
  // fetched by hand (8x160x56x56->8 in 8 groups 3.2 -> 0.8 ms; images that the caches hold lose up to a fifth).
  const bool far = d.n * d.q * d.xw > 1 << 20;
  for (int64_t group = 0; group < groups; ++group) {
    const float* const x = static_cast<const float*>(d.x) + group * d.c;
    const float* const weight = static_cast<const float*>(d.weight) + group * weight_step;
    const float* const bias = d.bias ? static_cast<const float*>(d.bias) + group * d.k : nullptr;
    float* const y = static_cast<float*>(d.y) + group * d.k;
    for (int64_t q = begin; q < end; q += kDotGroup) {
      const int count = int(min64(kDotGroup, end - q));
      if (far)
        for (int i = 0; i < kDotGroup; ++i)
          for (int64_t c = 0; c < d.c; c += 16) __builtin_prefetch(x + (q + kDotGroup + i) * d.xw + c);
      float sums[kThin * kDotGroup];
      for (int64_t k = 0; k < d.k; ++k)
        for (int i = 0; i < kDotGroup; ++i) sums[k * kDotGroup + i] = bias ? bias[k] : 0.f;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t k = d.k * part / parts;
        const int rows = int(d.k * (part + 1) / parts - k);
        for (int i = 0, n; i < count; i += n) {
          n = rows * 8 <= kDotRows * 4 && count - i >= 8 ? 8 : count - i >= 4 ? 4 : 1;
          dot_tile_of<float>(rows, n)(d.c, weight + k * d.wk, d.wk, x + (q + i) * d.xw, d.xw, sums + k * kDotGroup + i);
        }
      }
      for (int i = 0; i < count; ++i)
        for (int64_t k = 0; k < d.k; ++k) y[(q + i) * d.yw + k] = sums[k * kDotGroup + i];
    }
  }
}

// ---- few channels: each times its row of the weight ----------------------------------------------------------------

// The results of a group in whole vectors: first the bias, then the weights of each channel.
int64_t row_floats(const ConvProblem& d) { return round_up(d.k, V::N); }
int64_t table_floats(const ConvProblem& d) { return row_floats(d) * (d.c + 1); }
void fill_table(const ConvProblem& d, int64_t groups, int64_t weight_step, float* table) {
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t c = -1; c < d.c; ++c, table += row_floats(d)) {
      const float* const w = static_cast<const float*>(d.weight) + group * weight_step + c * d.wc;
      for (int64_t k = 0; k < d.k; ++k)
        table[k] = c >= 0 ? w[k * d.wk] : d.bias ? static_cast<const float*>(d.bias)[group * d.k + k] : 0.f;
      for (int64_t k = d.k; k < row_floats(d); ++k) table[k] = 0;
    }
}

// One vector of the results of R pixels, or its first `lanes`.
template <int R, bool FULL>
FASTNN_INLINE void spread(const float* table, int64_t row, int64_t channels, const float* x, int64_t in, float* y,
                          int64_t out, int64_t lanes) {
  V acc[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = V::load(table);
  for (int64_t c = 0; c < channels; ++c) {
    table += row;
    const V w = V::load(table);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r] = fma(V::set1(x[r * in + c]), w, acc[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (FULL) acc[r].store(y + r * out);
    else acc[r].store_n(y + r * out, lanes);
  }
}
template <int R>
void spread_pixels(const ConvProblem& given, int64_t groups, const float* table, int64_t q) {
  const ConvProblem d = given;  // which no store can change
  const int64_t row = row_floats(d), floats = table_floats(d), whole = d.k / V::N * V::N;
  const float* x = static_cast<const float*>(d.x) + q * d.xw;
  float* y = static_cast<float*>(d.y) + q * d.yw;
  for (int64_t group = 0; group < groups; ++group, table += floats, x += d.c, y += d.k) {
    for (int64_t k = 0; k < whole; k += V::N) spread<R, true>(table + k, row, d.c, x, d.xw, y + k, d.yw, V::N);
    if (whole < d.k) spread<R, false>(table + whole, row, d.c, x, d.xw, y + whole, d.yw, d.k - whole);
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

// Against a product each, of 430 random layers (c channels to k results): dots x1.2 to x3.0 as fast, x0.6 to x1.1 where
// c < 6k, whose sums over the lanes take longer than the sums themselves; AVX2 x0.3 to x0.9 below 32 channels.
bool thin_groups_takes(const ConvProblem& d, int64_t groups) {
  if (kVecBytes < 32 || !is_pointwise(d) || !groups_dense(d, groups)) return false;
  if (d.k <= kThin) return d.wc == 1 && d.c >= 6 * d.k && d.c >= (kVecBytes >= 64 ? 17 : 32);
  return d.c <= kThin && d.k > V::N;
}

int64_t thin_groups_workspace(const ConvProblem& d, int64_t groups) {
  return d.k <= kThin ? 0 : groups * table_floats(d) * int64_t(sizeof(float));
}

void thin_groups_forward(const ConvProblem& d, int64_t groups, int64_t weight_step, char* workspace) {
  const bool dots = d.k <= kThin;
  float* const table = reinterpret_cast<float*>(workspace);
  if (!dots) fill_table(d, groups, weight_step, table);
  // Runs are cut by shape alone: which pixels share a tile decides the order of a sum.
  const int64_t pixels = d.n * d.q, run = dots ? kDotGroup : 4, fma = run * groups * d.c * d.k;
  parallel_for(0, ceil_div(pixels, run), max64(1, (1 << 15) / fma), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * run, last = min64(pixels, first + run);
      if (dots) pixel_dots(d, groups, weight_step, first, last);
      else if (last - first == 4) spread_pixels<4>(d, groups, table, first);
      else
        for (int64_t q = first; q < last; ++q) spread_pixels<1>(d, groups, table, q);
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
