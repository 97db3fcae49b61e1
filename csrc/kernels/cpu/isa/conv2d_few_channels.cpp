// Pointwise convolution of few input channels in NCHW: sums of a few terms, where tiles of a product would be all
// set-up. Every plane of the result is a combination of the input's planes, written in runs.
#include "../../parallel.h"
#include "conv2d_gemm.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
constexpr int64_t kMaxChannels = 4;
constexpr int64_t kColumns = 1024;  // of each plane at a time: those of the input stay in L1
constexpr int kPlanes = 4;          // of the result together
constexpr int kVectors = kVecBytes == 64 ? 4 : 2;

// NV vectors of K planes of the result from x and y on, or `lanes` of one.
template <int K, int NV, bool FULL>
FASTNN_INLINE void sums(const ConvProblem& d, const float* x, const float* w, const float* bias, float* y, int lanes) {
  V acc[K][NV];
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[k][v] = V::zero();
  for (int64_t c = 0; c < d.c; ++c) {
    V in[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const float* const from = x + c * d.xc + v * V::N;
      in[v] = FULL ? V::load(from) : V::load_n(from, lanes);
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const V a = V::set1(w[k * d.wk + c * d.wc]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[k][v] = fma(a, in[v], acc[k][v]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    const V b = V::set1(bias ? bias[k] : 0.f);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* const to = y + k * d.yk + v * V::N;
      if (FULL) (acc[k][v] + b).store(to);
      else (acc[k][v] + b).store_n(to, lanes);
    }
  }
}

template <int K>
void planes(const ConvProblem& given, const float* x, int64_t k, float* y, int64_t columns) {
  const ConvProblem d = given;  // which no store can change
  const float* const w = static_cast<const float*>(d.weight) + k * d.wk;
  const float* const bias = d.bias ? static_cast<const float*>(d.bias) + k : nullptr;
  y += k * d.yk;
  int64_t q = 0;
  for (; q + kVectors * V::N <= columns; q += kVectors * V::N) sums<K, kVectors, true>(d, x + q, w, bias, y + q, 0);
  for (; q + V::N <= columns; q += V::N) sums<K, 1, true>(d, x + q, w, bias, y + q, 0);
  if (q < columns) sums<K, 1, false>(d, x + q, w, bias, y + q, int(columns - q));
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

// Against the product of conv2d_gemm.cpp, x1.3 to x5 (2x1x112x112->2 16.8 -> 4.0 us, 4x3x56x56->16 27 -> 12.5, at AVX2
// 8x3x28x28->32 39.6 -> 17.5). Where that writes past the caches two channels and more are its own: as fast, and better
// for what reads the result.
bool few_channels_takes(const ConvProblem& d) {
  const bool streamed = kVecBytes >= 64 && d.c > 1 && d.n * d.k * d.q > 4 << 20;
  return is_pointwise(d) && d.xw == 1 && d.yw == 1 && d.c <= kMaxChannels && d.q >= V::N && !streamed;
}

void few_channels_forward(const ConvProblem& d) {
  const int64_t chunks = ceil_div(d.q, kColumns), work = min64(d.q, kColumns) * d.k * (d.c + 1);
  parallel_for(0, d.n * chunks, max64(1, (1 << 17) / work), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks, q = item % chunks * kColumns, columns = min64(kColumns, d.q - q);
      const float* const x = static_cast<const float*>(d.x) + n * d.xn + q;
      float* const y = static_cast<float*>(d.y) + n * d.yn + q;
      int64_t k = 0;
      for (; k + kPlanes <= d.k; k += kPlanes) planes<kPlanes>(d, x, k, y, columns);
      for (; k < d.k; ++k) planes<1>(d, x, k, y, columns);
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
