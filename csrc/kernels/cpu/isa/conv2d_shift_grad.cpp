// Gradient of the weight by the same shifts: dW[k][tap] is the dot product of grad_output with the shifted band.
#include "conv2d_shift.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kGradK = 5, kGradT = 5;
#else
constexpr int kGradK = 3, kGradT = 3;
#endif

// One lane mask per vector of an image, in the form the ISA likes best.
template <class A>
FASTNN_INLINE Vec<A> load_masked(const A* p, const A* upper, [[maybe_unused]] uint32_t bits, const A* expanded,
                                 bool half) {
  using V = Vec<A>;
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) {
    if (half) {
      const V v = V::load_halves(p, upper);
      return {_mm512_maskz_mov_ps(__mmask16(bits), v.v)};
    }
    return {_mm512_maskz_loadu_ps(__mmask16(bits), p)};
  }
#endif
  const V v = half ? V::load_halves(p, upper) : V::load(p);
  return {(typename V::Raw)((typename V::Int)v.v & (typename V::Int)V::load(expanded).v)};
}

template <class A>
struct GradJob {
  const A* g;  // [images][KB.. at g_k][vectors * N]: zero in lanes that are no outputs
  int64_t g_image, g_k;
  const A* x;  // band of the first image
  int64_t x_image;
  int64_t row_step;  // half mode: elements between the two rows of a vector; a vector advances by two rows
  const int32_t* taps;
  const uint32_t* bits;  // [vectors]
  const A* expanded;     // [vectors][N] masks of all ones or zeros
  int64_t images, vectors;
  A* out;  // [KB at out_k][TB]
  int64_t out_k;
};

template <class A, int KB, int TB, bool kHalf, bool kMasked>
void grad_tile(const GradJob<A>& j) {
  using V = Vec<A>;
  using Raw = typename V::Raw;
  Raw acc[KB][TB];
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 8
    for (int t = 0; t < TB; ++t) acc[k][t] = Raw{};
  int64_t taps[TB];
#pragma GCC unroll 8
  for (int t = 0; t < TB; ++t) taps[t] = j.taps[t];
  for (int64_t i = 0; i < j.images; ++i) {
    const A* g = j.g + i * j.g_image;
    const A* x = j.x + i * j.x_image;
    const int64_t step = kHalf ? 2 * j.row_step : V::N;
    for (int64_t v = 0; v < j.vectors; ++v, g += V::N, x += step) {
      Raw gv[KB];
#pragma GCC unroll 8
      for (int k = 0; k < KB; ++k) gv[k] = V::load(g + k * j.g_k).v;
#pragma GCC unroll 8
      for (int t = 0; t < TB; ++t) {
        const A* p = x + taps[t];
        Raw xv;
        if constexpr (kMasked) xv = load_masked<A>(p, p + j.row_step, j.bits[v], j.expanded + v * V::N, kHalf).v;
        else xv = (kHalf ? V::load_halves(p, p + j.row_step) : V::load(p)).v;
#pragma GCC unroll 8
        for (int k = 0; k < KB; ++k) acc[k][t] += gv[k] * xv;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 8
    for (int t = 0; t < TB; ++t) j.out[k * j.out_k + t] += reduce_add(V{acc[k][t]});
}

template <class A, int KB, int TB, bool kHalf, bool kMasked>
void (*find_grad(int kb, int tb))(const GradJob<A>&) {
  if constexpr (KB == 0 || TB == 0) return nullptr;
  else if (kb < KB) return find_grad<A, KB - 1, TB, kHalf, kMasked>(kb, tb);
  else if (tb < TB) return find_grad<A, KB, TB - 1, kHalf, kMasked>(kb, tb);
  else return grad_tile<A, KB, TB, kHalf, kMasked>;
}

struct GradPlan {
  ShiftPlan s;
  int64_t vectors;         // per image
  int64_t images;          // per chunk
  int64_t chunks, slices;  // chunks are dealt to slices by shape alone; slices are summed in order
};

template <class S, class A>
GradPlan make_grad_plan(const ConvProblem& d) {
  constexpr int N = Vec<A>::N;
  GradPlan g{};
  g.s = make_plan<S, A>(d);
  ShiftPlan& s = g.s;
  s.in_place = s.in_place && d.n > 0;
  const int64_t vectors = s.half ? ceil_div(s.band_p, 2) : ceil_div((s.band_p - 1) * s.pitch + d.q, N);
  g.vectors = vectors;
  // kGradK channels of grad_output stay in L1 (24 KB) while all taps pass over them.
  g.images = s.bands > 1 ? 1 : max64(1, min64(d.n, (24 << 10) / (kGradK * vectors * kVecBytes)));
  g.chunks = ceil_div(d.n, g.images) * s.bands;
  const int64_t weight_bytes = d.k * s.taps * int64_t(sizeof(A));
  g.slices = max64(1, min64(min64(g.chunks, 8), (8 << 20) / max64(1, weight_bytes)));
  return g;
}

template <class A>
struct GradWorkspace {
  int64_t partial, taps, g, x, bits, expanded, worker, workers, total;
};
template <class A>
GradWorkspace<A> grad_layout(const ConvProblem& d, const GradPlan& p, int64_t workers) {
  constexpr int N = Vec<A>::N;
  const auto pad = [](int64_t bytes) { return round_up(bytes, 64); };
  GradWorkspace<A> o{};
  o.partial = 0;
  o.taps = pad(p.slices * d.k * (p.s.taps + 1) * int64_t(sizeof(A)));
  o.workers = o.taps + pad(p.s.taps * 4);
  o.g = 0;
  o.x = pad(p.images * d.k * p.vectors * N * int64_t(sizeof(A)));
  o.bits = o.x + pad((p.images * p.s.image + max64(4 * N, 8 * p.s.pitch + N) + N) * int64_t(sizeof(A)));
  o.expanded = o.bits + pad(p.vectors * 4);
  o.worker = o.expanded + pad(p.vectors * N * int64_t(sizeof(A)));
  o.total = o.workers + workers * o.worker;
  return o;
}

// Lays one image's grad_output out as the vectors of the band: zero where a lane is no output. Returns nothing; adds
// each channel's sum to bias[k] when bias is given.
template <class S, class A>
void fill_grad(const ConvProblem& d, const ShiftPlan& s, const S* g, int64_t rows, int64_t vectors, A* to, int64_t to_k,
               A* bias) {
  constexpr int N = Vec<A>::N;
  for (int64_t k = 0; k < d.k; ++k) {
    const S* from = g + k * d.yk;
    A* out = to + k * to_k;
    Vec<A> sum = Vec<A>::zero();
    const int64_t pitch = s.half ? N / 2 : s.pitch;
    const int64_t end = vectors * N;
    for (int64_t p = 0; p < rows; ++p) {
      const S* row = from + p * d.yh;
      A* o = out + p * pitch;
      int64_t q = 0;
      if (d.yw == 1) {
        for (; q + N <= d.q; q += N) {
          const Vec<A> v = Vec<A>::load(row + q);
          sum = sum + v;
          v.store(o + q);
        }
        if (q < d.q) {
          const Vec<A> v = Vec<A>::load_n(row + q, d.q - q);
          sum = sum + v;
          v.store_n(o + q, d.q - q);
          q = d.q;
        }
      } else {
        for (; q < d.q; ++q) {
          o[q] = to_acc(row[q * d.yw]);
          sum.v[0] += o[q];
        }
      }
      const int64_t stop = min64(pitch, end - p * pitch);
      for (; q < stop; ++q) o[q] = 0;
    }
    for (int64_t i = rows * pitch; i < end; ++i) out[i] = 0;
    if (bias) bias[k] += reduce_add(sum);
  }
}

template <class S, class A>
void grad_slice(const ConvProblem& d, const GradPlan& p, int64_t slice, int64_t k_begin, int64_t k_end, A* partial,
                A* bias, const int32_t* taps, char* own, const GradWorkspace<A>& o) {
  constexpr int N = Vec<A>::N;
  const ShiftPlan& s = p.s;
  A* g = reinterpret_cast<A*>(own + o.g);
  A* band = reinterpret_cast<A*>(own + o.x);
  uint32_t* bits = reinterpret_cast<uint32_t*>(own + o.bits);
  A* expanded = reinterpret_cast<A*>(own + o.expanded);
  int64_t known_rows = -1;
  ConvProblem sub = d;
  sub.k = k_end - k_begin;
  for (int64_t chunk = p.chunks * slice / p.slices; chunk < p.chunks * (slice + 1) / p.slices; ++chunk) {
    const int64_t p0 = chunk % s.bands * s.band_p, rows = min64(s.band_p, d.p - p0);
    const int64_t n0 = chunk / s.bands * p.images, images = min64(p.images, d.n - n0);
    if (rows != known_rows) {
      known_rows = rows;
      for (int64_t v = 0; v < p.vectors; ++v) {
        bits[v] = 0;
        for (int i = 0; i < N; ++i) {
          const int64_t flat = v * N + i;
          const int64_t row = s.half ? 2 * v + (i >= N / 2) : flat / s.pitch;
          const int64_t column = s.half ? i % (N / 2) : flat % s.pitch;
          const bool used = row < rows && column < d.q;
          bits[v] |= uint32_t(used) << i;
          if constexpr (sizeof(A) == 4) expanded[v * N + i] = __builtin_bit_cast(float, used ? -1 : 0);
          else expanded[v * N + i] = __builtin_bit_cast(double, int64_t(used ? -1 : 0));
        }
      }
    }
    // No lane to mask when every vector is full (rows of exactly one vector or half of one).
    const bool all_used = s.half ? d.q == N / 2 && rows % 2 == 0 : s.pitch == d.q && rows * d.q % N == 0;
    const S* x = static_cast<const S*>(d.x) + n0 * d.xn;
    const S* y = static_cast<const S*>(d.y) + n0 * d.yn + p0 * d.yh + k_begin * d.yk;
    const bool in_place = s.in_place && n0 + images < d.n;  // masked lanes may still be addressed past the last image
    for (int64_t i = 0; i < images; ++i) {
      if (!in_place) fill_band<S, A>(d, s, x + i * d.xn, p0, rows, band + i * s.image);
      fill_grad<S, A>(sub, s, y + i * d.yn, rows, p.vectors, g + i * sub.k * p.vectors * N, p.vectors * N,
                      bias ? bias + k_begin : nullptr);
    }
    GradJob<A> job{};
    job.g_image = sub.k * p.vectors * N;
    job.g_k = p.vectors * N;
    job.x = band;
    job.x_image = s.image;
    if constexpr (__is_same(S, A))
      if (in_place) job.x = x, job.x_image = d.xn;
    job.row_step = s.pitch;
    job.bits = bits;
    job.expanded = expanded;
    job.images = images;
    job.vectors = s.half ? ceil_div(rows, 2) : ceil_div((rows - 1) * s.pitch + d.q, N);
    job.out_k = s.taps;
    for (int64_t k = 0; k < sub.k; k += kGradK)
      for (int64_t t = 0; t < s.taps; t += kGradT) {
        const int kb = int(min64(kGradK, sub.k - k)), tb = int(min64(kGradT, s.taps - t));
        job.g = g + k * job.g_k;
        job.taps = taps + t;
        job.out = partial + (k_begin + k) * s.taps + t;
        if (all_used)
          (s.half ? find_grad<A, kGradK, kGradT, true, false>(kb, tb)
                  : find_grad<A, kGradK, kGradT, false, false>(kb, tb))(job);
        else
          (s.half ? find_grad<A, kGradK, kGradT, true, true>(kb, tb)
                  : find_grad<A, kGradK, kGradT, false, true>(kb, tb))(job);
      }
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

template <class S>
int64_t shift_grad_workspace(const ConvProblem& d, int64_t workers) {
  using A = acc_t<S>;
  return grad_layout<A>(d, make_grad_plan<S, A>(d), workers).total;
}

template <class S>
void shift_grad_weight(const ConvProblem& d, S* grad_weight, S* grad_bias, int64_t workers, char* workspace) {
  using A = acc_t<S>;
  const GradPlan p = make_grad_plan<S, A>(d);
  // Few slices: output channels are shared out as well.
  const int64_t splits = max64(1, min64(ceil_div(workers, p.slices), ceil_div(d.k, kGradK)));
  const int64_t items = p.slices * splits;
  const GradWorkspace<A> o = grad_layout<A>(d, p, workers);
  const int64_t T = p.s.taps, per_slice = d.k * (T + 1);
  A* partial = reinterpret_cast<A*>(workspace + o.partial);
  int32_t* taps = reinterpret_cast<int32_t*>(workspace + o.taps);
  fill_taps(d, p.s, taps);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t item = w; item < items; item += workers) {
        const int64_t slice = item / splits, split = item % splits;
        const int64_t k_begin = d.k * split / splits, k_end = d.k * (split + 1) / splits;
        A* own = partial + slice * per_slice;
        for (int64_t i = k_begin * T; i < k_end * T; ++i) own[i] = 0;
        for (int64_t k = k_begin; k < k_end; ++k) own[d.k * T + k] = 0;
        grad_slice<S, A>(d, p, slice, k_begin, k_end, own, grad_bias ? own + d.k * T : nullptr, taps,
                         workspace + o.workers + w * o.worker, o);
      }
  });
  for (int64_t i = 0; i < d.k * T; ++i) {
    A sum = 0;
    for (int64_t s = 0; s < p.slices; ++s) sum += partial[s * per_slice + i];
    const int64_t k = i / T, t = i % T, c = t / (d.r * d.s), r = t / d.s % d.r, q = t % d.s;
    grad_weight[k * d.wk + c * d.wc + r * d.wr + q * d.ws] = from_acc<S>(sum);
  }
  if (grad_bias)
    for (int64_t k = 0; k < d.k; ++k) {
      A sum = 0;
      for (int64_t s = 0; s < p.slices; ++s) sum += partial[s * per_slice + d.k * T + k];
      grad_bias[k] = from_acc<S>(sum);
    }
}

#define FASTNN_INSTANTIATE(S)                                            \
  template int64_t shift_grad_workspace<S>(const ConvProblem&, int64_t); \
  template void shift_grad_weight<S>(const ConvProblem&, S*, S*, int64_t, char*);
FASTNN_INSTANTIATE(float)
FASTNN_INSTANTIATE(double)
FASTNN_INSTANTIATE(bf16)
FASTNN_INSTANTIATE(f16)

}  // namespace fastnn::cpu::FASTNN_ISA_NS
