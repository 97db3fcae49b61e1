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

// Then output o's tap (i, j) is input o + i * width + j - corner all through the tensor: a window has no taps
// outside its plane, so an offset never points across an edge, and planes and rows need not be told apart. In
// channels_last distances are counted in pixels.
template <class S>
void flat_backward(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t pixel = p.channels_last ? p.channels : 1, row = p.w.in * pixel;
  const int64_t total = p.batch * p.channels * p.h.in * p.w.in, corner = p.h.padding * row + p.w.padding * pixel;
  const S* g = static_cast<const S*>(p.grad_output);
  const uint8_t* taps = static_cast<const uint8_t*>(p.offsets);
  S* dx = static_cast<S*>(p.grad_input);
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) {
      A sum = 0;
      for (int64_t i = 0, code = 0; i < p.h.kernel; ++i)
        for (int64_t j = 0; j < p.w.kernel; ++j, ++code) {
          const int64_t at = x + corner - i * row - j * pixel;
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
          int64_t at = x + corner - i * row;
          for (int64_t j = 0; j < p.w.kernel; ++j, ++code, at -= pixel)
#pragma GCC unroll 4
            for (int k = 0; k < kCount; ++k)
              sum[k] = add_where_bytes(sum[k], taps + at + k * V::N, code, V::load(g + at + k * V::N));
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
constexpr int64_t kLeastWindows = 1;  // of a row

FASTNN_INLINE __mmask16 lanes_within(int64_t begin, int64_t end) {  // lanes [begin, end), clamped to 0..16
  const int64_t to = min64(16, max64(0, end)), from = min64(to, begin);
  return __mmask16((1u << to) - (1u << from));
}

// One tap in every byte, held in a register: gcc would make it anew, by way of a general one, for each comparison.
FASTNN_INLINE __m128i held_code(int tap) {
  __m128i code = _mm_set1_epi8(char(tap));
  __asm__("" : "+v"(code));
  return code;
}

// 16 neighbouring windows: gradients and taps, those of the neighbour that shares an input with each, and the lanes
// whose window, and neighbour, exist.
struct Windows {
  __m512 g, ng;
  __m128i t, nt;
  __mmask16 here, next;
};
// What tap rows send to the inputs 2 q and 2 q + 1 of a row. Without padding the even ones are tap 0 of window q and
// tap 2 of window q - 1, the odd ones tap 1 of window q; with padding 1 the odd ones are tap 0 of window q + 1 and tap
// 2 of window q.
struct Pair {
  __m512 two, one;  // inputs that two windows of a row reach, and that one does
};
// The tap row whose taps have the codes left, middle and right: added to `sum`, or alone.
template <bool kPadded, bool kAlone = false>
FASTNN_INLINE Pair add_taps(Pair sum, const Windows& w, __m128i left, __m128i middle, __m128i right) {
  const __mmask16 two = _mm_mask_cmpeq_epi8_mask(w.here, w.t, kPadded ? right : left);
  const __mmask16 one = _mm_mask_cmpeq_epi8_mask(w.here, w.t, middle);
  const __mmask16 neighbour = _mm_mask_cmpeq_epi8_mask(w.next, w.nt, kPadded ? left : right);
  sum.two = kAlone ? _mm512_maskz_mov_ps(two, w.g) : _mm512_mask_add_ps(sum.two, two, sum.two, w.g);
  sum.two = _mm512_mask_add_ps(sum.two, neighbour, sum.two, w.ng);
  sum.one = kAlone ? _mm512_maskz_mov_ps(one, w.g) : _mm512_mask_add_ps(sum.one, one, sum.one, w.g);
  return sum;
}

constexpr int kMostStrips = 16;    // of 32 input columns
constexpr int64_t kStaged = 4096;  // elements of planes on their way past the caches; of 40 KB nothing is gained

// Masked loads and stores take twice as long as whole ones. kWhole: what surrounds the
// plane's rows may be read, and what follows written, since it is written later: the end of
// each row before its beginning. kTwo: two planes of up to 8 outputs and 16 inputs a row,
// the second in the upper lanes. kStream: as kWhole, rows of whole vectors past the caches.
enum class How { kMasked, kWhole, kTwo, kStream };

// Planes [plane, end), downwards: two input rows for each output row, and what its third tap row sends on kept for the
// next.
template <bool kPadded, int kStrips, How kHow>
__attribute__((noinline)) void stride2_planes(const Pool2dParams& p, int64_t plane, int64_t end) {
  constexpr int kNext = kPadded ? 1 : -1, kPlanes = kHow == How::kTwo ? 2 : 1;
  const __m512 zero = _mm512_setzero_ps();
  const int64_t width = p.w.in, height = p.h.in, out = p.w.out, strips = kStrips ? kStrips : ceil_div(width, 32);
  constexpr int kRoom = kStrips ? kStrips : kMostStrips;
  const int64_t plane_in = height * width, plane_out = p.h.out * out;
  const float* g = static_cast<const float*>(p.grad_output) + plane * plane_out;
  const uint8_t* taps = static_cast<const uint8_t*>(p.offsets) + plane * plane_out;
  float* dx = static_cast<float*>(p.grad_input) + plane * plane_in;
  const __m128i code[] = {held_code(0), held_code(1), held_code(2), held_code(3), held_code(4),
                          held_code(5), held_code(6), held_code(7), held_code(8)};
  Pair above[kRoom];
  __mmask16 here[kRoom], next[kRoom];
#pragma GCC unroll 4
  for (int64_t s = 0, q = 0; s < strips; ++s, q += 16) {
    here[s] = lanes_within(0, out - q), next[s] = lanes_within(q + kNext < 0, out - q - kNext);
    if (kHow == How::kTwo) here[s] |= __mmask16(here[s] << 8), next[s] = __mmask16((next[s] & 0xff) | next[s] << 8);
  }
  const auto store = [&](int64_t row, int64_t s, Pair v) __attribute__((always_inline)) {
    const Vec<float> even{kPadded ? v.one : v.two}, odd{kPadded ? v.two : v.one};
    const Vec<float> low = interleave_low(even, odd), high = interleave_high(even, odd);
    float* const to = dx + row * width + 32 * s;
    if constexpr (kHow == How::kTwo) {
      if (row * width + 16 <= plane_in) low.store(to);
      else store_upto(low, to, width);  // the second plane has begun
      high.store(to + plane_in);
    } else if constexpr (kHow == How::kStream) {
      _mm512_stream_ps(to, low.v);
      if (width - 32 * s > 16) _mm512_stream_ps(to + 16, high.v);
    } else if constexpr (kHow == How::kWhole) {
      low.store(to);
      if (width - 32 * s > 16) high.store(to + 16);
    } else {
      store_upto(low, to, width - 32 * s);
      store_upto(high, to + 16, width - 32 * s - 16);
    }
  };
  const auto load = [&](int64_t s) __attribute__((always_inline)) {
    const float* const from = g + 16 * s;
    const uint8_t* const at = taps + 16 * s;
    Windows w;
    w.here = here[s], w.next = next[s];
    if constexpr (kHow == How::kTwo) {
      w.g = Vec<float>::load_halves(from, from + plane_out).v;
      w.ng = Vec<float>::load_halves(from + kNext, from + plane_out + kNext).v;
      w.t =
          (__m128i)_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)at)), (const __m64*)(at + plane_out));
      w.nt = kPadded ? _mm_srli_epi64(w.t, 8) : _mm_slli_epi64(w.t, 8);
    } else if constexpr (kHow == How::kMasked) {
      w.g = _mm512_maskz_loadu_ps(w.here, from), w.ng = _mm512_maskz_loadu_ps(w.next, from + kNext);
      w.t = _mm_maskz_loadu_epi8(w.here, at), w.nt = _mm_maskz_loadu_epi8(w.next, at + kNext);
    } else {
      w.g = _mm512_loadu_ps(from), w.ng = _mm512_loadu_ps(from + kNext);
      w.t = _mm_loadu_si128((const __m128i*)at), w.nt = _mm_loadu_si128((const __m128i*)(at + kNext));
    }
    return w;
  };
  for (; plane < end; plane += kPlanes) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < strips; ++s) above[s] = {zero, zero};
    int64_t row = -p.h.padding;
    for (const float* const stop = g + plane_out; g < stop; row += 2, g += out, taps += out)
#pragma GCC unroll 4
      for (int64_t k = 0; k < strips; ++k) {
        const int64_t s = k == 0 ? strips - 1 : k - 1;
        const Windows w = load(s);
        if (row >= 0) store(row, s, add_taps<kPadded>(above[s], w, code[0], code[1], code[2]));
        if (row + 1 < height)
          store(row + 1, s, add_taps<kPadded, true>(Pair{zero, zero}, w, code[3], code[4], code[5]));
        above[s] = add_taps<kPadded, true>(Pair{zero, zero}, w, code[6], code[7], code[8]);
      }
    for (bool last = true; row < height; ++row, last = false)
#pragma GCC unroll 4
      for (int64_t k = 0; k < strips; ++k) {
        const int64_t s = k == 0 ? strips - 1 : k - 1;
        store(row, s, last ? above[s] : Pair{zero, zero});
      }
    if (kHow == How::kTwo) g += plane_out, taps += plane_out;
    dx += kPlanes * plane_in;
  }
}

template <bool kPadded>
void stride2_backward(const Pool2dParams& p) {
  const int64_t plane_in = p.h.in * p.w.in, plane_out = p.h.out * p.w.out;
  const bool leaves = leaves_caches(p), stream = leaves && p.w.in % 16 == 0, narrow = p.w.in <= 16 && p.w.out <= 8;
  int64_t group = 1;  // planes over whole lines
  while (group * plane_in % 16 != 0) group *= 2;
  const bool staged = leaves && !stream && !narrow && group * plane_in <= kStaged;
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / plane_in), [&](int64_t begin, int64_t end) {
    // Planes with something before, and enough after, that is this call's to read and this thread's to write.
    int64_t from = min64(end, max64(begin, 1));
    const int64_t to = max64(from, end - ceil_div(32, plane_out));
    stride2_planes<kPadded, 0, How::kMasked>(p, begin, from);
    if (narrow) {
      const int64_t pairs = (to - from) / 2 * 2;
      stride2_planes<kPadded, 1, How::kTwo>(p, from, from + pairs);
      from += pairs;
    }
    const auto whole = [&](const Pool2dParams& q, int64_t begin, int64_t end) __attribute__((always_inline)) {
      if (p.w.in <= 32) stride2_planes<kPadded, 1, How::kWhole>(q, begin, end);
      else if (p.w.in <= 64) stride2_planes<kPadded, 2, How::kWhole>(q, begin, end);
      else if (p.w.in > 96 && p.w.in <= 128) stride2_planes<kPadded, 4, How::kWhole>(q, begin, end);
      else stride2_planes<kPadded, 0, How::kWhole>(q, begin, end);
    };
    if (stream) {
      stride2_planes<kPadded, 0, How::kStream>(p, from, to);
    } else if (staged) {  // past the caches by way of a buffer
      alignas(64) float buffer[kStaged + 32];
      Pool2dParams q = p;
      const int64_t first = min64(to, round_up(from, group));
      stride2_planes<kPadded, 0, How::kMasked>(p, from, first);
      for (from = first; from + group <= to; from += group) {
        q.grad_input = buffer - from * plane_in;
        whole(q, from, from + group);
        float* const at = static_cast<float*>(p.grad_input) + from * plane_in;
        for (int64_t i = 0; i < group * plane_in; i += 16) _mm512_stream_ps(at + i, _mm512_load_ps(buffer + i));
      }
      stride2_planes<kPadded, 0, How::kMasked>(p, from, to);
    } else {
      whole(p, from, to);
    }
    stride2_planes<kPadded, 0, How::kMasked>(p, to, end);
    if (stream || staged) _mm_sfence();
  });
}
#elif defined(__AVX2__)
constexpr int64_t kLeastWindows = 6;  // of a row; of 4, 49 us where scattering takes 39

// As above with 8 windows, a lane that has none holding a tap nobody looks for. What reaches an input is added in the
// order of the windows: the bits are the scatter's, which is left the planes around which nothing may be touched.
struct Windows {
  __m256 g, ng;
  __m256i t, nt;
};
struct Pair {
  __m256 two, one;
};
FASTNN_INLINE __m256 sent(__m256i taps, int code, __m256 g) {
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(taps, _mm256_set1_epi32(code))), g);
}
template <bool kPadded>
FASTNN_INLINE Pair add_taps(Pair sum, const Windows& w, int left) {
  const __m256 own = sent(w.t, kPadded ? left + 2 : left, w.g);
  const __m256 neighbour = sent(w.nt, kPadded ? left : left + 2, w.ng);
  sum.two = _mm256_add_ps(_mm256_add_ps(sum.two, kPadded ? own : neighbour), kPadded ? neighbour : own);
  sum.one = _mm256_add_ps(sum.one, sent(w.t, left + 1, w.g));
  return sum;
}

constexpr int kMostStrips = 32;  // of 16 input columns

// Planes [plane, end). Reads 1 output before and up to 16 behind, writes 7 inputs behind, which later rows overwrite.
template <bool kPadded, int kStrips>
__attribute__((noinline)) void stride2_planes(const Pool2dParams& p, int64_t plane, int64_t end) {
  constexpr int kNext = kPadded ? 1 : -1;
  const Pair none{_mm256_setzero_ps(), _mm256_setzero_ps()};
  const int64_t width = p.w.in, height = p.h.in, out = p.w.out, strips = kStrips ? kStrips : ceil_div(width, 16);
  constexpr int kRoom = kStrips ? kStrips : kMostStrips;
  const int64_t plane_in = height * width, plane_out = p.h.out * out;
  const float* g = static_cast<const float*>(p.grad_output) + plane * plane_out;
  const uint8_t* taps = static_cast<const uint8_t*>(p.offsets) + plane * plane_out;
  float* dx = static_cast<float*>(p.grad_input) + plane * plane_in;
  Pair above[kRoom];
  __m256i dead[kRoom], next_dead[kRoom];
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t s = 0; s < strips; ++s) {
    const __m256i q = _mm256_add_epi32(lane, _mm256_set1_epi32(int(8 * s))), last = _mm256_set1_epi32(int(out - 1));
    const __m256i next = _mm256_add_epi32(q, _mm256_set1_epi32(kNext));
    dead[s] = _mm256_cmpgt_epi32(q, last);
    next_dead[s] = _mm256_or_si256(_mm256_cmpgt_epi32(next, last), _mm256_srai_epi32(next, 31));
  }
  const auto store = [&](int64_t row, int64_t s, Pair v) __attribute__((always_inline)) {
    const Vec<float> even{kPadded ? v.one : v.two}, odd{kPadded ? v.two : v.one};
    float* const to = dx + row * width + 16 * s;
    interleave_low(even, odd).store(to);
    if (width - 16 * s > 8) interleave_high(even, odd).store(to + 8);
  };
  const auto load = [&](int64_t s) __attribute__((always_inline)) {
    const float* const from = g + 8 * s;
    const uint8_t* const at = taps + 8 * s;
    Windows w;
    w.g = _mm256_loadu_ps(from), w.ng = _mm256_loadu_ps(from + kNext);
    w.t = _mm256_or_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at)), dead[s]);
    w.nt = _mm256_or_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(at + kNext))), next_dead[s]);
    return w;
  };
  for (; plane < end; ++plane, dx += plane_in) {
    for (int64_t s = 0; s < strips; ++s) above[s] = none;
    int64_t row = -p.h.padding;
    for (const float* const stop = g + plane_out; g < stop; row += 2, g += out, taps += out)
#pragma GCC unroll 2
      for (int64_t k = 0; k < strips; ++k) {
        const int64_t s = k == 0 ? strips - 1 : k - 1;  // the end of each row before its beginning
        const Windows w = load(s);
        if (row >= 0) store(row, s, add_taps<kPadded>(above[s], w, 0));
        if (row + 1 < height) store(row + 1, s, add_taps<kPadded>(none, w, 3));
        above[s] = add_taps<kPadded>(none, w, 6);
      }
    for (bool last = true; row < height; ++row, last = false)
      for (int64_t k = 0; k < strips; ++k) {
        const int64_t s = k == 0 ? strips - 1 : k - 1;
        store(row, s, last ? above[s] : none);
      }
  }
}

template <bool kPadded>
void stride2_backward(const Pool2dParams& p) {
  const int64_t plane_in = p.h.in * p.w.in, plane_out = p.h.out * p.w.out;
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / plane_in), [&](int64_t begin, int64_t end) {
    const int64_t from = min64(end, max64(begin, 1)), to = max64(from, end - ceil_div(16, plane_out));
    if (p.w.in <= 16) stride2_planes<kPadded, 1>(p, from, to);
    else if (p.w.in <= 32) stride2_planes<kPadded, 2>(p, from, to);
    else stride2_planes<kPadded, 0>(p, from, to);
    const auto scatter = [&](int64_t first, int64_t last) {
      if (first == last) return;
      Pool2dParams q = p;
      q.batch = 1, q.channels = last - first;
      q.grad_output = static_cast<const float*>(p.grad_output) + first * plane_out;
      q.offsets = static_cast<uint8_t*>(p.offsets) + first * plane_out;
      q.grad_input = static_cast<float*>(p.grad_input) + first * plane_in;
      max_pool2d_backward_scatter(q);
    };
    scatter(begin, from);
    scatter(to, end);
  });
}
#else
constexpr int64_t kLeastWindows = int64_t(1) << 62;
#endif

FASTNN_INLINE bool keeps_size(const PoolAxis& a) {
  return a.stride == 1 && a.dilation == 1 && a.in == a.out && 2 * a.padding == a.kernel - 1;
}
FASTNN_INLINE bool is_3_by_2(const PoolAxis& a) {
  return a.kernel == 3 && a.stride == 2 && a.dilation == 1 && a.padding <= 1;
}

bool is_flat(const Pool2dParams& p) {
  // Whole vectors of channels are rather spread, but for 16-bit ones, whose sums would need a buffer.
  if (p.channels_last && p.channels % lanes_of(p) == 0 && (p.dtype == DType::f32 || p.dtype == DType::f64))
    return false;
  return kVecBytes >= 32 && !p.adaptive && !p.wide && p.h.kernel * p.w.kernel <= kFlatTaps && keeps_size(p.h) &&
         keeps_size(p.w);
}
bool is_stride2(const Pool2dParams& p) {
  return p.w.out >= kLeastWindows && !p.adaptive && p.dtype == DType::f32 && p.w.in <= 512 && is_3_by_2(p.h) &&
         is_3_by_2(p.w);
}

}  // namespace

bool fits_gather(const Pool2dParams& p) { return is_flat(p) || (!p.channels_last && is_stride2(p)); }

Status max_pool2d_backward_gather(const Pool2dParams& p) {
#if defined(__AVX2__)
  if (!is_flat(p)) {
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
