// Backward of max pooling on contiguous planes: clear the plane, then add each output's gradient at its maximum. One
// load of a byte finds the tap and a table its distance, where indices would take eight bytes. Four planes at a time:
// neighbouring windows often share their maximum, and each such addition waits for the one before.
#include "../../parallel.h"
#include "pool2d_distances.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least
constexpr int64_t kLongest = 1024;   // outputs of a row, or of a small plane
constexpr int64_t kPlane = 1 << 14;  // elements of the plane, or of its rows, in which 16-bit gradients are added up
constexpr int64_t kSparse = 32;      // inputs for each output from which on only the sums themselves are converted

// memset begins too slowly for planes of a few hundred elements.
template <class S>
FASTNN_INLINE void clear(S* p, int64_t n) {
  constexpr int64_t kLanes = kVecBytes / int64_t(sizeof(S));
  const f32v zero{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) __builtin_memcpy(p + i, &zero, sizeof(zero));
  for (; i < n; ++i) p[i] = S{};
}

#if defined(__AVX2__)
// Where the maxima of 8 outputs lie in their plane, by arithmetic instead of a table: 0.87 to 0.93 of the time.
struct Places {
  bool fits;  // 32 bits
  __m256i inverse, column_step, row_end, last, size;
  explicit Places(const Pool2dParams& p)
      : fits((p.h.in + p.h.padding + reach_of(p.h)) * p.w.in + reach_of(p.w) < 1 << 30),
        inverse(_mm256_set1_epi32(int(65536 / p.w.kernel + 1))),  // exact for every tap
        column_step(_mm256_set1_epi32(int(p.w.dilation))),
        row_end(_mm256_set1_epi32(int(p.h.dilation * p.w.in - p.w.kernel * p.w.dilation))),
        last(_mm256_set1_epi32(int(p.h.kernel * p.w.kernel - 1))),
        size(_mm256_set1_epi32(int(p.h.in * p.w.in))) {}
  // Which of them lie nowhere.
  FASTNN_VEC_FN __m256i find(const uint8_t* taps, __m256i corner, uint32_t* to) const {
    const __m256i tap = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)taps));
    const __m256i row = _mm256_srli_epi32(_mm256_mullo_epi32(tap, inverse), 16);
    const __m256i inside = _mm256_add_epi32(_mm256_mullo_epi32(tap, column_step), _mm256_mullo_epi32(row, row_end));
    const __m256i at = _mm256_add_epi32(corner, inside);
    _mm256_store_si256((__m256i*)to, at);
    return _mm256_or_si256(_mm256_cmpeq_epi32(_mm256_max_epu32(at, size), at), _mm256_cmpgt_epi32(tap, last));
  }
};
#endif

// Where windows begin: those of one row, or of a whole plane when it has few.
struct Corners {
  int64_t rows, count;
  int64_t at[kLongest];
#if defined(__AVX2__)
  int32_t lanes[kLongest];  // the same
  Places places;
#endif
  Corners(const Pool2dParams& p, bool by_rows)
#if defined(__AVX2__)
      : places(p)
#endif
  {
    const Axis h = axis_h(p), w = axis_w(p);
    const bool few = !by_rows && h.out * w.out <= kLongest;
    rows = few ? 1 : h.out, count = few ? h.out * w.out : w.out;
    int64_t i = 0;
    for (int64_t oh = 0; oh < (few ? h.out : 1); ++oh)
      for (int64_t ow = 0; ow < w.out; ++ow) at[i++] = (few ? h.first(oh) * w.in : 0) + w.first(ow);
#if defined(__AVX2__)
    for (i = 0; i < (few ? count : w.out); ++i) lanes[i] = int32_t(at[i]);
#endif
  }
};

// kPlanes neighbouring planes of gradients to sums, already cleared.
template <int kPlanes, bool kOverlap, class S, class A, class O>
FASTNN_INLINE void scatter_planes(const Axis& h, int64_t width, const Corners& corners, const Distances<O>& distance,
                                  const S* g, const O* taps, A* sums) {
  const int64_t plane_in = h.in * width, count = corners.count, plane_out = corners.rows * count;
  const auto add = [&](int64_t at, int64_t k, int64_t i) __attribute__((always_inline)) {
    if constexpr (!kOverlap) sums[k * plane_in + at] = g[k * plane_out + i];
    else sums[k * plane_in + at] += to_acc(g[k * plane_out + i]);
  };
  const auto one_by_one = [&](int64_t top, int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t corner = top + corners.at[i];
#pragma GCC unroll 4
      for (int k = 0; k < kPlanes; ++k) {
        const int64_t at = corner + distance(taps[k * plane_out + i]);
        if (__builtin_expect(uint64_t(at) >= uint64_t(plane_in), 0)) continue;
        add(at, k, i);
      }
    }
  };
  for (int64_t row = 0; row < corners.rows; ++row, g += count, taps += count) {
    const int64_t top = corners.rows > 1 ? h.first(row) * width : 0;
#if defined(__AVX2__)
    if constexpr (sizeof(O) == 1) {
      if (corners.places.fits && count >= 8) {
        const __m256i row_top = _mm256_set1_epi32(int(top));
        for (int64_t i = 0; i < count; i += 8) {
          const int64_t from = min64(i, count - 8);  // the last ones begin earlier
          const __m256i corner = _mm256_add_epi32(row_top, _mm256_loadu_si256((const __m256i*)(corners.lanes + from)));
          alignas(32) uint32_t at[kPlanes][8];
          __m256i nowhere = _mm256_setzero_si256();
#pragma GCC unroll 4
          for (int k = 0; k < kPlanes; ++k)
            nowhere = _mm256_or_si256(nowhere, corners.places.find(taps + k * plane_out + from, corner, at[k]));
          if (__builtin_expect(!_mm256_testz_si256(nowhere, nowhere), 0)) {
            one_by_one(top, i, min64(count, i + 8));
            continue;
          }
          if (from == i) {
#pragma GCC unroll 8
            for (int64_t j = 0; j < 8; ++j)
#pragma GCC unroll 4
              for (int k = 0; k < kPlanes; ++k) add(at[k][j], k, i + j);
          } else {
            for (int64_t j = i - from; j < 8; ++j)
#pragma GCC unroll 4
              for (int k = 0; k < kPlanes; ++k) add(at[k][j], k, from + j);
          }
        }
        continue;
      }
    }
#endif
    one_by_one(top, 0, count);
  }
}

// The same for a plane of 16-bit gradients and few outputs: `sums`, all zero before and after, is read where they are.
template <class S, class A, class O>
FASTNN_INLINE void scatter_sparse(const Axis& h, int64_t width, const Corners& corners, const Distances<O>& distance,
                                  const S* g, const O* taps, A* sums, S* dx) {
  const int64_t plane_in = h.in * width, count = corners.count;
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
    for (int64_t row = 0; row < corners.rows; ++row) {
      const int64_t top = corners.rows > 1 ? h.first(row) * width : 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = top + corners.at[i] + distance(taps[row * count + i]);
        if (__builtin_expect(uint64_t(at) < uint64_t(plane_in), 1)) f(at, row * count + i);
      }
    }
  };
  each([&](int64_t at, int64_t i) __attribute__((always_inline)) { sums[at] += to_acc(g[i]); });
  each([&](int64_t at, int64_t) __attribute__((always_inline)) { dx[at] = from_acc<S>(sums[at]); });
  each([&](int64_t at, int64_t) __attribute__((always_inline)) { sums[at] = 0; });
}

// The same for a plane that is larger than the buffer: it slides downwards, and what no later window reaches is stored.
template <class S, class O>
void scatter_sliding(const Axis& h, int64_t width, const Corners& corners, const Distances<O>& distance, const S* g,
                     const O* taps, acc_t<S>* sums, S* dx) {
  using V = Vec<acc_t<S>>;
  const int64_t reach = reach_of(h), rows = kPlane / width;
  int64_t base = 0;  // the first row in the buffer
  const auto store_until = [&](int64_t end) {
    while (base < end) {
      const int64_t done = min64(rows, end - base), n = done * width, kept = rows * width - n;
      for_vectors<V::N>(
          n, [&](int64_t i, int lanes) { store_some(load_some(sums + i, lanes), dx + base * width + i, lanes); });
      __builtin_memmove(sums, sums + n, uint64_t(kept) * sizeof(*sums));
      __builtin_memset(sums + kept, 0, uint64_t(n) * sizeof(*sums));
      base += done;
    }
  };
  __builtin_memset(sums, 0, uint64_t(rows * width) * sizeof(*sums));
  for (int64_t oh = 0; oh < h.out; ++oh, g += corners.count, taps += corners.count) {
    const int64_t first = h.first(oh);
    if (min64(h.in, first + reach) > base + rows) store_until(first);
    const int64_t top = (first - base) * width, size = min64(rows, h.in - base) * width;
    for (int64_t i = 0; i < corners.count; ++i) {
      const int64_t at = top + corners.at[i] + distance(taps[i]);
      if (__builtin_expect(uint64_t(at) < uint64_t(size), 1)) sums[at] += to_acc(g[i]);
    }
  }
  store_until(h.in);
}

// Straight into the gradient.
template <bool kOverlap, class S, class O>
void scatter(const Pool2dParams& p) {
  const Axis h = axis_h(p);
  const int64_t plane_in = h.in * p.w.in, plane_out = h.out * p.w.out;
  const Distances<O> distance(p, 1);
  const Corners corners(p, false);
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / plane_in), [&](int64_t begin, int64_t end) {
    int64_t plane = begin;
    const auto planes = [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      const S* g = static_cast<const S*>(p.grad_output) + plane * plane_out;
      const O* taps = static_cast<const O*>(p.offsets) + plane * plane_out;
      S* dx = static_cast<S*>(p.grad_input) + plane * plane_in;
      clear(dx, kCount * plane_in);
      scatter_planes<kCount, kOverlap>(h, p.w.in, corners, distance, g, taps, dx);
      plane += kCount;
    };
    while (plane + 4 <= end) planes(Constant<4>{});
    while (plane < end) planes(Constant<1>{});
  });
}

// 16-bit gradients of overlapping windows, added up in a buffer.
template <class S, class O>
void scatter_summed(const Pool2dParams& p) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const Axis h = axis_h(p);
  const int64_t plane_in = h.in * p.w.in, plane_out = h.out * p.w.out;
  const bool slides = plane_in > kPlane, sparse = !slides && plane_out * kSparse < plane_in;
  const Distances<O> distance(p, 1);
  const Corners corners(p, slides);
  parallel_for(0, p.batch * p.channels, max64(1, kGrain / plane_in), [&](int64_t begin, int64_t end) {
    A sums[kPlane];
    if (sparse) clear(sums, plane_in);
    const S* g = static_cast<const S*>(p.grad_output) + begin * plane_out;
    const O* taps = static_cast<const O*>(p.offsets) + begin * plane_out;
    S* dx = static_cast<S*>(p.grad_input) + begin * plane_in;
    for (int64_t plane = begin, count = 1; plane < end; plane += count) {
      count = !sparse && 4 * plane_in <= kPlane && plane + 4 <= end ? 4 : 1;
      const int64_t n = count * plane_in;
      if (slides) {
        scatter_sliding(h, p.w.in, corners, distance, g, taps, sums, dx);
      } else if (sparse) {
        clear(dx, n);
        scatter_sparse(h, p.w.in, corners, distance, g, taps, sums, dx);
      } else {
        clear(sums, n);
        if (count == 4) scatter_planes<4, true>(h, p.w.in, corners, distance, g, taps, sums);
        else scatter_planes<1, true>(h, p.w.in, corners, distance, g, taps, sums);
        for_vectors<V::N>(n, [&](int64_t i, int lanes) { store_some(load_some(sums + i, lanes), dx + i, lanes); });
      }
      g += count * plane_out, taps += count * plane_out, dx += n;
    }
  });
}

template <class S, class O>
void scatter(const Pool2dParams& p) {
  if (!windows_overlap(p)) return scatter<false, S, O>(p);
  if constexpr (__is_same(S, acc_t<S>)) scatter<true, S, O>(p);
  else scatter_summed<S, O>(p);
}

}  // namespace

bool fits_scatter(const Pool2dParams& p) {
  if (p.w.out > kLongest) return false;
  return p.dtype == DType::f32 || p.dtype == DType::f64 || !windows_overlap(p) || p.h.in * p.w.in <= kPlane ||
         reach_of(p.h) * p.w.in <= kPlane;
}

Status max_pool2d_backward_scatter(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) scatter<S, int32_t>(p);
    else scatter<S, uint8_t>(p);
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
