// Depthwise convolution of NCHW float32 images, 3x3 and 5x5, where the CPU has masked loads: one channel at a time,
// columns in the vector lanes, the image read in place.
//
// A tile is up to four vectors of outputs, one below the other; lanes outside the image are masked off, rows outside it
// are zeros. With AVX-512 a tile walks along its rows and loads each value once, shifting it between registers for the
// taps; elsewhere it loads once per column of the kernel. Images so narrow that two output rows fill one vector have
// them side by side, put in place by permutations. Nothing is copied or transposed: channels in the lanes, which needs
// a transposition, takes 75 ns for a 14x14 image, a masked load per tap 50, this 35.
#include "../../parallel.h"
#include "conv2d_depthwise_tiles.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX2__)
namespace {

using namespace depthwise_tiles;

Rows plan(const Conv2dParams& p) {
  Rows o{};
  o.n = p.N, o.c = p.C, o.taps = p.R, o.stride = p.stride_h;
  o.weight = static_cast<const float*>(p.weight);
  o.wk = p.weight_stride_k, o.wr = p.weight_stride_r, o.ws = p.weight_stride_s;
  if (p.pass == Conv2dPass::grad_input) {
    o.x = static_cast<const float*>(p.grad_output), o.y = static_cast<float*>(p.grad_input);
    o.h = p.P, o.w = p.Q, o.p = p.H, o.q = p.W;
    o.xn = p.output_stride_n, o.xc = p.output_stride_k, o.xh = p.output_stride_p;
    o.yn = p.input_stride_n, o.yc = p.input_stride_c, o.yh = p.input_stride_h;
    o.spread = p.stride_h == 2;
    o.stride = 1;
    if (!o.spread) {
      o.weight += (o.taps - 1) * (o.wr + o.ws);
      o.wr = -o.wr, o.ws = -o.ws;
      o.pad_h = o.taps - 1 - p.pad_h, o.pad_w = o.taps - 1 - p.pad_w;
    }
  } else {
    const bool forward = p.pass == Conv2dPass::forward;
    o.x = static_cast<const float*>(p.input);
    o.y = static_cast<float*>(forward ? p.output : const_cast<void*>(p.grad_output));
    o.h = p.H, o.w = p.W, o.p = p.P, o.q = p.Q, o.pad_h = p.pad_h, o.pad_w = p.pad_w;
    o.xn = p.input_stride_n, o.xc = p.input_stride_c, o.xh = p.input_stride_h;
    o.yn = p.output_stride_n, o.yc = p.output_stride_k, o.yh = p.output_stride_p;
    o.bias = forward ? static_cast<const float*>(p.bias) : nullptr;
  }
  o.far = o.w > N && o.n * o.c * (o.h * o.xh + o.p * o.yh) > (1 << 20);
#if defined(__AVX512F__)
  o.pairs = !o.spread && o.q <= N / 2 && o.w <= (o.stride == 1 ? N / 2 : N) && o.xh == o.w && o.yh == o.q;
#endif
  return o;
}

// A few rows at a time are no pattern that the hardware prefetcher follows: out of the caches, 8 images
// of 32x112x112 took 2.5 ms without these, 0.5 with (1024 floats ahead; 2048 and 4096 are slower).
constexpr int64_t kAhead = 1024;
template <int WRITE>
FASTNN_INLINE void prefetch_rows(const Rows& o, const float* at, int64_t floats) {
  for (int64_t i = 0; o.far && i < floats; i += 16) __builtin_prefetch(at + kAhead + i, WRITE);
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

Image image_of(const Rows& o, const Pairing& pairing, const float* x) {
#if defined(__AVX512F__)
  return {x, o.h, o.w, o.xh, o.pad_h, o.pad_w, reinterpret_cast<const __m512i*>(pairing.from), pairing.inside};
#else
  (void)pairing;
  return {x, o.h, o.w, o.xh, o.pad_h, o.pad_w};
#endif
}

// ---- forward, and the gradient of the input of stride 1 -------------------------------------------------------------

template <int TAPS>
FASTNN_INLINE void spread_weight(const Rows& o, int64_t c, Raw* w) {
  const float* const from = o.weight + c * o.wk;
#pragma GCC unroll 8
  for (int r = 0; r < TAPS; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < TAPS; ++s) w[r * TAPS + s] = V::set1(from[r * o.wr + s * o.ws]).v;
}

template <int TAPS, int STRIDE, int M, int T, Edge EDGE>
FASTNN_INLINE void forward_tile(const Image& image, int64_t row, int64_t q, const Block& block, const Raw* w, Raw bias,
                                float* y, int64_t yh, int64_t rows, int64_t columns) {
  Raw acc[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t] = bias;
  for_taps<TAPS, STRIDE, M, T, EDGE>(image, row, q, block, [&](Raw v, int t, int tap) __attribute__((always_inline)) {
    acc[t] = acc[t] + w[tap] * v;
  });
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    if (M == 2 && t * M >= rows) break;
    if (EDGE != Edge::none) store_rows<M>(acc[t], y + t * M * yh, min64(M, rows - t * M), columns);
    else V{acc[t]}.store(y + t * yh);
  }
}

template <int TAPS, int STRIDE, int M, int T>
FASTNN_INLINE void forward_rows(const Rows& o, const Image& image, const Block* blocks, int64_t row, const Raw* w,
                                Raw bias, float* y) {
  const int64_t q_end = M == 2 ? 1 : o.q, yh = o.yh;
#if defined(__AVX512F__)
  if constexpr (kShifts<TAPS, STRIDE, M>) {
    const int64_t first = row * STRIDE - o.pad_h;
    const auto walk = [&](auto edge, auto only) __attribute__((always_inline)) {
      constexpr bool kEdge = decltype(edge)::value, kOnly = decltype(only)::value;
      Walk<TAPS, STRIDE, T> tile;
      tile.template enter<kEdge>(image, first);
      for (int64_t q = 0; q < (kOnly ? 1 : q_end); q += N) {
        Raw acc[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[t] = bias;
        tile.template step<kEdge, kOnly>(image, first, q, Mask(0xffff),
                                         [&](Raw v, int t, int tap)
                                             __attribute__((always_inline)) { acc[t] = acc[t] + w[tap] * v; });
        const Mask wanted = Mask(_bzhi_u32(0xffff, unsigned(min64(N, q_end - q))));
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) _mm512_mask_storeu_ps(y + (row + t) * yh + q, wanted, acc[t]);
      }
    };
    const bool edge = first < 0 || first + STRIDE * (T - 1) + TAPS > o.h;
    if (o.w <= N) edge ? walk(Flag<true>{}, Flag<true>{}) : walk(Flag<false>{}, Flag<true>{});
    else edge ? walk(Flag<true>{}, Flag<false>{}) : walk(Flag<false>{}, Flag<false>{});
    return;
  }
#endif
  for (int64_t q = 0; q < q_end; q += N) {
    const Block& block = blocks[q / N];
    float* const to = y + row * yh + q;
    const Edge edge = M == 2 ? Edge::rows : edge_of(image, block, row * STRIDE - o.pad_h, STRIDE * (T - 1) + TAPS);
    if (edge == Edge::none) forward_tile<TAPS, STRIDE, M, T, Edge::none>(image, row, q, block, w, bias, to, yh, T, N);
    else if (edge == Edge::columns)
      forward_tile<TAPS, STRIDE, M, T, Edge::columns>(image, row, q, block, w, bias, to, yh, T, o.q - q);
    else forward_tile<TAPS, STRIDE, M, T, Edge::rows>(image, row, q, block, w, bias, to, yh, o.p - row, o.q - q);
  }
}

template <int TAPS, int STRIDE, int M>
void forward_image(const Rows& o, const Pairing& pairing, const Block* blocks, int64_t n, int64_t c) {
  Raw w[TAPS * TAPS];
  spread_weight<TAPS>(o, c, w);
  const Raw bias = V::set1(o.bias ? o.bias[c] : 0.f).v;
  const Image image = image_of(o, pairing, o.x + n * o.xn + c * o.xc);
  float* const y = o.y + n * o.yn + c * o.yc;
  for (int64_t row = 0; row < o.p;) {
    const int64_t vectors = ceil_div(o.p - row, M);
    const int64_t rows = min64(4 * M, o.p - row);
    prefetch_rows<0>(o, image.x + row * STRIDE * o.xh, rows * STRIDE * o.xh);
    prefetch_rows<1>(o, y + row * o.yh, rows * o.yh);
    if (vectors >= (M == 1 ? 4 : 3)) forward_rows<TAPS, STRIDE, M, 4>(o, image, blocks, row, w, bias, y), row += 4 * M;
    else if (vectors >= 2) forward_rows<TAPS, STRIDE, M, 2>(o, image, blocks, row, w, bias, y), row += 2 * M;
    else forward_rows<TAPS, STRIDE, M, 1>(o, image, blocks, row, w, bias, y), row += M;
  }
}

// ---- the gradient of the input of stride 2 --------------------------------------------------------------------------

// Outputs (2i + a, 2j + b): the taps of their parities, on grad_output's rows around i and columns around j.
template <int TAPS, bool MASKED>
FASTNN_INLINE void spread_tile(const Rows& o, const float* x, int64_t i, int64_t j, const Block& block, const Raw* w,
                               float* y) {
  constexpr int kPad = (TAPS - 1) / 2;
  Raw acc[4] = {};
#pragma GCC unroll 3
  for (int di = -1; di <= 1; ++di) {
    const float* const from = uint64_t(i + di) < uint64_t(o.h) ? x + (i + di) * o.xh + j - 1 : kZeros;
#pragma GCC unroll 3
    for (int dj = -1; dj <= 1; ++dj) {
      if (TAPS == 3 && (di < 0 || dj < 0)) continue;
      const Raw v =
          in_register(MASKED ? load_masked(from + dj + 1, mask_of(block.bits[dj + 1])) : V::load(from + dj + 1).v);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int r = k / 2 + kPad - 2 * di, s = k % 2 + kPad - 2 * dj;
        if (r >= 0 && r < TAPS && s >= 0 && s < TAPS) acc[k] = acc[k] + w[r * TAPS + s] * v;
      }
    }
  }
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a) {
    if (2 * i + a >= o.p) break;
    float* const to = y + (2 * i + a) * o.yh + 2 * j;
    store_upto(interleave_low(V{acc[2 * a]}, V{acc[2 * a + 1]}), to, o.q - 2 * j);
    store_upto(interleave_high(V{acc[2 * a]}, V{acc[2 * a + 1]}), to + N, o.q - 2 * j - N);
  }
}

template <int TAPS>
void spread_image(const Rows& o, const Block* blocks, int64_t n, int64_t c) {
  Raw w[TAPS * TAPS];
  spread_weight<TAPS>(o, c, w);
  const float* const x = o.x + n * o.xn + c * o.xc;
  float* const y = o.y + n * o.yn + c * o.yc;
  for (int64_t i = 0; 2 * i < o.p; ++i) {
    prefetch_rows<0>(o, x + i * o.xh, o.xh);
    prefetch_rows<1>(o, y + 2 * i * o.yh, 2 * o.yh);
    for (int64_t j = 0; 2 * j < o.q; j += N) {
      const Block& block = blocks[j / N];
      if (block.whole) spread_tile<TAPS, false>(o, x, i, j, block, w, y);
      else spread_tile<TAPS, true>(o, x, i, j, block, w, y);
    }
  }
}

// ---- the gradient of the weight -------------------------------------------------------------------------------------

template <int TAPS, int STRIDE, int M, int T, Edge EDGE>
FASTNN_INLINE void grad_tile(const Image& image, int64_t row, int64_t q, const Block& block, const float* y, int64_t yh,
                             int64_t rows, int64_t columns, Raw* acc) {
  Raw g[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
    g[t] = EDGE == Edge::none       ? V::load(y + t * yh).v
           : M == 1 || t * M < rows ? load_rows<M>(y + t * M * yh, min64(M, rows - t * M), columns)
                                    : Raw{};
  for_taps<TAPS, STRIDE, M, T, EDGE>(image, row, q, block, [&](Raw v, int t, int tap) __attribute__((always_inline)) {
    acc[tap] = acc[tap] + g[t] * v;
  });
}

template <int TAPS, int STRIDE, int M, int T>
FASTNN_INLINE void grad_rows(const Rows& o, const Image& image, const Block* blocks, int64_t row, const float* y,
                             Raw* acc) {
  const int64_t q_end = M == 2 ? 1 : o.q, yh = o.yh;
#if defined(__AVX512F__)
  if constexpr (kShifts<TAPS, STRIDE, M> && TAPS == 3) {
    const int64_t first = row * STRIDE - o.pad_h;
    const auto walk = [&](auto edge, auto only) __attribute__((always_inline)) {
      constexpr bool kEdge = decltype(edge)::value, kOnly = decltype(only)::value;
      Walk<TAPS, STRIDE, T> tile;
      tile.template enter<kEdge>(image, first);
      for (int64_t q = 0; q < (kOnly ? 1 : q_end); q += N) {
        const Mask wanted = Mask(_bzhi_u32(0xffff, unsigned(min64(N, q_end - q))));
        Raw g[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) g[t] = load_masked(y + (row + t) * yh + q, wanted);
        tile.template step<kEdge, kOnly>(image, first, q, wanted,
                                         [&](Raw v, int t, int tap)
                                             __attribute__((always_inline)) { acc[tap] = acc[tap] + g[t] * v; });
      }
    };
    const bool edge = first < 0 || first + STRIDE * (T - 1) + TAPS > o.h;
    if (o.w <= N) edge ? walk(Flag<true>{}, Flag<true>{}) : walk(Flag<false>{}, Flag<true>{});
    else edge ? walk(Flag<true>{}, Flag<false>{}) : walk(Flag<false>{}, Flag<false>{});
    return;
  }
#endif
  for (int64_t q = 0; q < q_end; q += N) {
    const Block& block = blocks[q / N];
    const float* const from = y + row * yh + q;
    const Edge edge = M == 2 ? Edge::rows : edge_of(image, block, row * STRIDE - o.pad_h, STRIDE * (T - 1) + TAPS);
    if (edge == Edge::none) grad_tile<TAPS, STRIDE, M, T, Edge::none>(image, row, q, block, from, yh, T, N, acc);
    else if (edge == Edge::columns)
      grad_tile<TAPS, STRIDE, M, T, Edge::columns>(image, row, q, block, from, yh, T, o.q - q, acc);
    else grad_tile<TAPS, STRIDE, M, T, Edge::rows>(image, row, q, block, from, yh, o.p - row, o.q - q, acc);
  }
}

// sums[tap] += the image's part, lane by lane.
template <int TAPS, int STRIDE, int M>
void grad_image(const Rows& o, const Pairing& pairing, const Block* blocks, int64_t n, int64_t c, float* sums) {
  constexpr int T = TAPS == 3 ? 4 : 2;  // vectors of grad_output beside the sums in registers
  Raw acc[TAPS * TAPS];
#pragma GCC unroll 32
  for (int i = 0; i < TAPS * TAPS; ++i) acc[i] = Raw{};
  const Image image = image_of(o, pairing, o.x + n * o.xn + c * o.xc);
  const float* const y = o.y + n * o.yn + c * o.yc;
  int64_t row = 0;
  for (; ceil_div(o.p - row, M) >= T; row += T * M) {
    prefetch_rows<0>(o, image.x + row * STRIDE * o.xh, T * M * STRIDE * o.xh);
    prefetch_rows<0>(o, y + row * o.yh, T * M * o.yh);
    grad_rows<TAPS, STRIDE, M, T>(o, image, blocks, row, y, acc);
  }
  for (; row < o.p; row += M) grad_rows<TAPS, STRIDE, M, 1>(o, image, blocks, row, y, acc);
#pragma GCC unroll 32
  for (int i = 0; i < TAPS * TAPS; ++i) V{V::load(sums + i * N).v + acc[i]}.store(sums + i * N);
}

// ---- loops over images and channels ---------------------------------------------------------------------------------

template <int TAPS, int STRIDE, int M>
void run_rows(const Conv2dParams& p, const Rows& o) {
  const int64_t grain = max64(1, (1 << 15) / (o.p * o.q));
  Block blocks[kMaxWidth / N];
  make_blocks<TAPS, STRIDE>(o, blocks);
  const Pairing pairing(o);
  if (p.pass == Conv2dPass::grad_weight) {
    parallel_for(0, o.c, max64(1, grain / max64(1, o.n)), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        alignas(64) float sums[TAPS * TAPS * N] = {};
        for (int64_t n = 0; n < o.n; ++n) grad_image<TAPS, STRIDE, M>(o, pairing, blocks, n, c, sums);
        float* const to = static_cast<float*>(p.grad_weight) + c * o.wk;
        for (int r = 0; r < TAPS; ++r)
          for (int s = 0; s < TAPS; ++s) to[r * o.wr + s * o.ws] = reduce_add(V::load(sums + (r * TAPS + s) * N));
      }
    });
  } else {
    parallel_for(0, o.n * o.c, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin / o.c, c = begin % o.c, item = begin; item < end; ++item) {
        forward_image<TAPS, STRIDE, M>(o, pairing, blocks, n, c);
        if (++c == o.c) c = 0, ++n;
      }
    });
  }
}

template <int TAPS>
void run_spread(const Rows& o) {
  Rows around = o;  // the columns j - 1, j, j + 1 as a convolution of 3 taps
  around.q = ceil_div(o.q, 2), around.pad_w = 1;
  Block blocks[kMaxWidth / N];
  make_blocks<3, 1>(around, blocks);
  parallel_for(0, o.n * o.c, max64(1, (1 << 15) / (o.p * o.q)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) spread_image<TAPS>(o, blocks, item / o.c, item % o.c);
  });
}

template <int TAPS>
void run(const Conv2dParams& p) {
  const Rows o = plan(p);
  if (o.spread) return run_spread<TAPS>(o);
#if defined(__AVX512F__)
  if (o.pairs) return o.stride == 1 ? run_rows<TAPS, 1, 2>(p, o) : run_rows<TAPS, 2, 2>(p, o);
#endif
  if (o.stride == 1) run_rows<TAPS, 1, 1>(p, o);
  else run_rows<TAPS, 2, 1>(p, o);
}

}  // namespace

bool depthwise_rows_take(const Conv2dParams& p) {
  const int64_t middle = (p.R - 1) / 2;
  return p.dtype == DType::f32 && p.input_stride_w == 1 && p.output_stride_q == 1 && (p.R == 3 || p.R == 5) &&
         p.S == p.R && p.dilation_h == 1 && p.dilation_w == 1 && p.stride_h == p.stride_w && p.stride_h <= 2 &&
         p.pad_h < p.R && p.pad_w == middle &&
         (p.pass != Conv2dPass::grad_input || p.stride_h == 1 || p.pad_h == middle) && max64(p.W, p.Q) <= kMaxWidth;
}

void depthwise_rows(const Conv2dParams& p) { p.R == 3 ? run<3>(p) : run<5>(p); }
#else
bool depthwise_rows_take(const Conv2dParams&) { return false; }
void depthwise_rows(const Conv2dParams&) {}
#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
