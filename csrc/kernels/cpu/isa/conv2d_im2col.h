// Implicit GEMM: the input under output pixels, copied into panels whose lanes are those pixels.
#pragma once
#include "conv2d_gemm.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

constexpr int kNr = 2 * Vec<float>::N;
constexpr int64_t kMaxKc = kGemmL1Bytes / int64_t(kNr * sizeof(float));

// One tap of a panel's rows: where it reads relative to tap (0, 0, 0), and by how much it shifts the window.
struct Tap {
  int64_t c, r, s;
};
FASTNN_INLINE Tap tap_crs(const ConvProblem& d, int64_t t) { return {t / (d.r * d.s), t / d.s % d.r, t % d.s}; }
FASTNN_INLINE void next_crs(const ConvProblem& d, Tap& t) {
  if (++t.s < d.s) return;
  t.s = 0;
  if (++t.r < d.r) return;
  t.r = 0, ++t.c;
}

// The input under one run of output pixels at tap (0, 0, 0).
struct Window {
  const float* x;
  int64_t at, length, h, w;
};
FASTNN_INLINE Window window(const ConvProblem& d, int64_t at, int64_t length, int64_t n, int64_t p, int64_t q) {
  const int64_t h = p * d.stride_h - d.pad_h, w = q * d.stride_w - d.pad_w;
  return {static_cast<const float*>(d.x) + n * d.xn + h * d.xh + w * d.xw, at, length, h, w};
}
FASTNN_INLINE void copy_window(const ConvProblem& d, const Window& v, const Tap& t, float* to) {
  const int64_t h = v.h + t.r * d.dil_h, w = v.w + t.s * d.dil_w;
  Inside in{0, 0};
  if (h >= 0 && h < d.h) in = inside(w, d.stride_w, d.w, v.length);
  copy_row(to + v.at, v.length, v.x + t.c * d.xc + t.r * d.dil_h * d.xh + t.s * d.dil_w * d.xw, d.stride_w * d.xw, in);
}

// Taps in the order (c, r, s), rows of pixels side by side (NCHW).
inline GemmPanel<float> pack_pixel_columns(const ConvProblem& d, float* dst, int nr, int64_t k0, int64_t kb, int64_t n0,
                                           int nb) {
  if (is_pointwise(d) && d.xw == 1 && nb == nr && n0 % d.q + nb <= d.q)
    return {static_cast<const float*>(d.x) + n0 / d.q * d.xn + k0 * d.xc + n0 % d.q, d.xc};
#if defined(__AVX512F__)
  if (is_pointwise(d) && d.xw == 1 && d.q >= Vec<float>::N) {  // each vector reads one image, or two of them by masks
    for (int j = 0; j < nr; j += Vec<float>::N) {
      const int lanes = int(max64(0, min64(Vec<float>::N, nb - j)));
      const int64_t image = (n0 + j) / d.q, pixel = (n0 + j) % d.q;
      const int here = int(min64(lanes, d.q - pixel));
      const __mmask16 m1 = __mmask16((1u << here) - 1), m2 = __mmask16(((1u << lanes) - 1) ^ m1);
      const float* one = static_cast<const float*>(d.x) + image * d.xn + k0 * d.xc + pixel;
      const float* two = static_cast<const float*>(d.x) + (image + 1) * d.xn + k0 * d.xc - here;
      float* to = dst + j;
      for (int64_t i = 0; i < kb; ++i, one += d.xc, two += d.xc, to += nr)
        _mm512_storeu_ps(to, _mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(m1, one), m2, two));
    }
    return {dst, nr};
  }
#endif
  Window windows[kNr];
  int count = 0;
  for_runs(d, n0, nb, [&](int64_t at, int64_t length, int64_t n, int64_t p, int64_t q) {
    windows[count++] = window(d, at, length, n, p, q);
  });
  // One tap of all channels after the other: where it is inside the image is then found once for them.
  constexpr int64_t kChannels = 16;  // their panel stays in L1
  const int64_t taps = d.r * d.s, first = k0 / taps, last = ceil_div(k0 + kb, taps);
  for (int64_t c0 = first; c0 < last; c0 += kChannels)
    for (int64_t rs = 0; rs < taps; ++rs) {
      const int64_t begin = c0 > first || k0 % taps <= rs ? c0 : c0 + 1;
      const int64_t end = c0 + kChannels < last ? c0 + kChannels : last - ((last - 1) * taps + rs >= k0 + kb);
      float* const to = dst + (begin * taps + rs - k0) * nr;
      for (int j = 0; j < count; ++j) {
        const Window& v = windows[j];
        const int64_t h = v.h + rs / d.s * d.dil_h, w = v.w + rs % d.s * d.dil_w;
        Inside in{0, 0};
        if (h >= 0 && h < d.h) in = inside(w, d.stride_w, d.w, v.length);
        const float* from = v.x + begin * d.xc + (h - v.h) * d.xh + (w - v.w) * d.xw;
        copy_rows(to + v.at, taps * nr, v.length, nr - v.at, from, d.xc, d.stride_w * d.xw, in, end - begin);
      }
    }
  for (int j = nb; j < nr; ++j)
    for (int64_t i = 0; i < kb; ++i) dst[i * nr + j] = 0;
  return {dst, nr};
}

// Taps in the order (r, s, c): each (r, s) is a run of channels that lie side by side.
template <int kWidth>
void pack_pixel_rows(const ConvProblem& d, float* dst, int mr, int64_t m0, int mb, int64_t k0, int64_t kb) {
  Window windows[kWidth];
  int count = 0;
  for_runs(d, m0, mb, [&](int64_t at, int64_t length, int64_t n, int64_t p, int64_t q) {
    windows[count++] = window(d, at, length, n, p, q);
  });
  const int64_t step = d.stride_w * d.xw;
  for (int64_t done = 0; done < kb;) {
    const int64_t t = k0 + done, c = t % d.c, length = min64(d.c - c, kb - done);
    const int64_t r = t / d.c / d.s * d.dil_h, s = t / d.c % d.s * d.dil_w, shift = r * d.xh + s * d.xw + c * d.xc;
    float* const to = dst + done * mr;
    const auto whole = [&](const Window& v) {
      return v.h + r >= 0 && v.h + r < d.h && v.w + s >= 0 && v.w + s + (v.length - 1) * d.stride_w < d.w;
    };
    if (count == 1 && whole(windows[0])) {
      gemm_pack_panel<float>(to, mr, windows[0].x + shift, step, d.xc, mb, length);
    } else {
      float rows[kWidth * kMaxKc];
      for (int j = 0; j < count; ++j) {
        const Window& v = windows[j];
        Inside in{0, 0};
        if (v.h + r >= 0 && v.h + r < d.h) in = inside(v.w + s, d.stride_w, d.w, v.length);
        for (int64_t i = 0; i < v.length; ++i)
          copy_row(rows + (v.at + i) * kMaxKc, length, v.x + shift + i * step, d.xc,
                   {0, i >= in.begin && i < in.end ? length : 0});
      }
      gemm_pack_panel<float>(to, mr, rows, kMaxKc, 1, mb, length);
    }
    done += length;
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
