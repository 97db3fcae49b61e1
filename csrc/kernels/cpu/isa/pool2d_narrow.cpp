// Backward of 2x2 max pooling with stride 2 where rows (or, in channels_last, pixels) are shorter than a
// vector: several of them at a time, every input lane fetching its window's gradient and tap by a permutation.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least

// Up to 16 outputs and the four vectors of inputs under them: which output each lane belongs to, and as which tap.
struct Block {
  __m512i index[4];
  __m128i index_byte[4], code[4];

  template <class F>
  explicit Block(const F& locate) {  // locate(vector, lane, &output, &tap)
    for (int v = 0; v < 4; ++v) {
      int32_t at[16];
      uint8_t bytes[16], taps[16];
      for (int lane = 0; lane < 16; ++lane) {
        int32_t o, t;
        locate(v, lane, o, t);
        at[lane] = o & 15, bytes[lane] = uint8_t(at[lane]), taps[lane] = uint8_t(t);
      }
      index[v] = _mm512_loadu_si512(at);
      index_byte[v] = _mm_loadu_si128((const __m128i*)bytes);
      code[v] = _mm_loadu_si128((const __m128i*)taps);
    }
  }
  // kWhole: 16 outputs may be read and whole vectors written, which masks would make twice as slow.
  template <bool kWhole>
  FASTNN_VEC_FN void write(const float* g, const uint8_t* taps, int64_t outputs, float* const* to,
                           const int64_t* lanes) const {
    const __mmask16 here = __mmask16((1u << outputs) - 1);
    const __m512 values = kWhole ? _mm512_loadu_ps(g) : _mm512_maskz_loadu_ps(here, g);
    const __m128i codes = kWhole ? _mm_loadu_si128((const __m128i*)taps) : _mm_maskz_loadu_epi8(here, taps);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __mmask16 hit = _mm_cmpeq_epi8_mask(_mm_shuffle_epi8(codes, index_byte[v]), code[v]);
      const __m512 mine = _mm512_maskz_permutexvar_ps(hit, index[v], values);
      if (!kWhole) store_upto(Vec<float>{mine}, to[v], lanes[v]);
      else if (v < 3 || lanes[v] > 0) _mm512_storeu_ps(to[v], mine);
    }
  }
};

// [rows of outputs], two rows of inputs under each, all of it one piece: rows of several
// planes may share a block. What a block writes past its end the next one overwrites.
void narrow_planes(const Pool2dParams& p) {
  const int64_t width = p.w.out, rows = p.batch * p.channels * p.h.out, per_block = 16 / width;
  const Block spread([&](int v, int lane, int32_t& o, int32_t& t) {
    const int x = 16 * v + lane, w = int(width), in = x % (4 * w), column = in % (2 * w);
    o = x / (4 * w) * w + column / 2;
    t = in / (2 * w) * 2 + column % 2;
  });
  parallel_for(0, ceil_div(rows, per_block), kGrain / 64, [&](int64_t begin, int64_t end) {
    const Block block = spread;  // a copy: read once, not after every store
    const int64_t step = per_block * width;
    const float* g = static_cast<const float*>(p.grad_output) + begin * step;
    const uint8_t* taps = static_cast<const uint8_t*>(p.offsets) + begin * step;
    float* dx = static_cast<float*>(p.grad_input) + begin * step * 4;
    for (int64_t left = min64(end * step, rows * width) - begin * step; left > 0; left -= step) {
      const int64_t outputs = min64(step, left);
      float* const to[] = {dx, dx + 16, dx + 32, dx + 48};
      const int64_t lanes[] = {4 * outputs, 4 * outputs - 16, 4 * outputs - 32, 4 * outputs - 48};
      if (left >= 16) block.write<true>(g, taps, outputs, to, lanes);
      else block.write<false>(g, taps, outputs, to, lanes);
      g += step, taps += step, dx += 4 * step;
    }
  });
}

// channels_last: neighbouring pixels of a row, two input rows under them.
void narrow_pixels(const Pool2dParams& p) {
  const int64_t channels = p.channels, per_block = 16 / channels;
  const int64_t row_in = p.w.in * channels, row_out = p.w.out * channels, covered = 2 * row_out;
  const Block spread([&](int v, int lane, int32_t& o, int32_t& t) {
    const int x = v % 2 * 16 + lane, c = int(channels), pixel = x / c;
    o = pixel / 2 * c + x % c;
    t = v / 2 * 2 + pixel % 2;
  });
  parallel_for(0, p.batch * p.h.out, max64(1, kGrain / (2 * row_in)), [&](int64_t begin, int64_t end) {
    const Block block = spread;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = r / p.h.out, oh = r % p.h.out;
      const float* g = static_cast<const float*>(p.grad_output) + r * row_out;
      const uint8_t* taps = static_cast<const uint8_t*>(p.offsets) + r * row_out;
      float* top = static_cast<float*>(p.grad_input) + (image * p.h.in + 2 * oh) * row_in;
      float* bottom = top + row_in;
      for (int64_t o = 0; o < row_out; o += per_block * channels) {
        const int64_t outputs = min64(per_block * channels, row_out - o);
        float* const to[] = {top + 2 * o, top + 2 * o + 16, bottom + 2 * o, bottom + 2 * o + 16};
        const int64_t lanes[] = {2 * outputs, 2 * outputs - 16, 2 * outputs, 2 * outputs - 16};
        if (o + 16 <= row_out) block.write<true>(g + o, taps + o, outputs, to, lanes);
        else block.write<false>(g + o, taps + o, outputs, to, lanes);
      }
      __builtin_memset(top + covered, 0, size_t(row_in - covered) * sizeof(float));
      __builtin_memset(bottom + covered, 0, size_t(row_in - covered) * sizeof(float));
      if (oh == p.h.out - 1 && p.h.in > 2 * p.h.out)
        __builtin_memset(bottom + row_in, 0, size_t(row_in) * sizeof(float));
    }
  });
}

}  // namespace

bool is_narrow_2x2(const Pool2dParams& p) {
  if (!is_2x2(p) || p.dtype != DType::f32) return false;
  if (p.channels_last) return p.channels < 16;
  return p.w.out <= 8 && p.w.in == 2 * p.w.out && p.h.in == 2 * p.h.out;
}
Status max_pool2d_backward_narrow(const Pool2dParams& p) {
  if (p.channels_last) narrow_pixels(p);
  else narrow_planes(p);
  return Status::ok;
}
#else
bool is_narrow_2x2(const Pool2dParams&) { return false; }
Status max_pool2d_backward_narrow(const Pool2dParams&) { return Status::invalid_argument; }
#endif

}  // namespace fastnn::cpu::FASTNN_ISA_NS
