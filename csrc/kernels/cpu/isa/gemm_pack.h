// Packing for the GEMM driver: panels of `width` lanes by k,
// converted to the accumulator type, zero past the last lane.
#pragma once
#include "simd.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
constexpr int kGemmMaxMr = 14;  // 14 x 2 accumulators, 2 vectors of B, 1-2 broadcasts: 32 registers
#elif defined(__AVX2__)
constexpr int kGemmMaxMr = 6;
#else
constexpr int kGemmMaxMr = 5;  // no FMA: a product needs a register too
#endif

// N vectors of N lanes, transposed by log2 N rounds of interleaving r[i] with r[i + N / 2].
template <class A>
FASTNN_INLINE void transpose_square(Vec<A>* r) {
  constexpr int N = Vec<A>::N;
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    __m512 raw[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) raw[i] = (__m512)r[i].v;
    transpose_registers(raw);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i].v = (typename Vec<A>::Raw)raw[i];
    return;
  }
#endif
  using Int = typename Vec<A>::Int;
  Int lo{}, hi{};
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    lo[i] = i / 2 + (i % 2) * N;
    hi[i] = N / 2 + i / 2 + (i % 2) * N;
  }
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
    Vec<A> t[N];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      t[2 * i].v = __builtin_shuffle(r[i].v, r[i + N / 2].v, lo);
      t[2 * i + 1].v = __builtin_shuffle(r[i].v, r[i + N / 2].v, hi);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = t[i];
  }
}

template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_lanes(const S* p, int64_t lanes) {
  return lanes >= Vec<A>::N ? Vec<A>::load(p) : Vec<A>::load_n(p, lanes > 0 ? lanes : 0);
}

// Up to N lanes whose k lies side by side: N x N blocks, transposed. `room` <= N is how much of a row may be written.
// What lies `ahead` of a lane is fetched with it, if not 0.
template <class S, class A = acc_t<S>>
FASTNN_INLINE void gemm_pack_lanes(A* dst, int width, const S* src, int64_t lane_stride, int lanes, int room, int64_t k,
                                   int64_t ahead) {
  constexpr int N = Vec<A>::N;
  Vec<A> r[N];
  for (int64_t p = 0; p + N <= k; p += N, src += N, dst += N * width) {
    if (ahead) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
        if (i < lanes) __builtin_prefetch(src + i * lane_stride + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = i < lanes ? Vec<A>::load(src + i * lane_stride) : Vec<A>::zero();
    transpose_square<A>(r);
    if (room >= N) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) r[i].store(dst + i * width);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) r[i].store_n(dst + i * width, room);
    }
  }
  const int rest = int(k % N);
  if (!rest) return;
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) r[i] = i < lanes ? load_lanes(src + i * lane_stride, rest) : Vec<A>::zero();
  transpose_square<A>(r);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if (i < rest) r[i].store_n(dst + i * width, min64(room, width));
}

// dst[p * width + l] = src[l * lane_stride + p * k_stride] for l < lanes, 0 for lanes <= l < width (width <= 2 N).
// May write up to N elements past dst[k * width]: pack panels in ascending order and leave that slack at the end.
// `next_panel`: the next `width` lanes exist and are fetched into L2, if k lies side by side: short pieces of many rows
// are no pattern that the hardware follows (products of 500 to 2000 rows x1.00 to x1.05).
template <class S, class A = acc_t<S>>
void gemm_pack_panel(A* dst, int width, const S* src, int64_t lane_stride, int64_t k_stride, int lanes, int64_t k,
                     bool next_panel = false) {
  constexpr int N = Vec<A>::N;
  if (lane_stride == 1) {  // lanes lie side by side: copy rows
    if (lanes == width && width == 2 * N) {
      for (int64_t p = 0; p < k; ++p, src += k_stride, dst += 2 * N) {
        // The next panel's part of the row: it arrives while this one is multiplied.
        __builtin_prefetch(src + 2 * N);
        __builtin_prefetch(src + 3 * N);
        Vec<A>::load(src).store(dst);
        Vec<A>::load(src + N).store(dst + N);
      }
      return;
    }
    for (int64_t p = 0; p < k; ++p, src += k_stride, dst += width)
      for (int l = 0; l < width; l += N) load_lanes(src + l, lanes - l).store(dst + l);
    return;
  }
  if (k_stride != 1) {
    for (int64_t p = 0; p < k; ++p, dst += width)
      for (int l = 0; l < width; ++l) dst[l] = l < lanes ? to_acc(src[l * lane_stride + p * k_stride]) : A(0);
    return;
  }
  const int64_t ahead = next_panel ? width * lane_stride : 0;
  // N lanes at a time: rows a power of two apart share a few sets of L1, where twice as many would push each other's
  // next lines out (32 rows of 4096 bytes: 29 and 46 GB/s).
  if (lanes == width && width == kGemmMaxMr && kGemmMaxMr <= N)
    return gemm_pack_lanes<S>(dst, kGemmMaxMr, src, lane_stride, kGemmMaxMr, N, k, ahead);
  if (lanes == width && width == 2 * N) {
    gemm_pack_lanes<S>(dst, 2 * N, src, lane_stride, N, N, k, ahead);
    gemm_pack_lanes<S>(dst + N, 2 * N, src + N * lane_stride, lane_stride, N, N, k, ahead);
    return;
  }
  for (int l = 0; l < width; l += N)
    gemm_pack_lanes<S>(dst + l, width, src + l * lane_stride, lane_stride, int(min64(N, lanes - l)),
                       l == 0 ? N : int(min64(N, width - l)), k, ahead);
}

// All panels of a block of rows whose lanes lie side by side: panel j of `width` <=
// N lanes goes to dst + j * width * k. A few values of k at a time, so that what
// one panel leaves of a cache line is there for the next. Writes no more than that.
template <class S, class A = acc_t<S>>
void gemm_pack_side_by_side(A* dst, int width, const S* src, int64_t k_stride, int64_t rows, int64_t k) {
  constexpr int64_t kTogether = 16;
  for (int64_t p0 = 0; p0 < k; p0 += kTogether) {
    const int64_t p1 = min64(k, p0 + kTogether);
    for (int64_t m = 0; m < rows; m += width) {
      const int64_t lanes = min64(width, rows - m);
      const S* from = src + m + p0 * k_stride;
      A* to = dst + m * k + p0 * width;
      for (int64_t p = p0; p < p1 - 1; ++p, from += k_stride, to += width) load_lanes(from, lanes).store(to);
      load_lanes(from, lanes).store_n(to, width);  // a whole vector would run into what is packed already
    }
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
