// Gradient of the input of few channels: one product per image gives what every tap sends to every pixel, and the rows
// are added up where they belong. Unlike a convolution over padded grad_output it multiplies nothing by a zero border.
#include "conv2d.h"
#include "gemm_core.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int kNr = 2 * Vec<float>::N;

struct Plan {
  int64_t taps, pixels, ld;
  int mr;
  int64_t packed, panel, columns, worker, total;  // byte offsets; panel and columns once per worker
};

Plan make_plan(const ConvProblem& d, int64_t workers) {
  Plan p{};
  p.taps = d.c * d.r * d.s;
  p.pixels = d.p * d.q;
  p.ld = round_up(p.pixels, kNr);
  p.mr = int(ceil_div(p.taps, ceil_div(p.taps, kGemmMaxMr)));
  const auto pad = [](int64_t elements) { return round_up(elements * 4, 64); };
  p.packed = pad(ceil_div(p.taps, p.mr) * p.mr * d.k + kNr);
  p.panel = 0;
  p.columns = pad(kNr * d.k + kNr);
  p.worker = p.columns + pad(p.taps * p.ld);
  p.total = p.packed + workers * p.worker;
  return p;
}

// to[i * step] += from[i]
FASTNN_INLINE void add_row(float* to, const float* from, int64_t count, int64_t step) {
  using V = Vec<float>;
  int64_t i = 0;
  if (step == 1) {
    for (; i + V::N <= count; i += V::N) (V::load(to + i) + V::load(from + i)).store(to + i);
    if (i < count) (load_lanes(to + i, count - i) + load_lanes(from + i, count - i)).store_n(to + i, count - i);
    return;
  }
  for (; i < count; ++i) to[i * step] += from[i];
}

void add_columns(const ConvProblem& d, const Plan& p, const float* columns, float* dx) {
  for (int64_t c = 0; c < d.c; ++c) {
    float* const plane = dx + c * d.xc;
    for (int64_t h = 0; h < d.h; ++h)
      for (int64_t w = 0; w < d.w; ++w) plane[h * d.xh + w * d.xw] = 0;
    for (int64_t r = 0; r < d.r; ++r)
      for (int64_t s = 0; s < d.s; ++s, columns += p.ld) {
        const int64_t w0 = s * d.dil_w - d.pad_w;
        const int64_t begin = w0 >= 0 ? 0 : ceil_div(-w0, d.stride_w);
        const int64_t end = w0 >= d.w ? 0 : min64(d.q, ceil_div(d.w - w0, d.stride_w));
        if (begin >= end) continue;
        for (int64_t i = 0; i < d.p; ++i) {
          const int64_t h = i * d.stride_h + r * d.dil_h - d.pad_h;
          if (h < 0 || h >= d.h) continue;
          add_row(plane + h * d.xh + (w0 + begin * d.stride_w) * d.xw, columns + i * d.q + begin, end - begin,
                  d.stride_w * d.xw);
        }
      }
  }
}

}  // namespace

int64_t col2im_workspace(const ConvProblem& d, int64_t workers) { return make_plan(d, workers).total; }

void col2im_grad_input(const ConvProblem& d, float* grad_input, int64_t workers, char* workspace) {
  const Plan p = make_plan(d, workers);
  float* const packed = reinterpret_cast<float*>(workspace);
  const float* weight = static_cast<const float*>(d.weight);
  for (int64_t t = 0; t < p.taps; t += p.mr)  // [k][c, r, s]: lanes are taps
    gemm_pack_panel<float>(packed + t * d.k, p.mr, weight + t, 1, d.wk, int(min64(p.mr, p.taps - t)), d.k);
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      char* const own = workspace + p.packed + worker * p.worker;
      float* const panel = reinterpret_cast<float*>(own + p.panel);
      float* const columns = reinterpret_cast<float*>(own + p.columns);
      for (int64_t n = worker; n < d.n; n += workers) {
        const float* g = static_cast<const float*>(d.y) + n * d.yn;
        for (int64_t pixel = 0; pixel < p.pixels; pixel += kNr) {
          const int nb = int(min64(kNr, p.pixels - pixel));
          GemmPanel<float> b{g + pixel, d.yk};
          if (nb < kNr) {
            gemm_pack_panel<float>(panel, kNr, g + pixel, 1, d.yk, nb, d.k);
            b = {panel, kNr};
          }
          const GemmBuffer<float> store{columns, p.ld, 0, 0};
          gemm_strip_rows<float, kGemmMaxMr>(p.mr, packed, b, d.k, 0, p.taps, pixel, kNr, store, true, true);
        }
        add_columns(d, p, columns, grad_input + n * d.xn);
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
