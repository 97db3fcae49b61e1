// Picks the kernel of a pooling call, and turns window taps into the flat indices torch returns.
#include "../../parallel.h"
#include "isa.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// Whether the 2x2 backward is faster than scattering: not where a row is a small part of a vector (64x40x8x2 in
// float32 by AVX2: 20 instead of 10 us, but 64x40x8x8 19 instead of 36), nor where rounding to bfloat16 takes longer.
bool prefers_2x2(const Pool2dParams& p) {
  if (kVecBytes < 32) return p.w.out % 8 == 0;
  if (p.dtype == DType::bf16) return kVecBytes == 64 ? p.w.out >= 10 : p.w.out % 8 == 0;
  return p.w.out >= 4 + (kVecBytes == 64 && p.dtype == DType::f16);
}

// The row kernels shuffle strides up to 3; longer ones they load lane by lane.
bool prefers_table(const Pool2dParams& p) { return p.adaptive || p.w.stride > 3; }

// Rows of two vectors at most are looked up by one permutation: with taps up to 4 times as fast as the row kernels.
bool is_permuted(const Pool2dParams& p, int64_t row) { return kVecBytes == 64 && row <= 2 * lanes_of(p); }

// Rows of few windows, each much longer than a vector: a lookup for every tap would fill a lane or two.
bool has_long_windows(const Pool2dParams& p) { return p.w.kernel >= 16 && p.w.out * 8 <= p.w.in; }

// Rows of one window or two whose shares `any` adds up sooner than a table looks them up: not the long ones, except in
// large planes where rows under the same windows are copies of each other.
bool shares_runs(const Pool2dParams& p) {
  return is_short(p) && (!has_long_windows(p) || (p.h.in * p.w.in > 4096 && p.h.kernel <= p.h.stride));
}

// Rows of too few windows for vectors of neighbours; without taps, columns first, then rows are fewer steps for large
// windows. On 1500 random layers a plane a lane took 0.1 to 1.2 of the other kernels' time there.
bool prefers_planes_max(const Pool2dParams& p) {
  if (!fits_planes(p)) return false;
  const int64_t lanes = lanes_of(p);
  if (is_2x2(p)) return 4 * p.w.out <= lanes;
  const bool permuted = is_permuted(p, p.w.in);
  if (p.offsets) return (permuted ? 2 : 1) * p.w.out <= lanes;
  return p.h.kernel * p.w.kernel <= (permuted ? 15 : 16) ? 2 * p.w.out <= lanes : 8 * p.w.out <= lanes;
}
bool prefers_planes_avg(const Pool2dParams& p) {
  return fits_planes(p) && p.w.kernel <= lanes_of(p) && (is_2x2(p) ? 4 : 1) * p.w.out <= lanes_of(p) * 3 / 4;
}

// to[i] = corner + first[i] (first null: 0) + the distance of taps[i]. Where taps are bytes, the divisions go by
// multiplication, in 32 bits: 0.15 to 0.3 of the time.
template <class O>
void indices_of_run(const Pool2dParams& p, const O* taps, int64_t count, int64_t corner, const int64_t* first,
                    int64_t* to) {
  const int64_t width = p.w.kernel, row_step = p.h.dilation * p.w.in, column_step = p.w.dilation;
  const int64_t row_end = row_step - width * column_step;
  int64_t i = 0;
  if (sizeof(O) == 1 && max64(row_step, width * column_step) < 1 << 22) {
    const int32_t inverse = int32_t(65536 / width + 1), column = int32_t(column_step), end = int32_t(row_end);
#if defined(__AVX2__)
    const __m256i corners = _mm256_set1_epi64x(corner);
    for (; i + 8 <= count; i += 8) {
      const __m256i tap = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(taps + i)));
      const __m256i row = _mm256_srli_epi32(_mm256_mullo_epi32(tap, _mm256_set1_epi32(inverse)), 16);
      const __m256i distance = _mm256_add_epi32(_mm256_mullo_epi32(tap, _mm256_set1_epi32(column)),
                                                _mm256_mullo_epi32(row, _mm256_set1_epi32(end)));
      const __m128i halves[] = {_mm256_castsi256_si128(distance), _mm256_extracti128_si256(distance, 1)};
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        __m256i at = _mm256_add_epi64(_mm256_cvtepi32_epi64(halves[k]), corners);
        if (first) at = _mm256_add_epi64(at, _mm256_loadu_si256((const __m256i*)(first + i + 4 * k)));
        _mm256_storeu_si256((__m256i*)(to + i + 4 * k), at);
      }
    }
#endif
    for (; i < count; ++i) {
      const int32_t tap = int32_t(taps[i]);
      to[i] = corner + (first ? first[i] : 0) + tap * column + (tap * inverse >> 16) * end;
    }
    return;
  }
  for (; i < count; ++i)
    to[i] = corner + (first ? first[i] : 0) + taps[i] * column_step + quick_div(taps[i], width) * row_end;
}

template <class O>
void indices_from_taps(const Pool2dParams& p) {
  const Axis h = axis_h(p), w = axis_w(p);
  const int64_t inner = p.channels_last ? p.channels : 1, planes = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t row = w.out * inner;
  parallel_for(0, planes * h.out, max64(1, 4096 / row), [&](int64_t begin, int64_t end) {
    for (int64_t from = 0; from < w.out; from += Columns::kMost) {
      const Columns columns(w, from);
      for (int64_t r = begin; r < end; ++r) {
        const O* const taps = static_cast<const O*>(p.offsets) + r * row + from * inner;
        int64_t* const to = p.indices + r * row + from * inner;
        const int64_t top = h.first(r % h.out) * w.in;
        if (inner == 1) indices_of_run(p, taps, columns.count, top, columns.first, to);
        else
          for (int64_t o = 0; o < columns.count; ++o)
            indices_of_run(p, taps + o * inner, inner, top + columns.first[o], nullptr, to + o * inner);
      }
    }
  });
}

}  // namespace

Status max_pool2d_forward(const Pool2dParams& p) {
  if (p.channels_last) return max_pool2d_forward_nhwc(p);
  if (prefers_planes_max(p)) return max_pool2d_forward_planes(p);
  if (is_2x2(p)) return max_pool2d_forward_2x2(p);
  if (has_long_windows(p) && p.w.out <= 2) return max_pool2d_forward_any(p);
  const bool permuted = is_permuted(p, p.w.in) && (p.offsets || p.w.stride > 1);
  if ((prefers_table(p) || permuted) && fits_table(p)) return max_pool2d_forward_table(p);
  return fits_rows(p) ? max_pool2d_forward_rows(p) : max_pool2d_forward_any(p);
}
Status max_pool2d_backward(const Pool2dParams& p) {
  if (is_narrow_2x2(p)) return max_pool2d_backward_narrow(p);
  if (fits_max_tiles(p)) return max_pool2d_backward_tiles(p);
  if (fits_same(p)) return max_pool2d_backward_same(p);
  if (p.channels_last) return fits_gather(p) ? max_pool2d_backward_gather(p) : max_pool2d_backward_nhwc(p);
  if (is_2x2(p) && (prefers_2x2(p) || !fits_scatter(p))) return max_pool2d_backward_2x2(p);
  if (fits_gather(p)) return max_pool2d_backward_gather(p);
  if (fits_scatter(p)) return max_pool2d_backward_scatter(p);
  return fits_rows_backward(p) ? max_pool2d_backward_rows(p) : max_pool2d_backward_any(p);
}
Status avg_pool2d_forward(const Pool2dParams& p) {
  if (p.channels_last) return avg_pool2d_forward_nhwc(p);
  if (is_global(p)) return avg_pool2d_forward_global(p);
  if (prefers_planes_avg(p)) return avg_pool2d_forward_planes(p);
  if (is_2x2(p)) return avg_pool2d_forward_2x2(p);
  if (is_short(p) || has_long_windows(p)) return avg_pool2d_forward_any(p);
  if ((prefers_table(p) || is_permuted(p, p.w.in + 1)) && fits_table(p)) return avg_pool2d_forward_table(p);
  return fits_rows(p) ? avg_pool2d_forward_rows(p) : avg_pool2d_forward_any(p);
}
Status avg_pool2d_backward(const Pool2dParams& p) {
  if (p.channels_last) return avg_pool2d_backward_nhwc(p);
  if (is_global(p)) return avg_pool2d_backward_global(p);
  if (fits_mean_tiles(p)) return avg_pool2d_backward_tiles(p);
  if (is_2x2(p)) return avg_pool2d_backward_2x2(p);
  if (shares_runs(p)) return avg_pool2d_backward_any(p);
  const bool shuffled = kVecBytes == 64 ? is_permuted(p, p.w.out + 1) : p.w.in <= 32;
  if ((p.adaptive || p.w.stride > 2 || shuffled) && fits_table_backward(p)) return avg_pool2d_backward_table(p);
  return fits_rows_backward(p) ? avg_pool2d_backward_rows(p) : avg_pool2d_backward_any(p);
}
Status max_pool2d_indices(const Pool2dParams& p) {
  if (p.wide) indices_from_taps<int32_t>(p);
  else indices_from_taps<uint8_t>(p);
  return Status::ok;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
