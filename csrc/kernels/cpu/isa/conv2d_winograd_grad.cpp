// Gradient of a 3x3 stride-1 weight in Winograd's domain: the transpose of F(4x4, 3x3), with as few multiplications.
//
// dW = G^T [ sum over tiles of (A g A^T) (B^T d B)^T ] G: each 4x4 tile of grad_output becomes 36 values per output
// channel, each 6x6 tile of the input 36 per input channel, and 36 matrix products over the tiles give dU[xi][k][c].
#include "../../parallel.h"
#include "conv2d_winograd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

#if defined(__AVX512F__)
constexpr int kRows = 8, kColumns = 3;  // output channels x groups of input channels in registers
#else
constexpr int kRows = 4, kColumns = 2;
#endif

struct Plan {
  int64_t th, tw, tile_rows;
  int64_t rows_per_block, blocks, slices;  // blocks are dealt to slices by shape alone; slices are summed in order
  int64_t tiles;                           // per block, at most
  int64_t c_groups, k_groups, chunk_groups;
  int64_t strip_columns;
  int64_t u_xi;                            // elements between two xi of dU
  int64_t slice;                           // elements of a slice: dU and the bias gradient
  int64_t workers, v, m, strip, worker, total;  // byte offsets
};

Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kTileBytes = 1 << 20, kSliceBytes = 12 << 20, kSlices = 4;
  Plan p{};
  p.th = ceil_div(d.p, 4);
  p.tw = ceil_div(d.q, 4);
  p.tile_rows = d.n * p.th;
  p.c_groups = ceil_div(d.c, N);
  p.k_groups = ceil_div(d.k, N);
  const int64_t group_bytes = 36 * p.c_groups * N * kVecBytes;
  p.chunk_groups = max64(1, min64(p.k_groups, kSliceBytes / group_bytes));
  const int64_t row_bytes = 36 * p.tw * (p.c_groups + p.chunk_groups) * kVecBytes;
  p.rows_per_block = max64(max64(1, ceil_div(16, p.tw)), min64(kTileBytes / row_bytes, ceil_div(96, p.tw)));
  p.rows_per_block = min64(p.rows_per_block, p.tile_rows);
  p.blocks = ceil_div(p.tile_rows, p.rows_per_block);
  p.tiles = p.rows_per_block * p.tw;
  p.u_xi = odd_lines(p.chunk_groups * N * p.c_groups * N);
  p.slice = 36 * p.u_xi + p.chunk_groups * N;
  p.slices = max64(1, min64(min64(kSlices, p.blocks), 2 * kSliceBytes / (p.slice * 4)));
  p.strip_columns = round_up(4 * p.tw + 2, N) + N;
  const auto pad = [](int64_t bytes) { return round_up(bytes, 64); };
  p.workers = pad(p.slices * p.slice * 4);
  p.v = 0;
  p.m = 36 * odd_lines(p.c_groups * p.tiles * N) * 4;
  p.strip = p.m + 36 * odd_lines(p.chunk_groups * p.tiles * N) * 4;
  p.worker = p.strip + pad(6 * p.strip_columns * kVecBytes);
  p.total = p.workers + workers * p.worker;
  return p;
}

// A g for one line of four.
FASTNN_INLINE void grad_line(const Raw g[4], Raw t[6]) {
  const Raw even = g[0] + g[2], odd = g[1] + g[3];
  const Raw even4 = g[0] + 4.f * g[2], odd4 = 2.f * g[1] + 8.f * g[3];
  t[0] = g[0];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = even4 + odd4;
  t[4] = even4 - odd4;
  t[5] = g[3];
}

// G^T u for one line of six.
FASTNN_INLINE void weight_line(const Raw u[6], Raw w[3]) {
  const Raw a = u[1] + u[2], b = u[2] - u[1], c = u[3] + u[4], e = u[3] - u[4];
  w[0] = 0.25f * u[0] - (1.f / 6) * a + (1.f / 24) * c;
  w[1] = (1.f / 6) * b + (1.f / 12) * e;
  w[2] = (1.f / 6) * (c - a) + u[5];
}

// Transforms the 4x4 tiles of grad_output in a strip; adds the strip's sum to bias.
void transform_grad(const Plan& p, const float* strip, float* m, int64_t xi_stride, float* bias) {
  Raw sum = V::load(bias).v;
  for (int64_t t = 0; t < p.tw; ++t) {
    Raw mid[6][4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      Raw line[4], o[6];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        line[r] = V::load(strip + (r * p.strip_columns + 4 * t + s) * N).v;
        sum += line[r];
      }
      grad_line(line, o);
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) mid[r][s] = o[r];
    }
    float* to = m + t * N;
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) {
      Raw o[6];
      grad_line(mid[r], o);
#pragma GCC unroll 6
      for (int s = 0; s < 6; ++s) V{o[s]}.store(to + (r * 6 + s) * xi_stride);
    }
  }
  V{sum}.store(bias);
}

// dU[k][c] += sum over tiles of M[tile][k] V[tile][c], kRows output channels by NV groups of input channels.
template <int NV>
void product(const float* m, const float* v, int64_t v_group, int64_t tiles, float* u, int64_t u_row) {
  Raw acc[kRows][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V::load(u + i * u_row + j * N).v;
  for (int64_t t = 0; t < tiles; ++t, m += N, v += N) {
    Raw b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) b[j] = V::load(v + j * v_group).v;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Raw a = V::set1(m[i]).v;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) V{acc[i][j]}.store(u + i * u_row + j * N);
}

void run_slice(const ConvProblem& d, const Plan& p, int64_t slice, int64_t first, int64_t groups, float* out, char* own) {
  float* v = reinterpret_cast<float*>(own + p.v);
  float* m = reinterpret_cast<float*>(own + p.m);
  float* strip = reinterpret_cast<float*>(own + p.strip);
  const int64_t c_padded = p.c_groups * N;
  float* bias = out + 36 * p.u_xi;
  for (int64_t i = 0; i < p.slice; ++i) out[i] = 0;
  // grad_output read as an image: no padding, its rows past p and columns past q zero.
  ConvProblem grad{};
  grad.xc = d.yk, grad.xh = d.yh, grad.xw = d.yw;
  grad.c = d.k, grad.h = d.p, grad.w = d.q;
  for (int64_t block = p.blocks * slice / p.slices; block < p.blocks * (slice + 1) / p.slices; ++block) {
    const int64_t row0 = block * p.rows_per_block, rows = min64(p.rows_per_block, p.tile_rows - row0);
    const int64_t tiles = rows * p.tw, group_stride = tiles * N;
    const int64_t v_xi = odd_lines(p.c_groups * group_stride), m_xi = odd_lines(groups * group_stride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t image = (row0 + r) / p.th, tile_row = (row0 + r) % p.th;
      for (int64_t g = 0; g < p.c_groups; ++g) {
        fill_strip(d, p.tw, p.strip_columns, static_cast<const float*>(d.x) + image * d.xn, tile_row, g, 6, strip);
        transform_input(p.tw, p.strip_columns, strip, v + g * group_stride + r * p.tw * N, v_xi);
      }
      for (int64_t g = 0; g < groups; ++g) {
        fill_strip(grad, p.tw, p.strip_columns, static_cast<const float*>(d.y) + image * d.yn, tile_row, first + g, 4,
                   strip);
        transform_grad(p, strip, m + g * group_stride + r * p.tw * N, m_xi, bias + g * N);
      }
    }
    for (int64_t xi = 0; xi < 36; ++xi)
      for (int64_t g = 0; g < p.c_groups; g += kColumns)
        for (int64_t k = 0; k < groups * N; k += kRows) {
          const float* a = m + xi * m_xi + k / N * group_stride + k % N;
          const float* b = v + xi * v_xi + g * group_stride;
          float* u = out + xi * p.u_xi + k * c_padded + g * N;
          switch (min64(kColumns, p.c_groups - g)) {
            case 1: product<1>(a, b, group_stride, tiles, u, c_padded); break;
            case 2: product<2>(a, b, group_stride, tiles, u, c_padded); break;
            default: product<kColumns>(a, b, group_stride, tiles, u, c_padded);
          }
        }
  }
}

// dW[k][c] = G^T (sum of the slices' dU) G for one output channel of the chunk.
void finish(const ConvProblem& d, const Plan& p, const float* slices, int64_t first, int64_t k, float* grad_weight) {
  const int64_t c_padded = p.c_groups * N;
  float* w = grad_weight + (first * N + k) * d.wk;
  for (int64_t g = 0; g < p.c_groups; ++g) {
    Raw mid[3][6];
#pragma GCC unroll 6
    for (int s = 0; s < 6; ++s) {
      Raw line[6], o[3];
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) {
        const float* from = slices + (r * 6 + s) * p.u_xi + k * c_padded + g * N;
        line[r] = V::load(from).v;
        for (int64_t i = 1; i < p.slices; ++i) line[r] += V::load(from + i * p.slice).v;
      }
      weight_line(line, o);
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) mid[r][s] = o[r];
    }
    alignas(64) float taps[N < 9 ? 9 : N][N];
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      Raw o[3];
      weight_line(mid[r], o);
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) V{o[s]}.store(taps[r * 3 + s]);
    }
    const int lanes = int(min64(N, d.c - g * N));
    float* to = w + g * N * d.wc;
    if (N >= 9 && d.ws == 1 && d.wr == 3) untranspose_block(taps[0], to, d.wc, 1, lanes, 9);
    else
      for (int tap = 0; tap < 9; ++tap)
        for (int l = 0; l < lanes; ++l) to[l * d.wc + tap / 3 * d.wr + tap % 3 * d.ws] = taps[tap][l];
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t winograd_grad_workspace(const ConvProblem& d, int64_t workers) { return make_plan(d, workers).total; }

void winograd_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers, char* workspace) {
  const Plan p = make_plan(d, workers);
  float* slices = reinterpret_cast<float*>(workspace);
  for (int64_t first = 0; first < p.k_groups; first += p.chunk_groups) {
    const int64_t groups = min64(p.chunk_groups, p.k_groups - first);
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t s = w; s < p.slices; s += workers)
          run_slice(d, p, s, first, groups, slices + s * p.slice, workspace + p.workers + w * p.worker);
    });
    const int64_t channels = min64(groups * N, d.k - first * N);
    parallel_for(0, channels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) finish(d, p, slices, first, k, grad_weight);
    });
    if (!grad_bias) continue;
    for (int64_t k = 0; k < channels; ++k) {
      float sum = 0;
      for (int64_t s = 0; s < p.slices; ++s) sum += slices[s * p.slice + 36 * p.u_xi + k];
      grad_bias[first * N + k] = sum;
    }
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
