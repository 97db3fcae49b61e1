// Backward of max pooling on contiguous planes by gathering, where that is one compare and one masked addition for each
// tap and vector of inputs: windows of stride 1 that keep the plane's size, and 3x3 windows of stride 2.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least
constexpr int64_t kFlatTaps = 9;     // more are slower than scattering

// ---- stride 1, the plane's size kept -------------------------------------------------------------------------------

// Then output o's tap (i, j) is input o + i * width + j - corner all through the tensor: a window has no taps outside its
// plane, so an offset never points across an edge, and planes and rows need not be told apart.
template <class S>
void flat_backward(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t total = p.batch * p.channels * p.h.in * p.w.in, corner = p.h.padding * p.w.in + p.w.padding;
  const S* g = static_cast<const S*>(p.grad_output);
  const uint8_t* taps = static_cast<const uint8_t*>(p.offsets);
  S* dx = static_cast<S*>(p.grad_input);
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) {
      A sum = 0;
      for (int64_t i = 0, code = 0; i < p.h.kernel; ++i)
        for (int64_t j = 0; j < p.w.kernel; ++j, ++code) {
          const int64_t at = x + corner - i * p.w.in - j;
          if (at >= 0 && at < total && taps[at] == code) sum += to_acc(g[at]);
        }
      dx[x] = from_acc<S>(sum);
    }
  };
  parallel_for(0, ceil_div(total, V::N), max64(1, kGrain / V::N), [&](int64_t first, int64_t last) {
    const int64_t begin = first * V::N, end = min64(total, last * V::N);
    // Vectors [from, to) read nothing outside the tensor.
    const int64_t from = min64(end, max64(begin, round_up(corner, V::N)));
    const int64_t to = max64(from, from + (min64(end, total - corner) - from) / V::N * V::N);
    edge(begin, from);
    int64_t x = from;
    const auto vectors = [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      for (; x + kCount * V::N <= to; x += kCount * V::N) {
        V sum[kCount];
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) sum[k] = V::zero();
        for (int64_t i = 0, code = 0; i < p.h.kernel; ++i) {
          const int64_t row = x + corner - i * p.w.in;
          for (int64_t j = 0; j < p.w.kernel; ++j, ++code)
#pragma GCC unroll 4
            for (int k = 0; k < kCount; ++k)
              sum[k] = add_where_bytes(sum[k], taps + row - j + k * V::N, code, V::load(g + row - j + k * V::N));
        }
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) sum[k].store(dx + x + k * V::N);
      }
    };
    vectors(Constant<4>{});
    vectors(Constant<1>{});
    edge(x, end);
  });
}

// ---- 3x3 windows, stride 2 -----------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr bool kStride2 = true;

FASTNN_INLINE __mmask16 lanes_within(int64_t begin, int64_t end) {  // lanes [begin, end), clamped to 0..16
  const int64_t to = min64(16, max64(0, end)), from = min64(to, begin);
  return __mmask16((1u << to) - (1u << from));
}

// What tap row kRow of 16 neighbouring windows sends to the inputs 2 q and 2 q + 1 of its row. Without padding the even
// ones are tap 0 of window q and tap 2 of window q - 1, the odd ones tap 1 of window q; with padding 1 the odd ones are
// tap 0 of window q + 1 and tap 2 of window q. `here` and `next` are the lanes whose window q, and neighbour, exist.
struct Pair {
  __m512 two, one;  // inputs that two windows of a row reach, and that one does
};
template <bool kPadded, int kRow>
FASTNN_INLINE Pair pair_of(__mmask16 here, __mmask16 next, __m512 g, __m512 ng, __m128i t, __m128i nt) {
  const __m128i first = _mm_set1_epi8(3 * kRow), third = _mm_set1_epi8(3 * kRow + 2);
  const __mmask16 one = _mm_mask_cmpeq_epi8_mask(here, t, _mm_set1_epi8(3 * kRow + 1));
  const __mmask16 two = _mm_mask_cmpeq_epi8_mask(here, t, kPadded ? third : first);
  const __mmask16 neighbour = _mm_mask_cmpeq_epi8_mask(next, nt, kPadded ? first : third);
  const __m512 sum = _mm512_maskz_mov_ps(two, g);
  return {_mm512_mask_add_ps(sum, neighbour, sum, ng), _mm512_maskz_mov_ps(one, g)};
}

constexpr int64_t kStrips = 16;  // of 32 input columns

// One plane, downwards: two input rows for each output row, and what its third tap row sends on kept for the next.
template <bool kPadded, bool kOneStrip>
FASTNN_INLINE void stride2_plane(const Pool2dParams& p, const float* g, const uint8_t* taps, float* dx) {
  constexpr int kNext = kPadded ? 1 : -1;
  const __m512 zero = _mm512_setzero_ps();
  const int64_t width = p.w.in, strips = kOneStrip ? 1 : ceil_div(width, 32);
  Pair above[kOneStrip ? 1 : kStrips];
  for (int64_t s = 0; s < strips; ++s) above[s] = {zero, zero};
  const auto store = [&](int64_t row, int64_t s, Pair v) __attribute__((always_inline)) {
    if (uint64_t(row) >= uint64_t(p.h.in)) return;
    const Vec<float> even{kPadded ? v.one : v.two}, odd{kPadded ? v.two : v.one};
    float* const to = dx + row * width + 32 * s;
    store_upto(interleave_low(even, odd), to, width - 32 * s);
    store_upto(interleave_high(even, odd), to + 16, width - 32 * s - 16);
  };
  int64_t row = -p.h.padding;
  for (int64_t oh = 0; oh < p.h.out; ++oh, row += 2, g += p.w.out, taps += p.w.out)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t q = 16 * s;
      const __mmask16 here = lanes_within(0, p.w.out - q), next = lanes_within(q + kNext < 0, p.w.out - q - kNext);
      const __m512 v = _mm512_maskz_loadu_ps(here, g + q), nv = _mm512_maskz_loadu_ps(next, g + q + kNext);
      const __m128i t = _mm_maskz_loadu_epi8(here, taps + q), nt = _mm_maskz_loadu_epi8(next, taps + q + kNext);
      const Pair top = pair_of<kPadded, 0>(here, next, v, nv, t, nt);
      store(row, s, {_mm512_add_ps(above[s].two, top.two), _mm512_add_ps(above[s].one, top.one)});
      store(row + 1, s, pair_of<kPadded, 1>(here, next, v, nv, t, nt));
      above[s] = pair_of<kPadded, 2>(here, next, v, nv, t, nt);
    }
  for (bool last = true; row < p.h.in; ++row, last = false)
    for (int64_t s = 0; s < strips; ++s) store(row, s, last ? above[s] : Pair{zero, zero});
}

template <bool kPadded>
void stride2_backward(const Pool2dParams& p) {
  const int64_t plane_in = p.h.in * p.w.in, plane_out = p.h.out * p.w.out;
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / plane_in), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const float* g = static_cast<const float*>(p.grad_output) + plane * plane_out;
      const uint8_t* taps = static_cast<const uint8_t*>(p.offsets) + plane * plane_out;
      float* dx = static_cast<float*>(p.grad_input) + plane * plane_in;
      if (p.w.in <= 32) stride2_plane<kPadded, true>(p, g, taps, dx);
      else stride2_plane<kPadded, false>(p, g, taps, dx);
    }
  });
}
#else
constexpr bool kStride2 = false;  // without masked loads of bytes the ends of the rows cost more than scattering
#endif

FASTNN_INLINE bool keeps_size(const PoolAxis& a) {
  return a.stride == 1 && a.dilation == 1 && a.in == a.out && 2 * a.padding == a.kernel - 1;
}
FASTNN_INLINE bool is_3_by_2(const PoolAxis& a) { return a.kernel == 3 && a.stride == 2 && a.dilation == 1 && a.padding <= 1; }

bool is_flat(const Pool2dParams& p) {
  return kVecBytes >= 32 && !p.adaptive && !p.wide && p.h.kernel * p.w.kernel <= kFlatTaps && keeps_size(p.h) && keeps_size(p.w);
}
bool is_stride2(const Pool2dParams& p) {
  return kStride2 && !p.adaptive && p.dtype == DType::f32 && p.w.in <= 512 && is_3_by_2(p.h) && is_3_by_2(p.w);
}

}  // namespace

bool fits_gather(const Pool2dParams& p) { return is_flat(p) || is_stride2(p); }

Status max_pool2d_backward_gather(const Pool2dParams& p) {
#if defined(__AVX512F__)
  if (is_stride2(p)) {
    if (p.w.padding) stride2_backward<true>(p);
    else stride2_backward<false>(p);
    return Status::ok;
  }
#endif
  return dispatch_dtype(p.dtype, [&](auto tag) {
    flat_backward<typename decltype(tag)::type>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
