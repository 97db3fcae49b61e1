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

// A load of its own: as operand of a masked addition it would be a masked one, which takes longer.
FASTNN_INLINE __m512 load_whole(const float* p) {
  __m512 v = _mm512_loadu_ps(p);
  __asm__("" : "+v"(v));
  return v;
}

// `planes` planes, as the rows of one. Output o's tap (i, j) is input o + (i - 1) * width + j - 1 all through the
// tensor: a window has no taps outside its plane, so no offset points across an edge, lanes past a row's end do no
// harm, and a plane's first row takes nothing from the rows before. kWhole: 16 elements before and 32 after the planes
// may be read, and 16 after them written, since they are written later: the end of each row first.
template <int kStrips, bool kWhole>
__attribute__((noinline)) void same_planes(const Pool2dParams& p, int64_t plane, int64_t planes) {
  constexpr int kRoom = kStrips ? kStrips : kMostStrips;
  const int64_t width = p.w.in, strips = kStrips ? kStrips : ceil_div(width, 16);
  const int64_t plane_size = p.h.in * width, first = plane * plane_size, total = p.batch * p.channels * plane_size;
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
  // The row of outputs at `at`; the first has no input row above it.
  const auto row = [&](auto is_first, int64_t at) __attribute__((always_inline)) {
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
          v = load_whole(g + from);
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
      if constexpr (!decltype(is_first)::value) store(at - width + q, width - q, _mm512_add_ps(next[s], sum[0]));
      next[s] = _mm512_add_ps(after[s], sum[1]);
      after[s] = sum[2];
    }
  };
  row(Constant<1>{}, first);
  const int64_t end = first + planes * plane_size;
  for (int64_t at = first + width; at < end; at += width) row(Constant<0>{}, at);
  for (int64_t k = 0; k < strips; ++k) {
    const int64_t s = k == 0 ? strips - 1 : k - 1;
    store(end - width + 16 * s, width - 16 * s, next[s]);
  }
}

FASTNN_INLINE bool keeps_size(const PoolAxis& a) {
  return a.stride == 1 && a.dilation == 1 && a.in == a.out && 2 * a.padding == a.kernel - 1;
}
FASTNN_INLINE bool is_3_by_3(const Pool2dParams& p) { return p.h.kernel == 3 && p.w.kernel == 3; }

// ---- wider windows -------------------------------------------------------------------------------------------------

constexpr int64_t kPlane = 4096;  // elements of a plane: 20 KB of sums and columns
constexpr int64_t kMargin =
    64;  // around them, more than any padding: windows of at least 3 rows have 85 columns at most

// kVectors vectors of taps, gradients and sums. One comparison of 64 bytes is good for four of them; the lanes of the
// k-th are bits 16 k ... of its mask.
template <int kVectors>
struct Block;
template <>
struct Block<1> {
  using Bytes = __m128i;
  using Mask = __mmask16;
  static FASTNN_VEC_FN Bytes set1(int64_t byte) { return _mm_set1_epi8(char(byte)); }
  static FASTNN_VEC_FN Bytes load(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static FASTNN_VEC_FN void store(uint8_t* p, Bytes b) { _mm_storeu_si128((__m128i*)p, b); }
  static FASTNN_VEC_FN Bytes minus(Bytes a, Bytes b) { return _mm_sub_epi8(a, b); }
  static FASTNN_VEC_FN Mask less(Bytes a, Bytes b) { return _mm_cmplt_epu8_mask(a, b); }
  static FASTNN_VEC_FN Mask equal(Bytes a, Bytes b) { return _mm_cmpeq_epi8_mask(a, b); }
  static FASTNN_VEC_FN Bytes replace(Bytes a, Mask where, Bytes b) { return _mm_mask_mov_epi8(a, where, b); }
  static FASTNN_VEC_FN void add(__m512* sums, Mask hit, const __m512* v) {
    sums[0] = _mm512_mask_add_ps(sums[0], hit, sums[0], v[0]);
  }
};
template <>
struct Block<4> {
  using Bytes = __m512i;
  using Mask = __mmask64;
  static FASTNN_VEC_FN Bytes set1(int64_t byte) { return _mm512_set1_epi8(char(byte)); }
  static FASTNN_VEC_FN Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static FASTNN_VEC_FN void store(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
  static FASTNN_VEC_FN Bytes minus(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
  static FASTNN_VEC_FN Mask less(Bytes a, Bytes b) { return _mm512_cmplt_epu8_mask(a, b); }
  static FASTNN_VEC_FN Mask equal(Bytes a, Bytes b) { return _mm512_cmpeq_epi8_mask(a, b); }
  static FASTNN_VEC_FN Bytes replace(Bytes a, Mask where, Bytes b) { return _mm512_mask_mov_epi8(a, where, b); }
  // gcc 12 would carry the shorter mask through a general register, and extend its sign there.
  template <int kPart>
  static FASTNN_VEC_FN __mmask16 part(Mask hit) {
    __mmask16 lanes;
    if constexpr (kPart == 0) __asm__("" : "=k"(lanes) : "0"(hit));
    else __asm__("kshiftrq %2, %1, %0" : "=k"(lanes) : "k"(hit), "i"(16 * kPart));
    return lanes;
  }
  static FASTNN_VEC_FN void add(__m512* sums, Mask hit, const __m512* v) {
    sums[0] = _mm512_mask_add_ps(sums[0], part<0>(hit), sums[0], v[0]);
    sums[1] = _mm512_mask_add_ps(sums[1], part<1>(hit), sums[1], v[1]);
    sums[2] = _mm512_mask_add_ps(sums[2], part<2>(hit), sums[2], v[2]);
    sums[3] = _mm512_mask_add_ps(sums[3], part<3>(hit), sums[3], v[3]);
  }
};

// Planes [plane, end). The maximum of a window is the maximum, over its rows, of the maxima along them: all windows of
// one column whose maximum lies in a row found it at the same place of that row. So the gradients are
// added up along the columns, to the row of the maximum, and those sums along that row: 2 k
// masked additions for each input instead of k k. As above elements are counted through the
// tensor, and kWhole says that `padding` rows and 16 elements around the planes are in it. `room`: how many elements
// after the planes are this thread's to write, and written later.
template <int kKernel, bool kWhole>
__attribute__((noinline)) void separable_planes(const Pool2dParams& p, int64_t plane, int64_t end, int64_t room) {
  const int64_t rows = kKernel ? kKernel : p.h.kernel, columns = kKernel ? kKernel : p.w.kernel;
  const int64_t width = p.w.in, size = p.h.in * width, total = p.batch * p.channels * size;
  const int64_t blocks = kWhole ? size / 64 * 64 : 0, padding_h = p.h.padding, padding_w = p.w.padding;
  const float* const g = static_cast<const float*>(p.grad_output);
  const uint8_t* const taps = static_cast<const uint8_t*>(p.offsets);
  alignas(64) float sums[kPlane + 2 * kMargin];
  // Column of the window in which its row has the maximum; 255: no window has it there.
  alignas(64) uint8_t at[kPlane + 2 * kMargin];
  Block<4>::store(at, Block<4>::set1(-1));
  Block<4>::store(at + kMargin + round_up(size, 16), Block<4>::set1(-1));
  for (; plane < end; ++plane) {
    const int64_t first = plane * size;
    const bool spill = (end - plane - 1) * size + room >= 16;
    float* const dx = static_cast<float*>(p.grad_input) + first;
    const auto along_columns = [&](auto count, int64_t m) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(count)::value;
      using B = Block<kVectors>;
      __m512 sum[kVectors];
      typename B::Bytes column = B::set1(-1);
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) sum[k] = _mm512_setzero_ps();
#pragma GCC unroll 5
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t from = first + m - (i - padding_h) * width;
        __m512 v[kVectors];
        typename B::Bytes t;
        if constexpr (kWhole) {
#pragma GCC unroll 4
          for (int k = 0; k < kVectors; ++k) v[k] = load_whole(g + from + 16 * k);
          t = B::load(taps + from);
        } else {
          const __mmask16 here = lanes_from(from, total);
          v[0] = _mm512_maskz_loadu_ps(here, g + from);
          t = _mm_mask_loadu_epi8(column, here, taps + from);
        }
        t = B::minus(t, B::set1(i * columns));
        const auto hit = B::less(t, B::set1(columns));
        B::add(sum, hit, v);
        column = B::replace(column, hit, t);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) _mm512_store_ps(sums + kMargin + m + 16 * k, sum[k]);
      B::store(at + kMargin + m, column);
    };
    const auto along_row = [&](auto count, int64_t q) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(count)::value;
      using B = Block<kVectors>;
      __m512 sum[kVectors];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) sum[k] = _mm512_setzero_ps();
#pragma GCC unroll 5
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t from = kMargin + q - (j - padding_w);
        __m512 v[kVectors];
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) v[k] = load_whole(sums + from + 16 * k);
        B::add(sum, B::equal(B::load(at + from), B::set1(j)), v);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        if (kVectors > 1 || spill) _mm512_storeu_ps(dx + q + 16 * k, sum[k]);
        else store_upto(Vec<float>{sum[k]}, dx + q, size - q);
      }
    };
    const Constant<4> four{};
    const Constant<1> one{};
    int64_t m = 0, q = 0;
    if constexpr (kWhole)
      for (; m < blocks; m += 64) along_columns(four, m);
    for (; m < size; m += 16) along_columns(one, m);
    if constexpr (kWhole)
      for (; q < blocks; q += 64) along_row(four, q);
    for (; q < size; q += 16) along_row(one, q);
  }
}

template <int kKernel>
void separable(const Pool2dParams& p) {
  const int64_t size = p.h.in * p.w.in, planes = p.batch * p.channels;
  const int64_t around = ceil_div(p.h.padding * p.w.in + 16, size);  // planes that are read besides the own one
  parallel_for(0, planes, max64(1, kGrain / size), [&](int64_t begin, int64_t end) {
    const int64_t from = min64(end, max64(begin, around)), to = max64(from, min64(end, planes - around));
    if (begin < from) separable_planes<kKernel, false>(p, begin, from, (end - from) * size);
    if (from < to) separable_planes<kKernel, true>(p, from, to, (end - to) * size);
    if (to < end) separable_planes<kKernel, false>(p, to, end, 0);
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
    // Planes with enough before them to read, and enough after them to read and this thread's to write.
    const int64_t from = min64(end, max64(begin, ceil_div(16, size))), to = max64(from, end - ceil_div(32, size));
    const auto run = [&](auto strips, auto whole, int64_t plane, int64_t stop) __attribute__((always_inline)) {
      if (plane < stop) same_planes<decltype(strips)::value, decltype(whole)::value != 0>(p, plane, stop - plane);
    };
    run(Constant<0>{}, Constant<0>{}, begin, from);
    if (p.w.in <= 16) run(Constant<1>{}, Constant<1>{}, from, to);
    else if (p.w.in <= 32) run(Constant<2>{}, Constant<1>{}, from, to);
    else run(Constant<0>{}, Constant<1>{}, from, to);
    run(Constant<0>{}, Constant<0>{}, to, end);
  });
  return Status::ok;
}
#else
bool fits_same(const Pool2dParams&) { return false; }
Status max_pool2d_backward_same(const Pool2dParams&) { return Status::invalid_argument; }
#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
