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

// Lanes [begin, end) of from, zero elsewhere; nothing else is read.
FASTNN_INLINE Vec<float> load_between(const float* from, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  return {_mm512_maskz_loadu_ps(__mmask16((1u << end) - (1u << begin)), from)};
#else
  float lane[Vec<float>::N] = {};
  for (int64_t i = begin; i < end; ++i) lane[i] = from[i];
  return Vec<float>::load(lane);
#endif
}

// Every vector of grad_input gathers what all taps sent to it and is stored once: storing after each tap would stall
// every next tap's load on a store of another alignment.
void add_columns(const ConvProblem& d, const Plan& p, const float* columns, float* dx) {
  using V = Vec<float>;
  for (int64_t c = 0; c < d.c; ++c, columns += d.r * d.s * p.ld)
    for (int64_t h = 0; h < d.h; ++h)
      for (int64_t w = 0; w < d.w; w += V::N) {
        const int64_t lanes = min64(V::N, d.w - w);
        V sum = V::zero();
        for (int64_t r = 0; r < d.r; ++r) {
          const int64_t i = h + d.pad_h - r * d.dil_h;
          if (i < 0 || i >= d.p) continue;
          const float* row = columns + r * d.s * p.ld + i * d.q;
          for (int64_t s = 0; s < d.s; ++s, row += p.ld) {
            const int64_t q = w + d.pad_w - s * d.dil_w;
            const int64_t begin = max64(0, -q), end = min64(lanes, d.q - q);
            if (begin < end) sum = sum + load_between(row + q, begin, end);
          }
        }
        float* const to = dx + c * d.xc + h * d.xh + w * d.xw;
        if (lanes == V::N) sum.store(to);
        else sum.store_n(to, lanes);
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
          gemm_strip_rows<float, kGemmMaxMr>(p.mr, static_cast<const float*>(packed), b, d.k, d.k, 0, p.taps, pixel,
                                             kNr, store, true, true);
        }
        add_columns(d, p, columns, grad_input + n * d.xn);
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
