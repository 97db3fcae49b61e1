// Backward of max pooling with stride 1 that keeps the plane's size. 3x3: each row
// of gradients is read once, its three tap rows added up in registers, and what
// they send to the rows below is kept for those. Wider: columns first, then rows.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least
constexpr int kMostStrips = 16;      // of 16 columns

FASTNN_INLINE __mmask16 lanes_from(int64_t at, int64_t total) {  // those of at, at + 1 ... that are in [0, total)
  const int64_t from = min64(16, max64(0, -at)), to = max64(from, min64(16, total - at));
  return __mmask16((1u << to) - (1u << from));
}

// One plane. Output o's tap (i, j) is input o + (i - 1) * width + j - 1 all through the tensor: a window has no taps
// outside its plane, so no offset points across an edge, and lanes past a row's end
// do no harm. kWhole: 16 elements before and 32 after the plane may be read, and 16
// after it written, since they are written later: the end of each row first.
template <int kStrips, bool kWhole>
__attribute__((noinline)) void same_plane(const Pool2dParams& p, int64_t plane) {
  constexpr int kRoom = kStrips ? kStrips : kMostStrips;
  const int64_t width = p.w.in, height = p.h.in, strips = kStrips ? kStrips : ceil_div(width, 16);
  const int64_t total = p.batch * p.channels * height * width, first = plane * height * width;
  const float* const g = static_cast<const float*>(p.grad_output);
  const uint8_t* const taps = static_cast<const uint8_t*>(p.offsets);
  float* const dx = static_cast<float*>(p.grad_input);
  const __m512 zero = _mm512_setzero_ps();
  __m512 next[kRoom], after[kRoom];  // sums for the row of the present outputs, and for the one below
  for (int64_t s = 0; s < strips; ++s) next[s] = after[s] = zero;
  const auto store = [&](int64_t at, int64_t left, __m512 v) __attribute__((always_inline)) {
    if constexpr (kWhole) _mm512_storeu_ps(dx + at, v);
    else store_upto(Vec<float>{v}, dx + at, left);
  };
  for (int64_t row = 0, at = first; row < height; ++row, at += width)
#pragma GCC unroll 2
    for (int64_t k = 0; k < strips; ++k) {
      const int64_t s = k == 0 ? strips - 1 : k - 1, q = 16 * s;
      __m512 sum[3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const int64_t from = at + q + 1 - j;
        __m512 v;
        __m128i t;
        if constexpr (kWhole) {
          v = _mm512_loadu_ps(g + from);
          t = _mm_loadu_si128((const __m128i*)(taps + from));
        } else {
          const __mmask16 here = lanes_from(from, total);
          v = _mm512_maskz_loadu_ps(here, g + from);
          t = _mm_maskz_loadu_epi8(here, taps + from);
        }
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const __mmask16 hit = _mm_cmpeq_epi8_mask(t, _mm_set1_epi8(char(3 * i + j)));
          sum[i] = j == 0 ? _mm512_maskz_mov_ps(hit, v) : _mm512_mask_add_ps(sum[i], hit, sum[i], v);
        }
      }
      if (row > 0) store(at - width + q, width - q, _mm512_add_ps(next[s], sum[0]));
      next[s] = _mm512_add_ps(after[s], sum[1]);
      after[s] = sum[2];
    }
  for (int64_t k = 0; k < strips; ++k) {
    const int64_t s = k == 0 ? strips - 1 : k - 1;
    store(first + (height - 1) * width + 16 * s, width - 16 * s, next[s]);
  }
}

FASTNN_INLINE bool keeps_size(const PoolAxis& a) {
  return a.stride == 1 && a.dilation == 1 && a.in == a.out && 2 * a.padding == a.kernel - 1;
}
FASTNN_INLINE bool is_3_by_3(const Pool2dParams& p) { return p.h.kernel == 3 && p.w.kernel == 3; }

// ---- wider windows -------------------------------------------------------------------------------------------------

constexpr int64_t kPlane = 4096;  // elements of a plane: 20 KB of sums and columns
constexpr int64_t kMargin = 16;   // around them, what vectors read past the plane

// A load of its own: as operand of a masked addition it would be a masked one, which takes longer.
FASTNN_INLINE __m512 load_whole(const float* p) {
  __m512 v = _mm512_loadu_ps(p);
  __asm__("" : "+v"(v));
  return v;
}

// One plane. The maximum of a window is the maximum, over its rows, of the maxima along them: all windows of one column
// whose maximum lies in a row found it at the same place of that row. So the gradients are
// added up along the columns, to the row of the maximum, and those sums along that row: 2 k
// masked additions for each input instead of k k. As above elements are counted through the
// tensor, and kWhole says that `padding` rows and 16 elements around the plane are in it.
template <int kKernel, bool kWhole>
__attribute__((noinline)) void separable_plane(const Pool2dParams& p, int64_t plane, bool spill) {
  const int64_t rows = kKernel ? kKernel : p.h.kernel, columns = kKernel ? kKernel : p.w.kernel;
  const int64_t width = p.w.in, size = p.h.in * width, first = plane * size, total = p.batch * p.channels * size;
  const float* const g = static_cast<const float*>(p.grad_output);
  const uint8_t* const taps = static_cast<const uint8_t*>(p.offsets);
  float* const dx = static_cast<float*>(p.grad_input) + first;
  float sums[kPlane + 2 * kMargin];
  uint8_t
      at[kPlane + 2 * kMargin];  // column of the window in which its row has the maximum; 255: no window has it there
  const __m128i nowhere = _mm_set1_epi8(-1), limit = _mm_set1_epi8(char(columns));
  const int64_t end = kMargin + round_up(size, 16);
  _mm_storeu_si128((__m128i*)at, nowhere);
  _mm_storeu_si128((__m128i*)(at + end), nowhere);
  _mm512_storeu_ps(sums, _mm512_setzero_ps());
  _mm512_storeu_ps(sums + end, _mm512_setzero_ps());
  for (int64_t m = 0; m < size; m += 16) {
    __m512 sum = _mm512_setzero_ps();
    __m128i column = nowhere;
#pragma GCC unroll 5
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t from = first + m - (i - p.h.padding) * width;
      __m512 v;
      __m128i t;
      if constexpr (kWhole) {
        v = load_whole(g + from);
        t = _mm_loadu_si128((const __m128i*)(taps + from));
      } else {
        const __mmask16 here = lanes_from(from, total);
        v = _mm512_maskz_loadu_ps(here, g + from);
        t = _mm_mask_loadu_epi8(nowhere, here, taps + from);
      }
      t = _mm_sub_epi8(t, _mm_set1_epi8(char(i * columns)));
      const __mmask16 hit = _mm_cmplt_epu8_mask(t, limit);
      sum = _mm512_mask_add_ps(sum, hit, sum, v);
      column = _mm_mask_mov_epi8(column, hit, t);
    }
    _mm512_storeu_ps(sums + kMargin + m, sum);
    _mm_storeu_si128((__m128i*)(at + kMargin + m), column);
  }
  for (int64_t q = 0; q < size; q += 16) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 5
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t from = kMargin + q - (j - p.w.padding);
      const __m128i column = _mm_loadu_si128((const __m128i*)(at + from));
      const __mmask16 hit = _mm_cmpeq_epi8_mask(column, _mm_set1_epi8(char(j)));
      sum = _mm512_mask_add_ps(sum, hit, sum, load_whole(sums + from));
    }
    if (spill) _mm512_storeu_ps(dx + q, sum);
    else store_upto(Vec<float>{sum}, dx + q, size - q);
  }
}

// `spill`: the 16 elements after the plane are this thread's to write, and written later.
template <int kKernel>
void separable(const Pool2dParams& p) {
  const int64_t size = p.h.in * p.w.in, planes = p.batch * p.channels, reach = p.h.padding * p.w.in + kMargin;
  parallel_for(0, planes, max64(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const bool spill = (end - plane - 1) * size >= 16;
      if (plane * size >= reach && (planes - plane - 1) * size >= reach)
        separable_plane<kKernel, true>(p, plane, spill);
      else separable_plane<kKernel, false>(p, plane, spill);
    }
  });
}

// The same for the channels of one row of inputs, channels_last: [from, from + count), whole vectors.
constexpr int64_t kRow = 4096;  // columns times channels

void separable_row(const Pool2dParams& p, int64_t image, int64_t ih, int64_t from, int64_t count) {
  const int64_t width = p.w.in, channels = p.channels, pixel = (image * p.h.in + ih) * width;
  const float* const g = static_cast<const float*>(p.grad_output) + pixel * channels + from;
  const uint8_t* const taps = static_cast<const uint8_t*>(p.offsets) + pixel * channels + from;
  float* const dx = static_cast<float*>(p.grad_input) + pixel * channels + from;
  alignas(64) float sums[kRow];
  alignas(64) uint8_t at[kRow];
  const __m128i limit = _mm_set1_epi8(char(p.w.kernel));
  // The windows of row ih - (i - padding) have it as their row i.
  const int64_t i0 = max64(0, ih + p.h.padding - p.h.in + 1), i1 = min64(p.h.kernel, ih + p.h.padding + 1);
  for (int64_t ow = 0; ow < width; ++ow)
    for (int64_t c = 0; c < count; c += 16) {
      __m512 sum = _mm512_setzero_ps();
      __m128i column = _mm_set1_epi8(-1);
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t o = (ow - (i - p.h.padding) * width) * channels + c;
        const __m128i tap = _mm_loadu_si128((const __m128i*)(taps + o));
        const __m128i t = _mm_sub_epi8(tap, _mm_set1_epi8(char(i * p.w.kernel)));
        const __mmask16 hit = _mm_cmplt_epu8_mask(t, limit);
        sum = _mm512_mask_add_ps(sum, hit, sum, _mm512_loadu_ps(g + o));
        column = _mm_mask_mov_epi8(column, hit, t);
      }
      _mm512_store_ps(sums + ow * count + c, sum);
      _mm_store_si128((__m128i*)(at + ow * count + c), column);
    }
  for (int64_t iw = 0; iw < width; ++iw) {
    const int64_t j0 = max64(0, iw + p.w.padding - width + 1), j1 = min64(p.w.kernel, iw + p.w.padding + 1);
    for (int64_t c = 0; c < count; c += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = j0; j < j1; ++j) {
        const int64_t o = (iw - (j - p.w.padding)) * count + c;
        const __mmask16 hit = _mm_cmpeq_epi8_mask(_mm_load_si128((const __m128i*)(at + o)), _mm_set1_epi8(char(j)));
        sum = _mm512_mask_add_ps(sum, hit, sum, _mm512_load_ps(sums + o));
      }
      _mm512_storeu_ps(dx + iw * channels + c, sum);
    }
  }
}

void separable_rows(const Pool2dParams& p) {
  const int64_t most = kRow / p.w.in / 16 * 16, row = p.w.in * p.channels;
  parallel_for(0, p.batch * p.h.in, max64(1, kGrain / row), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < p.channels; c += most)
        separable_row(p, r / p.h.in, r % p.h.in, c, min64(most, p.channels - c));
  });
}

}  // namespace

bool fits_same(const Pool2dParams& p) {
  if (p.adaptive || p.wide || p.dtype != DType::f32 || !keeps_size(p.h) || !keeps_size(p.w)) return false;
  if (p.channels_last) return p.h.kernel * p.w.kernel > 16 && p.channels % 16 == 0 && p.w.in <= kRow / 16;
  if (is_3_by_3(p)) return p.w.in <= 16 * kMostStrips;
  return p.h.kernel >= 3 && p.w.kernel >= 3 && p.h.in * p.w.in <= kPlane;
}
Status max_pool2d_backward_same(const Pool2dParams& p) {
  if (!is_3_by_3(p)) {
    if (p.channels_last) separable_rows(p);
    else if (p.h.kernel == 5 && p.w.kernel == 5) separable<5>(p);
    else separable<0>(p);
    return Status::ok;
  }
  const int64_t size = p.h.in * p.w.in;
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      if (plane * size < 16 || (end - plane - 1) * size < 32) same_plane<0, false>(p, plane);
      else if (p.w.in <= 16) same_plane<1, true>(p, plane);
      else if (p.w.in <= 32) same_plane<2, true>(p, plane);
      else same_plane<0, true>(p, plane);
    }
  });
  return Status::ok;
}
#else
bool fits_same(const Pool2dParams&) { return false; }
Status max_pool2d_backward_same(const Pool2dParams&) { return Status::invalid_argument; }
#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
