// Tiles of a depthwise convolution of NCHW float32 images: which lanes lie inside the image, and every meeting of a
// tile's outputs with the taps of the kernel. For conv2d_depthwise_rows.cpp, where the reasons are.
#pragma once
#include "conv2d.h"
#include "lanes.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX2__)
namespace depthwise_tiles {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;
constexpr int kMaxWidth = 4096;
constexpr int kMasks = 6;  // per block of columns

// The pass as a convolution of `x` to `y`; for the gradient of the weight, y is grad_output.
struct Rows {
  const float* x;
  float* y;
  int64_t n, c, h, w, p, q, pad_h, pad_w;
  int64_t xn, xc, xh, yn, yc, yh;
  const float* weight;  // tap (0, 0) of channel 0; negative strides turn it round
  int64_t wk, wr, ws;
  const float* bias;
  int64_t taps, stride;
  bool spread;  // the gradient of the input of stride 2: y is written in pairs of rows and columns
  bool pairs;   // two rows in a vector
  bool far;     // rows longer than a vector, and more data than stays in the caches
};

// ---- masks ----------------------------------------------------------------------------------------------------------

// Lanes [begin, end) of a vector.
FASTNN_INLINE uint16_t lanes_between(int64_t begin, int64_t end) {
  begin = max64(0, min64(N, begin)), end = max64(begin, min64(N, end));
  return uint16_t(((1u << end) - 1) & ~((1u << begin) - 1));
}

#if defined(__AVX512F__)
using Mask = __mmask16;
FASTNN_INLINE Mask mask_of(uint16_t bits) { return bits; }
FASTNN_INLINE Raw load_masked(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
#else
using Mask = __m256i;
FASTNN_INLINE Mask mask_of(uint16_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
}
FASTNN_INLINE Raw load_masked(const float* p, Mask m) { return (Raw)_mm256_maskload_ps(p, m); }
#endif

// Of a block of N output columns: which lanes of its loads lie inside the image. Load k is that of tap k, or for stride
// 2 begins (k / 2) * 2 + (k % 2) * N columns after the first tap's.
struct Block {
  uint16_t bits[kMasks];
  bool whole;
};
template <int TAPS, int STRIDE>
void make_blocks(const Rows& o, Block* blocks) {
  constexpr int kLoads = STRIDE == 1 ? TAPS : TAPS / 2 * 2 + 2;
  for (int64_t q = 0; q < o.q; q += N) {
    Block& b = blocks[q / N];
    b.whole = q + N <= o.q;
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = q * STRIDE - o.pad_w + (STRIDE == 1 ? k : k / 2 * 2 + k % 2 * N);
      // Lanes that meet no output stay zero: the gradient of the weight must not see what lies there.
      const int64_t end = STRIDE == 1 ? o.q - q : N;
      b.bits[k] = lanes_between(-at, min64(o.w - at, end));
      b.whole &= b.bits[k] == uint16_t((1u << N) - 1);
    }
  }
}

// ---- the taps of a tile ---------------------------------------------------------------------------------------------

alignas(64) constexpr float kZeros[4 * N] = {};

// An image, and of a narrow one how its rows pair up: lane l of tap column s is lane from[s][l] of what is loaded.
struct Image {
  const float* x;
  int64_t h, w, xh, pad_h, pad_w;
#if defined(__AVX512F__)
  const __m512i* from;
  const uint16_t* inside;
  FASTNN_VEC_FN unsigned row_bits(int64_t i) const { return uint64_t(i) < uint64_t(h) ? (1u << w) - 1 : 0; }
#endif
};

// What of a tile's input may lie outside the image: nothing, columns, or columns and rows.
enum class Edge { none, columns, rows };
FASTNN_INLINE Edge edge_of(const Image& o, const Block& block, int64_t first, int64_t count) {
  if (first < 0 || first + count > o.h) return Edge::rows;
  return block.whole ? Edge::none : Edge::columns;
}

// Calls f(value, t, tap) for every meeting of the vectors t < T of the tile at output (row, q) with a tap.
template <int TAPS, int STRIDE, int M, int T, Edge EDGE, class F>
FASTNN_INLINE void for_taps(const Image& o, int64_t row, int64_t q, const Block& block, const F& f) {
  const int64_t first = row * STRIDE - o.pad_h;
  const float* const corner = o.x + first * o.xh + q * STRIDE - o.pad_w;
#if defined(__AVX512F__)
  if constexpr (M == 2 && STRIDE == 1) {
#pragma GCC unroll 16
    for (int u = 0; u < 2 * (T - 1) + TAPS; ++u) {
      const int64_t i = first + u;
      const Raw v = load_masked(o.x + i * o.w, Mask(o.row_bits(i) | o.row_bits(i + 1) << o.w));
#pragma GCC unroll 8
      for (int s = 0; s < TAPS; ++s) {
        const Raw moved = _mm512_maskz_permutexvar_ps(o.inside[s], o.from[s], v);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          if (u >= 2 * t && u - 2 * t < TAPS) f(moved, t, (u - 2 * t) * TAPS + s);
      }
    }
    return;
  } else if constexpr (M == 2) {
    Raw before[2] = {};
#pragma GCC unroll 32
    for (int u = 0; u < 4 * (T - 1) + TAPS + 2; ++u) {
      const int64_t i = first + u;
      const Raw v = load_masked(o.x + i * o.w, Mask(o.row_bits(i)));
#pragma GCC unroll 8
      for (int s = 0; s < TAPS; ++s)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const int r = u - 2 - 4 * t;
          if (r >= 0 && r < TAPS)
            f(Raw(_mm512_maskz_permutex2var_ps(o.inside[s], before[u % 2], o.from[s], v)), t, r * TAPS + s);
        }
      before[u % 2] = v;
    }
    return;
  }
#endif
  Mask masks[kMasks];
#pragma GCC unroll 8
  for (int k = 0; k < (STRIDE == 1 ? TAPS : TAPS / 2 * 2 + 2); ++k) masks[k] = mask_of(block.bits[k]);
  const auto load = [&](const float* at, int k) __attribute__((always_inline)) {
    return EDGE == Edge::none ? V::load(at).v : load_masked(at, masks[k]);
  };
#pragma GCC unroll 16
  for (int u = 0; u < STRIDE * (T - 1) + TAPS; ++u) {
    const float* from = corner + u * o.xh;
    if (EDGE == Edge::rows && uint64_t(first + u) >= uint64_t(o.h)) from = kZeros;
    const auto use = [&](Raw v, int s) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        if (u >= STRIDE * t && u - STRIDE * t < TAPS) f(v, t, (u - STRIDE * t) * TAPS + s);
    };
#pragma GCC unroll 8
    for (int s = 0; s < TAPS; s += STRIDE) {
      if constexpr (STRIDE == 1) {
        use(in_register(load(from + s, s)), s);
      } else {
        const V one{load(from + s, s)}, two{load(from + s + N, s + 1)};
        use(evens(one, two).v, s);
        if (s + 1 < TAPS) use(odds(one, two).v, s + 1);
      }
    }
  }
}

// ---- the taps of a tile, by shifting --------------------------------------------------------------------------------

#if defined(__AVX512F__)
// A load that crosses a cache line takes two cycles, two shifts between registers one: here every value of a row is
// loaded once and moved to the lanes where the taps want it. A tile walks along its rows and carries the block before.
template <int TAPS, int STRIDE, int M>
constexpr bool kShifts = M == 1 && (STRIDE == 1 || TAPS == 3);

template <int TAPS, int STRIDE, int T>
struct Walk {
  static constexpr int kRows = STRIDE * (T - 1) + TAPS, kMiddle = TAPS / 2;
  Raw before[kRows], now[kRows];

  template <bool EDGE>
  FASTNN_VEC_FN void enter(const Image& o, int64_t first) {
#pragma GCC unroll 16
    for (int u = 0; u < kRows; ++u) {
      before[u] = Raw{};
      if (STRIDE == 1) now[u] = load<EDGE>(o, first, u, 0);
    }
  }
  // Calls f(value, t, tap) as for_taps() does, for the N output columns from q on, and moves on. Values of lanes that
  // `wanted` lacks are zero. ONLY: the row has no other block.
  template <bool EDGE, bool ONLY, class F>
  FASTNN_VEC_FN void step(const Image& o, int64_t first, int64_t q, Mask wanted, const F& f) {
#pragma GCC unroll 16
    for (int u = 0; u < kRows; ++u) {
      const auto use = [&](__m512i v, int s) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          if (u >= STRIDE * t && u - STRIDE * t < TAPS) f(Raw(v), t, (u - STRIDE * t) * TAPS + s);
      };
      if constexpr (STRIDE == 1) {
        const __m512i left = __m512i(before[u]), middle = __m512i(now[u]),
                      right = ONLY ? __m512i{} : __m512i(load<EDGE>(o, first, u, q + N));
        if (TAPS == 5) use(_mm512_maskz_alignr_epi32(wanted, middle, left, 14), 0);
        use(_mm512_maskz_alignr_epi32(wanted, middle, left, 15), kMiddle - 1);
        use(middle, kMiddle);
        use(_mm512_alignr_epi32(right, middle, 1), kMiddle + 1);
        if (TAPS == 5) use(_mm512_alignr_epi32(right, middle, 2), 4);
        before[u] = Raw(middle), now[u] = Raw(right);
      } else {
        const V one{load<EDGE>(o, first, u, 2 * q)}, two{load<EDGE>(o, first, u, 2 * q + N)};
        const V odd = odds(one, two);
        use(_mm512_maskz_alignr_epi32(wanted, __m512i(odd.v), __m512i(before[u]), 15), 0);
        use(__m512i(evens(one, two).v), 1);
        use(__m512i(odd.v), 2);
        before[u] = odd.v;
      }
    }
  }

 private:
  template <bool EDGE>
  static FASTNN_VEC_FN Raw load(const Image& o, int64_t first, int u, int64_t column) {
    unsigned bits = _bzhi_u32(0xffff, unsigned(max64(0, min64(N, o.w - column))));
    if (EDGE && uint64_t(first + u) >= uint64_t(o.h)) bits = 0;
    return load_masked(o.x + (first + u) * o.xh + column, Mask(bits));
  }
};
#else
template <int TAPS, int STRIDE, int M>
constexpr bool kShifts = false;
#endif

// ---- two rows in a vector -------------------------------------------------------------------------------------------

FASTNN_INLINE uint16_t pair_bits(int64_t q) { return uint16_t(((1u << q) - 1) * 0x101u); }

// `count` <= M rows of q columns.
template <int M>
FASTNN_INLINE Raw load_rows(const float* y, [[maybe_unused]] int64_t count, int64_t q) {
#if defined(__AVX512F__)
  if (M == 2) return _mm512_maskz_expand_ps(pair_bits(q), V::load_n(y, count * q).v);
#endif
  return load_upto(y, q).v;
}
template <int M>
FASTNN_INLINE void store_rows(Raw v, float* y, [[maybe_unused]] int64_t count, int64_t q) {
#if defined(__AVX512F__)
  if (M == 2) return V{_mm512_maskz_compress_ps(pair_bits(q), v)}.store_n(y, count * q);
#endif
  store_upto(V{v}, y, q);
}

struct Pairing {
  alignas(64) int32_t from[8][16];
  uint16_t inside[8];
  explicit Pairing(const Rows& o) {
    if (!o.pairs) return;
    for (int s = 0; s < o.taps; ++s) {
      inside[s] = 0;
      for (int lane = 0; lane < 16; ++lane) {
        const int64_t column = lane % 8 * o.stride + s - o.pad_w;
        const bool in = lane % 8 < o.q && column >= 0 && column < o.w;
        from[s][lane] = in ? int32_t(column + lane / 8 * (o.stride == 1 ? o.w : 16)) : 0;
        inside[s] |= uint16_t(in << lane);
      }
    }
  }
};

}  // namespace depthwise_tiles
#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
