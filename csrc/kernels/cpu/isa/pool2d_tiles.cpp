// Backward where the windows tile contiguous planes (stride = kernel, no padding): every input lane fetches its
// window's gradient by a permutation; of a maximum, the tap too, and keeps the gradient where the tap is its own.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least
constexpr int64_t kWidest = 15;      // window columns, one vector of inputs for each 16 windows
constexpr int64_t kStaged = 4096;    // elements on their way past the caches, at most
constexpr int64_t kAtOnce = 1024;    // of them, where the rows allow it: of 16 KB at a time, 1.15 times as slow

// For each of the vectors of inputs under 16 windows: the window over each lane, and the lane's tap in the first row.
struct Spread {
  __m512i window[kWidest];
  __m128i window_byte[kWidest], tap[kWidest];
  explicit Spread(int64_t kernel) {
    for (int64_t v = 0; v < kernel; ++v) {
      int32_t windows[16];
      uint8_t bytes[16], taps[16];
      for (int64_t lane = 0; lane < 16; ++lane) {
        const int64_t x = 16 * v + lane;
        windows[lane] = int32_t(x / kernel), bytes[lane] = uint8_t(x / kernel), taps[lane] = uint8_t(x % kernel);
      }
      window[v] = _mm512_loadu_si512(windows);
      window_byte[v] = _mm_loadu_si128((const __m128i*)bytes);
      tap[v] = _mm_loadu_si128((const __m128i*)taps);
    }
  }
};

// kSpill: whole vectors may be written past the end of a row, where a later row or
// vector overwrites them: masked stores take twice as long. Hence the order: the
// end of the rows first. kStream: rows are whole vectors, written past the caches.
enum class Ends { kMasked, kSpill, kStream };

// Up to 16 windows of kernel columns, the lanes in `here`, to `left` columns of `rows` rows
// of inputs. Constants of 0: any. kMax: where the tap is the lane's; else means, by `mean`.
template <bool kMax, int kKernel, int kRows, Ends kEnds>
FASTNN_INLINE void block(const Spread& spread, const Divide<float>& mean, int64_t kernel, int64_t rows, int64_t width,
                         __mmask16 here, const float* g, const uint8_t* taps, float* dx, int64_t left) {
  if constexpr (kKernel != 0) kernel = kKernel;
  if constexpr (kRows != 0) rows = kRows;
  __m512 values = kEnds == Ends::kMasked ? _mm512_maskz_loadu_ps(here, g) : _mm512_loadu_ps(g);
  __m128i codes{};
  if constexpr (kMax) {  // no tap is 255
    const __m128i none = _mm_set1_epi8(-1);
    if constexpr (kEnds == Ends::kMasked) codes = _mm_mask_loadu_epi8(none, here, taps);
    else codes = _mm_mask_mov_epi8(none, here, _mm_loadu_si128((const __m128i*)taps));
  } else {
    values = _mm512_maskz_mov_ps(here, mean(Vec<float>{values}).v);
  }
  const __m128i below = _mm_set1_epi8(char(kernel));
#pragma GCC unroll 3
  for (int64_t v = kKernel ? kKernel - 1 : (left - 1) / 16; v >= 0; --v) {
    if (kKernel && 16 * v >= left) continue;
    const __m512 value = _mm512_permutexvar_ps(spread.window[v], values);
    const __m128i code = kMax ? _mm_shuffle_epi8(codes, spread.window_byte[v]) : codes;
    __m128i tap = spread.tap[v];
    float* to = dx + 16 * v;
#pragma GCC unroll 3
    for (int64_t i = 0; i < rows; ++i, to += width, tap = _mm_add_epi8(tap, below)) {
      const __m512 mine = kMax ? _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(code, tap), value) : value;
      if constexpr (kEnds == Ends::kStream) _mm512_stream_ps(to, mine);
      else if constexpr (kEnds == Ends::kSpill) _mm512_storeu_ps(to, mine);
      else store_upto(Vec<float>{mine}, to, left - 16 * v);
    }
  }
}

// `count` rows of windows whose inputs follow each other. Not inlined: its loop needs the registers.
template <bool kMax, int kKernel, int kRows, Ends kEnds>
__attribute__((noinline)) void run(const Spread& spread, const Pool2dParams& p, int64_t rows, const float* g,
                                   const uint8_t* taps, float* dx, int64_t count) {
  const int64_t kernel = kKernel ? kKernel : p.w.kernel, width = p.w.in, out = p.w.out, strip = 16 * kernel;
  const int64_t step = (kRows ? kRows : rows) * width, bare = width - out * kernel;
  const int64_t strips = (out - (bare < 0)) / 16;  // what a cut-off window writes too much is overwritten
  const Divide<float> mean(p.divisor ? p.divisor : p.h.kernel * p.w.kernel);
  const __mmask16 all = 0xffff, ends = __mmask16((1u << (out - 16 * strips)) - 1);
  if (kKernel && strips == 0 && bare <= 0) {
    for (const float* const stop = g + count * out; g < stop; g += out, taps += out, dx += step)
      block<kMax, kKernel, kRows, kEnds>(spread, mean, kernel, rows, width, ends, g, taps, dx, width);
    return;
  }
  for (const float* const stop = g + count * out; g < stop; g += out, taps += out, dx += step) {
    if (ends)
      block<kMax, kKernel, kRows, kEnds>(spread, mean, kernel, rows, width, ends, g + 16 * strips, taps + 16 * strips,
                                         dx + strip * strips, width - strip * strips);
    for (int64_t s = 0; s < strips; ++s)
      block<kMax, kKernel, kRows, kEnds>(spread, mean, kernel, rows, width, all, g + 16 * s, taps + 16 * s,
                                         dx + strip * s, min64(strip, width - strip * s));
    for (int64_t i = 0; i < rows && bare > 0; ++i)  // columns under no window
      for (int64_t c = 0; c < bare; ++c) dx[i * width + out * kernel + c] = 0;
  }
}

// The same past the caches for rows that end within a line, `group` of which are whole lines: by way of a buffer.
template <bool kMax, int kKernel, int kRows>
void run_staged(const Spread& spread, const Pool2dParams& p, int64_t rows, const float* g, const uint8_t* taps,
                float* dx, int64_t count, int64_t group) {
  alignas(64) float staged[kStaged + 16];
  const int64_t row = rows * p.w.in, most = max64(1, kAtOnce / (group * row)) * group;
  for (int64_t done = 0; done < count; done += most) {
    const int64_t here = min64(most, count - done);
    run<kMax, kKernel, kRows, Ends::kSpill>(spread, p, rows, g + done * p.w.out, taps + done * p.w.out, staged, here);
    float* const to = dx + done * row;
    for (int64_t i = 0; i < here * row; i += 16) _mm512_stream_ps(to + i, _mm512_load_ps(staged + i));
  }
}

template <bool kMax, int kKernel>
void tiles_backward(const Pool2dParams& p) {
  const Spread spread(p.w.kernel);
  const int64_t kernel = p.h.kernel, whole = min64(p.h.out, p.h.in / kernel), width = p.w.in;  // rows of whole windows
  const bool leaves = leaves_caches(p), stream = leaves && width % 16 == 0 && p.w.out * p.w.kernel >= width;
  // Planes without a remainder are one long plane.
  const bool seamless = p.h.in == p.h.out * kernel;
  int64_t group = 1;  // rows of windows over whole lines
  while (group * kernel * width % 16 != 0) group *= 2;
  const bool staged = leaves && !stream && seamless && group * kernel * width <= kStaged;
  const int64_t planes = seamless ? 1 : p.batch * p.channels,
                plane_rows = seamless ? p.batch * p.channels * p.h.out : p.h.out;
  parallel_for(0, planes * plane_rows, max64(1, kGrain / (kernel * width)), [&](int64_t begin, int64_t end) {
    const float* g = static_cast<const float*>(p.grad_output);
    // A mean has no taps, and reads none.
    const uint8_t* taps = static_cast<const uint8_t*>(kMax ? p.offsets : p.grad_output);
    const auto rows = [&](auto constant, auto ends, int64_t height, float* dx, int64_t from, int64_t to) {
      constexpr int kRows = decltype(constant)::value;
      if (from < to)
        run<kMax, kKernel, kRows, Ends(decltype(ends)::value)>(spread, p, height, g + from * p.w.out,
                                                               taps + from * p.w.out, dx, to - from);
    };
    // Rows before `safe` have 16 inputs after them that are this call's to write.
    const int64_t safe = end - ceil_div(16, p.w.out);
    for (int64_t first = begin, next; first < end; first = next) {
      const int64_t plane = first / plane_rows, row = first - plane * plane_rows;
      next = min64(end, (plane + 1) * plane_rows);
      float* dx = static_cast<float*>(p.grad_input) + (plane * p.h.in + row * kernel) * width;
      const int64_t full = seamless ? next : max64(first, min64(next, plane * plane_rows + whole));
      const int64_t spill = max64(first, min64(full, safe));
      if (staged) {
        const int64_t from = min64(spill, round_up(first, group)), to = from + (spill - from) / group * group;
        rows(Constant<0>{}, Constant<int(Ends::kMasked)>{}, kernel, dx, first, from);
        const auto past = p.h.kernel == kKernel ? run_staged<kMax, kKernel, kKernel> : run_staged<kMax, kKernel, 0>;
        past(spread, p, kernel, g + from * p.w.out, taps + from * p.w.out, dx + (from - first) * kernel * width,
             to - from, group);
        rows(Constant<0>{}, Constant<int(Ends::kMasked)>{}, kernel, dx + (to - first) * kernel * width, to, full);
        continue;
      }
      const Constant<kKernel> square{};
      if (p.h.kernel != p.w.kernel || kKernel == 0)
        rows(Constant<0>{}, Constant<int(Ends::kSpill)>{}, kernel, dx, first, spill);
      else if (stream) rows(square, Constant<int(Ends::kStream)>{}, kernel, dx, first, spill);
      else rows(square, Constant<int(Ends::kSpill)>{}, kernel, dx, first, spill);
      rows(Constant<0>{}, Constant<int(Ends::kMasked)>{}, kernel, dx + (spill - first) * kernel * width, spill, full);
      if (seamless || next < (plane + 1) * plane_rows) continue;
      // The last row's windows may be cut off, and rows may lie under no window.
      dx += (full - first) * kernel * width;
      const int64_t cut = p.h.in - whole * kernel;
      if (full < next) rows(Constant<0>{}, Constant<int(Ends::kMasked)>{}, cut, dx, full, next);
      else __builtin_memset(dx, 0, size_t(cut * width) * sizeof(float));
    }
    if (stream || staged) _mm_sfence();
  });
}

FASTNN_INLINE bool tiles(const PoolAxis& a) {
  return a.stride == a.kernel && a.padding == 0 && a.dilation == 1 && a.kernel <= kWidest;
}

}  // namespace

static bool fits_tiles(const Pool2dParams& p) {
  return !p.channels_last && !p.adaptive && !p.wide && p.dtype == DType::f32 && tiles(p.h) && tiles(p.w);
}
// A large window is mostly zeros: cleared by scattering, as are rows of few windows.
bool fits_max_tiles(const Pool2dParams& p) { return fits_tiles(p) && p.w.kernel <= 5 && p.w.out > 5; }
Status max_pool2d_backward_tiles(const Pool2dParams& p) {
  if (p.w.kernel == 2) tiles_backward<true, 2>(p);
  else if (p.w.kernel == 3) tiles_backward<true, 3>(p);
  else tiles_backward<true, 0>(p);
  return Status::ok;
}
bool fits_mean_tiles(const Pool2dParams& p) {
  return fits_tiles(p) && p.h.out * p.h.kernel <= p.h.in && p.w.out * p.w.kernel <= p.w.in;
}
Status avg_pool2d_backward_tiles(const Pool2dParams& p) {
  if (p.w.kernel == 2) tiles_backward<false, 2>(p);
  else tiles_backward<false, 0>(p);
  return Status::ok;
}
#else
bool fits_max_tiles(const Pool2dParams&) { return false; }
bool fits_mean_tiles(const Pool2dParams&) { return false; }
Status max_pool2d_backward_tiles(const Pool2dParams&) { return Status::invalid_argument; }
Status avg_pool2d_backward_tiles(const Pool2dParams&) { return Status::invalid_argument; }
#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
