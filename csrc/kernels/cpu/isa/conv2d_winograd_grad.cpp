// Gradient of the weight in Winograd's domain: the transpose of F(4x4, 3x3) and its like, with as few multiplications.
//
// dW = G^T [ sum over tiles of (A g A^T) (B^T d B)^T ] G: each tile of grad_output becomes 36 or 64 values per
// output channel, each tile of the input as many per input channel, and as many matrix products over the tiles give
// dU[xi][k][c]. Many tiles: slices of the batch each sum a dU of their own, added in order at the end. Few tiles beside
// a large weight: the points of every tile are kept, and each piece of dU is computed in L2 and becomes dW at once.
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

struct Plan : Tiling {
  bool few;                                // the order of work for few tiles
  int64_t tile_rows;                       // over the batch: n * th
  int64_t rows_per_block, blocks, slices;  // blocks are dealt to slices by shape alone; slices are summed in order
  int64_t tiles;                           // per block, at most
  int64_t c_groups, k_groups;
  int64_t chunk_groups;  // many: groups of output channels held at once; few: of input channels
  int64_t u_xi;          // elements between two xi of dU
  int64_t slice;         // elements of a slice: dU and the bias gradient
  int64_t v_xi, m_xi;    // few: elements between two xi of V and M
  // byte offsets: what is shared (many: slices; few: V, M, bias), then V, M or a piece of dU, and a strip per worker
  int64_t workers, v, m, bias, u, strip, worker, total;
};

template <int TAPS>
Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kTileBytes = 1 << 20, kSliceBytes = 12 << 20, kSlices = 4;
  constexpr int64_t kFewTiles = 128, kFewBytes = 12 << 20, kFewUBytes = 1 << 20;
  Plan p{};
  static_cast<Tiling&>(p) = make_tiling<TAPS>(d);
  p.tile_rows = d.n * p.th;
  p.c_groups = ceil_div(phase_channels(d), N);
  p.k_groups = ceil_div(d.k, N);
  const auto pad = [](int64_t bytes) { return round_up(bytes, 64); };
  const int64_t group_bytes = kTilePoints<TAPS> * p.c_groups * N * kVecBytes, all_tiles = p.tile_rows * p.tw;
  p.v_xi = odd_lines(p.c_groups * all_tiles * N), p.m_xi = odd_lines(p.k_groups * all_tiles * N);
  p.few = all_tiles <= kFewTiles && kTilePoints<TAPS> * (p.v_xi + p.m_xi) * 4 <= kFewBytes &&
          p.k_groups * group_bytes >= kFewUBytes;
  if (p.few) {
    p.tiles = all_tiles;
    p.chunk_groups = min64(p.c_groups, 2 * kColumns);  // dU of N output by 96 input channels: 221 KB with N = 16
    p.u_xi = odd_lines(N * p.chunk_groups * N);
    p.v = 0;
    p.m = kTilePoints<TAPS> * p.v_xi * 4;
    p.bias = p.m + kTilePoints<TAPS> * p.m_xi * 4;
    p.workers = p.bias + p.k_groups * kVecBytes;
    p.u = 0;
    p.strip = kTilePoints<TAPS> * p.u_xi * 4;
  } else {
    p.chunk_groups = max64(1, min64(p.k_groups, kSliceBytes / group_bytes));
    const int64_t row_bytes = kTilePoints<TAPS> * p.tw * (p.c_groups + p.chunk_groups) * kVecBytes;
    p.rows_per_block = max64(max64(1, ceil_div(16, p.tw)), min64(kTileBytes / row_bytes, ceil_div(96, p.tw)));
    p.rows_per_block = min64(p.rows_per_block, p.tile_rows);
    p.blocks = ceil_div(p.tile_rows, p.rows_per_block);
    p.tiles = p.rows_per_block * p.tw;
    p.u_xi = odd_lines(p.chunk_groups * N * p.c_groups * N);
    p.slice = kTilePoints<TAPS> * p.u_xi + p.chunk_groups * N;
    p.slices = max64(1, min64(min64(kSlices, p.blocks), 2 * kSliceBytes / (p.slice * 4)));
    p.workers = pad(p.slices * p.slice * 4);
    p.v = 0;
    p.m = kTilePoints<TAPS> * odd_lines(p.c_groups * p.tiles * N) * 4;
    p.strip = p.m + kTilePoints<TAPS> * odd_lines(p.chunk_groups * p.tiles * N) * 4;
  }
  p.worker = p.strip + pad(kTileIn<TAPS> * p.columns * kVecBytes);
  p.total = p.workers + workers * p.worker;
  return p;
}

// Transforms `tw` tiles of grad_output in a strip; adds their sum to bias.
template <int TAPS>
void transform_grad(int64_t tw, int64_t columns, const float* strip, float* m, int64_t xi_stride, float* bias) {
  constexpr int OUT = kTileOut<TAPS>;
  Raw sum = V::load(bias).v;
  for (int64_t t = 0; t < tw; ++t) {
    const auto load = [&](int r, int s) __attribute__((always_inline)) {
      const Raw g = V::load(strip + (r * columns + OUT * t + s) * N).v;
      sum = sum + g;
      return g;
    };
    transform_tile<Lines<TAPS>::grad, OUT, kTileIn<TAPS>>(load, store_points<TAPS>(m + t * N, xi_stride));
  }
  V{sum}.store(bias);
}

// dU[k][c] (+)= sum over tiles of M[tile][k] V[tile][c], kRows output channels by NV groups of input channels.
template <int NV>
void product(const float* m, const float* v, int64_t v_group, int64_t tiles, float* u, int64_t u_row, bool add) {
  Raw acc[kRows][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? V::load(u + i * u_row + j * N).v : Raw{};
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

// The products at every point of `channels` output channels (from a) with `groups` groups of input channels (from b).
void products(int points, const float* a, int64_t a_xi, const float* b, int64_t b_xi, int64_t group_stride,
              int64_t tiles, int64_t channels, int64_t groups, float* u, int64_t u_xi, int64_t u_row, bool add) {
  for (int64_t xi = 0; xi < points; ++xi)
    for (int64_t g = 0; g < groups; g += kColumns)
      for (int64_t k = 0; k < channels; k += kRows) {
        const float* from = a + xi * a_xi + k / N * group_stride + k % N;
        const float* with = b + xi * b_xi + g * group_stride;
        float* to = u + xi * u_xi + k * u_row + g * N;
        switch (min64(kColumns, groups - g)) {
          case 1: product<1>(from, with, group_stride, tiles, to, u_row, add); break;
          case 2: product<2>(from, with, group_stride, tiles, to, u_row, add); break;
          default: product<kColumns>(from, with, group_stride, tiles, to, u_row, add);
        }
      }
}

// grad_output read as an image: no padding, its rows past p and columns past q zero.
ConvProblem grad_as_image(const ConvProblem& d) {
  ConvProblem grad{};
  grad.xc = d.yk, grad.xh = d.yh, grad.xw = d.yw;
  grad.c = d.k, grad.h = d.p, grad.w = d.q;
  grad.dil_h = d.dil_h, grad.dil_w = d.dil_w;
  return grad;
}

// V (of input) or M (of grad_output, with the sums of its channels) of one tile row and one group of channels.
template <int TAPS>
void transform_input_row(const ConvProblem& d, const Plan& p, int64_t row, int64_t group, float* strip, float* v,
                         int64_t v_xi) {
  fill_strip<TAPS>(d, p, static_cast<const float*>(d.x) + row / p.th * d.xn, row % p.th, group, kTileIn<TAPS>, strip);
  transform_input<TAPS>(p, strip, v, v_xi);
}
template <int TAPS>
void transform_grad_row(const ConvProblem& d, const Plan& p, int64_t row, int64_t group, float* strip, float* m,
                        int64_t m_xi, float* bias) {
  fill_strip<TAPS>(grad_as_image(d), p, static_cast<const float*>(d.y) + row / p.th * d.yn, row % p.th, group,
                   kTileOut<TAPS>, strip);
  for_phases(p, [&](int64_t column, int64_t tile) {
    transform_grad<TAPS>(p.phase_tw, p.columns, strip + column, m + tile, m_xi, bias);
  });
}

// The taps of N phase channels to where the kernel of their input channel has them.
template <int TAPS>
void scatter_phases(const ConvProblem& d, const float taps[][N], int64_t first, float* w) {
  for (int64_t l = 0; l < min64(N, phase_channels(d) - first); ++l) {
    const PhaseChannel p = phase_channel(d, first + l);
    for (int64_t r = p.a, i = 0; r < d.r; r += d.stride_h, ++i)
      for (int64_t s = p.b, j = 0; s < d.s; s += d.stride_h, ++j)
        w[p.c * d.wc + r * d.wr + s * d.ws] = taps[i * TAPS + j][l];
  }
}

// dW = G^T (sum of the slices' dU) G for one output channel, w, and `groups` groups of input channels from `group` on.
// ONE: there is one slice.
template <int TAPS, bool ONE>
void finish(const ConvProblem& d, const float* u, int64_t u_xi, int64_t slices, int64_t slice, int64_t group,
            int64_t groups, float* w) {
  constexpr int kTaps = TAPS * TAPS;
  const bool together = d.wc == 1, rows = d.ws == 1 && d.wr == TAPS;
  for (int64_t g = 0; g < groups; ++g) {
    const auto load = [&](int r, int s) __attribute__((always_inline)) {
      const float* from = u + (r * kTileIn<TAPS> + s) * u_xi + g * N;
      Raw sum = V::load(from).v;
      if constexpr (!ONE)
        for (int64_t i = 1; i < slices; ++i) sum = sum + V::load(from + i * slice).v;
      return sum;
    };
    const int lanes = int(min64(N, d.c - (group + g) * N));
    float* to = w + (group + g) * N * d.wc;
    // What is written two groups on, which otherwise each store waits for: 512x7x7->512, one image, x1.1 in planes and
    // x1.4 in channels_last.
    if (together && d.stride_h == 1 && lanes == N) {
      for (int tap = 0; tap < kTaps; ++tap) __builtin_prefetch(to + 2 * N + tap / TAPS * d.wr + tap % TAPS * d.ws, 1);
      transform_tile<Lines<TAPS>::grad_weight, kTileIn<TAPS>, TAPS>(
          load, [&](int r, int s, Raw x) __attribute__((always_inline)) { V{x}.store(to + r * d.wr + s * d.ws); });
      continue;
    }
    if (rows)
      for (int i = 0; i < kTaps * N; i += 16) __builtin_prefetch(to + 2 * N * kTaps + i, 1);
    alignas(64) float taps[(kTaps + N - 1) / N * N][N];
    transform_tile<Lines<TAPS>::grad_weight, kTileIn<TAPS>, TAPS>(
        load, [&](int r, int s, Raw x) __attribute__((always_inline)) { V{x}.store(taps[r * TAPS + s]); });
    if (d.stride_h > 1) {
      scatter_phases<TAPS>(d, taps, (group + g) * N, w);
    } else if (rows) {
      for (int tap = 0; tap < kTaps; tap += N)
        untranspose_block(taps[tap], to + tap, d.wc, 1, lanes, int(min64(N, kTaps - tap)));
    } else {
      for (int tap = 0; tap < kTaps; ++tap) {
        float* at = to + tap / TAPS * d.wr + tap % TAPS * d.ws;
        if (together) V::load(taps[tap]).store_n(at, lanes);
        else
          for (int l = 0; l < lanes; ++l) at[l * d.wc] = taps[tap][l];
      }
    }
  }
}

// ---- the two orders of work ----------------------------------------------------------------------------------------

template <int TAPS>
void run_slice(const ConvProblem& d, const Plan& p, int64_t slice, int64_t first, int64_t groups, float* out,
               char* own) {
  float* v = reinterpret_cast<float*>(own + p.v);
  float* m = reinterpret_cast<float*>(own + p.m);
  float* strip = reinterpret_cast<float*>(own + p.strip);
  float* bias = out + kTilePoints<TAPS> * p.u_xi;
  for (int64_t i = 0; i < groups * N; ++i) bias[i] = 0;
  const int64_t first_block = p.blocks * slice / p.slices;
  for (int64_t block = first_block; block < p.blocks * (slice + 1) / p.slices; ++block) {
    const int64_t row0 = block * p.rows_per_block, rows = min64(p.rows_per_block, p.tile_rows - row0);
    const int64_t tiles = rows * p.tw, group_stride = tiles * N;
    const int64_t v_xi = odd_lines(p.c_groups * group_stride), m_xi = odd_lines(groups * group_stride);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < p.c_groups; ++g)
        transform_input_row<TAPS>(d, p, row0 + r, g, strip, v + g * group_stride + r * p.tw * N, v_xi);
      for (int64_t g = 0; g < groups; ++g)
        transform_grad_row<TAPS>(d, p, row0 + r, first + g, strip, m + g * group_stride + r * p.tw * N, m_xi,
                                 bias + g * N);
    }
    products(kTilePoints<TAPS>, m, m_xi, v, v_xi, group_stride, tiles, groups * N, p.c_groups, out, p.u_xi,
             p.c_groups * N, block > first_block);
  }
}

template <int TAPS>
void run_many(const ConvProblem& d, const Plan& p, float* grad_weight, float* grad_bias, int64_t workers,
              char* workspace) {
  float* slices = reinterpret_cast<float*>(workspace);
  for (int64_t first = 0; first < p.k_groups; first += p.chunk_groups) {
    const int64_t groups = min64(p.chunk_groups, p.k_groups - first);
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t s = w; s < p.slices; s += workers)
          run_slice<TAPS>(d, p, s, first, groups, slices + s * p.slice, workspace + p.workers + w * p.worker);
    });
    const int64_t channels = min64(groups * N, d.k - first * N);
    parallel_for(0, channels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        (p.slices == 1 ? finish<TAPS, true> : finish<TAPS, false>)(d, slices + k * p.c_groups * N, p.u_xi, p.slices,
                                                                   p.slice, 0, p.c_groups,
                                                                   grad_weight + (first * N + k) * d.wk);
    });
    if (!grad_bias) continue;
    for (int64_t k = 0; k < channels; ++k) {
      float sum = 0;
      for (int64_t s = 0; s < p.slices; ++s) sum += slices[s * p.slice + kTilePoints<TAPS> * p.u_xi + k];
      grad_bias[first * N + k] = sum;
    }
  }
}

template <int TAPS>
void run_few(const ConvProblem& d, const Plan& p, float* grad_weight, float* grad_bias, int64_t workers,
             char* workspace) {
  float* v = reinterpret_cast<float*>(workspace + p.v);
  float* m = reinterpret_cast<float*>(workspace + p.m);
  float* bias = reinterpret_cast<float*>(workspace + p.bias);
  const int64_t group_stride = p.tiles * N;
  for (int64_t i = 0; i < p.k_groups * N; ++i) bias[i] = 0;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      float* strip = reinterpret_cast<float*>(workspace + p.workers + w * p.worker + p.strip);
      for (int64_t g = w; g < p.c_groups + p.k_groups; g += workers)
        for (int64_t r = 0; r < p.tile_rows; ++r) {
          const int64_t k = g - p.c_groups, at = r * p.tw * N;
          if (k < 0) transform_input_row<TAPS>(d, p, r, g, strip, v + g * group_stride + at, p.v_xi);
          else transform_grad_row<TAPS>(d, p, r, k, strip, m + k * group_stride + at, p.m_xi, bias + k * N);
        }
    }
  });
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      float* u = reinterpret_cast<float*>(workspace + p.workers + w * p.worker + p.u);
      for (int64_t k = w; k < p.k_groups; k += workers)
        for (int64_t g = 0; g < p.c_groups; g += p.chunk_groups) {
          const int64_t groups = min64(p.chunk_groups, p.c_groups - g), u_row = p.chunk_groups * N;
          products(kTilePoints<TAPS>, m + k * group_stride, p.m_xi, v + g * group_stride, p.v_xi, group_stride, p.tiles,
                   N, groups, u, p.u_xi, u_row, false);
          for (int64_t i = 0; i < min64(N, d.k - k * N); ++i)
            finish<TAPS, true>(d, u + i * u_row, p.u_xi, 1, 0, g, groups, grad_weight + (k * N + i) * d.wk);
        }
    }
  });
  if (grad_bias)
    for (int64_t k = 0; k < d.k; ++k) grad_bias[k] = bias[k];
}

template <int TAPS>
void run(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers, char* workspace) {
  const Plan p = make_plan<TAPS>(d, workers);
  if (p.few) run_few<TAPS>(d, p, grad_weight, grad_bias, workers, workspace);
  else run_many<TAPS>(d, p, grad_weight, grad_bias, workers, workspace);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t winograd_grad_workspace(const ConvProblem& d, int64_t workers) {
  return dispatch_taps(d, [&]<int TAPS>() { return make_plan<TAPS>(d, workers).total; });
}

void winograd_grad_weight(const ConvProblem& d, float* grad_weight, float* grad_bias, int64_t workers,
                          char* workspace) {
  dispatch_taps(d, [&]<int TAPS>() { run<TAPS>(d, grad_weight, grad_bias, workers, workspace); });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
