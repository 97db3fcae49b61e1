// 3x3 stride-1 convolution by Winograd's F(4x4, 3x3) (Lavin & Gray, arXiv:1509.09308): 36 multiplications for 16
// outputs instead of 144.
//
// Vector lanes are channels throughout. A strip of six input rows is laid out [row][column][channel] (a transposition
// for NCHW, a copy for NHWC), each 6x6 tile is transformed into V[xi][channel group][tile][lane], 36 small matrix
// products with the transformed weight U[xi][k block][c][2 lanes' worth] give M, and each tile's 36 M's become 4x4
// outputs. V and M of a block of tile rows stay in L2.
#include "conv2d_winograd.h"

#include "../../parallel.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
#else
constexpr int kMaxRows = 6;
#endif

struct Plan {
  int64_t th, tw;           // tiles per image
  int64_t tile_rows;        // over the batch: n * th
  int64_t rows_per_block, blocks;
  int64_t tiles;            // per block, at most
  int64_t c_groups;         // of N input channels
  int64_t k_groups;         // of N output channels
  int64_t chunk_groups;     // output channel groups whose U is held at once
  int64_t strip_columns;
  int64_t u_xi;             // elements between two xi of U, at most (see odd_lines)
  // byte offsets into the workspace; one V, M and strip per worker
  int64_t u, workers, v, m, strip, worker, total;
};

Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kVBytes = 640 << 10;   // V shares a 1 MB L2 with M and a panel of U
  constexpr int64_t kUBytes = 16 << 20;
  Plan p{};
  p.th = ceil_div(d.p, 4);
  p.tw = ceil_div(d.q, 4);
  p.tile_rows = d.n * p.th;
  p.c_groups = ceil_div(d.c, N);
  p.k_groups = ceil_div(d.k, N);
  const int64_t row_bytes = 36 * p.tw * p.c_groups * kVecBytes;
  p.rows_per_block = max64(1, min64(kVBytes / row_bytes, ceil_div(4 * kMaxRows, p.tw)));
  p.rows_per_block = min64(p.rows_per_block, max64(1, ceil_div(p.tile_rows, workers)));
  p.blocks = ceil_div(p.tile_rows, p.rows_per_block);
  p.tiles = p.rows_per_block * p.tw;
  const int64_t group_bytes = 36 * p.c_groups * N * kVecBytes;
  p.chunk_groups = min64(p.k_groups, max64(2, kUBytes / group_bytes / 2 * 2));
  p.strip_columns = round_up(4 * p.tw + 2, N) + N;
  const auto pad = [](int64_t bytes) { return round_up(bytes, 64); };
  p.u = 0;
  p.u_xi = odd_lines(round_up(p.chunk_groups, 2) * p.c_groups * N * N);
  p.workers = pad(36 * p.u_xi * 4);
  p.v = 0;
  p.m = 36 * odd_lines(p.c_groups * p.tiles * N) * 4;
  p.strip = p.m + 36 * odd_lines(2 * p.tiles * N) * 4;
  p.worker = p.strip + pad(6 * p.strip_columns * kVecBytes);
  p.total = p.workers + workers * p.worker;
  return p;
}

// ---- transforms ----------------------------------------------------------------------------------------------------

// A^T m for one line of six.
FASTNN_INLINE void output_line(const Raw m[6], Raw y[4]) {
  const Raw a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  y[0] = m[0] + a + c;
  y[1] = b + 2.f * e;
  y[2] = a + 4.f * c;
  y[3] = b + 8.f * e + m[5];
}

// G g for one line of three.
FASTNN_INLINE void weight_line(const Raw g[3], Raw t[6]) {
  const Raw a = (g[0] + g[2]) * (-1.f / 6), b = g[1] * (1.f / 6);
  const Raw c = g[0] * (1.f / 24) + g[2] * (1.f / 6), e = g[1] * (1.f / 12);
  t[0] = g[0] * 0.25f;
  t[1] = a - b;
  t[2] = a + b;
  t[3] = c + e;
  t[4] = c - e;
  t[5] = g[2];
}

// The 3x3 weights of one input channel for N output channels: lane[tap][output channel].
FASTNN_INLINE void gather_weight(const float* w, int64_t wk, int64_t wr, int64_t ws, int lanes, float lane[][N]) {
  if (wk == 1) {
    for (int tap = 0; tap < 9; ++tap)
      (lanes == N ? V::load(w + tap / 3 * wr + tap % 3 * ws) : V::load_n(w + tap / 3 * wr + tap % 3 * ws, lanes)).store(lane[tap]);
  } else if (ws == 1 && wr == 3 && N >= 9) {
    transpose_block(w, wk, 1, lanes, 9, lane[0]);
  } else if (ws == -1 && wr == -3 && N >= 9) {  // flipped: read forwards, swap ends
    transpose_block(w - 8, wk, 1, lanes, 9, lane[0]);
    for (int tap = 0; tap < 4; ++tap) {
      const V first = V::load(lane[tap]), last = V::load(lane[8 - tap]);
      last.store(lane[tap]);
      first.store(lane[8 - tap]);
    }
  } else {
    for (int tap = 0; tap < 9; ++tap)
      for (int l = 0; l < N; ++l) lane[tap][l] = l < lanes ? w[l * wk + tap / 3 * wr + tap % 3 * ws] : 0.f;
  }
}

// U of output channel group `group` (its place in the chunk is `at`): U[xi][pair][c][2][N].
void transform_weight(const ConvProblem& d, const Plan& p, int64_t group, int64_t at, float* u) {
  const int64_t c_padded = p.c_groups * N;
  const int lanes = int(min64(N, d.k - group * N));
  const float* w = static_cast<const float*>(d.weight) + group * N * d.wk;
  for (int64_t c = 0; c < c_padded; ++c) {
    alignas(64) float lane[N < 9 ? 9 : N][N] = {};
    if (c < d.c) gather_weight(w + c * d.wc, d.wk, d.wr, d.ws, lanes, lane);
    Raw t[6][3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      const Raw g[3] = {V::load(lane[s]).v, V::load(lane[3 + s]).v, V::load(lane[6 + s]).v};
      Raw o[6];
      weight_line(g, o);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) t[i][s] = o[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Raw o[6];
      weight_line(t[i], o);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j)
        V{o[j]}.store(u + (i * 6 + j) * p.u_xi + (at / 2 * c_padded + c) * 2 * N + at % 2 * N);
    }
  }
}

// ---- the 36 products -----------------------------------------------------------------------------------------------

// M[group][tile][lane] = sum over c of V[c][tile] U[c][lanes], MR tiles by NV lane groups.
template <int MR, int NV>
void product(const float* v, int64_t v_group, const float* u, int64_t c_groups, float* m, int64_t m_group) {
  Raw acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = Raw{};
  for (int64_t g = 0; g < c_groups; ++g, v += v_group) {
    for (int c = 0; c < N; ++c, u += 2 * N) {
      Raw b[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) b[j] = V::load(u + j * N).v;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Raw a = V::set1(v[i * N + c]).v;
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] += a * b[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) V{acc[i][j]}.store(m + j * m_group + i * N);
}

using ProductFn = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);
template <int MR, int NV>
ProductFn find_product(int rows) {
  if constexpr (MR == 0) return nullptr;
  else return rows == MR ? product<MR, NV> : find_product<MR - 1, NV>(rows);
}

// ---- outputs -------------------------------------------------------------------------------------------------------

// 4x4 outputs of every tile of one tile row into strip[row][column][lane].
void transform_output(const Plan& p, const float* m, int64_t xi_stride, Raw bias, float* strip) {
  for (int64_t t = 0; t < p.tw; ++t) {
    const float* from = m + t * N;
    Raw mid[4][6];
#pragma GCC unroll 6
    for (int s = 0; s < 6; ++s) {
      Raw line[6], o[4];
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) line[r] = V::load(from + (r * 6 + s) * xi_stride).v;
      output_line(line, o);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) mid[r][s] = o[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Raw o[4];
      output_line(mid[r], o);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) V{o[s] + bias}.store(strip + (r * p.strip_columns + 4 * t + s) * N);
    }
  }
}

void store_strip(const ConvProblem& d, const Plan& p, const float* strip, int64_t tile_row, int64_t group, float* image) {
  const int lanes = int(min64(N, d.k - group * N));
  for (int r = 0; r < 4 && tile_row * 4 + r < d.p; ++r) {
    float* to = image + group * N * d.yk + (tile_row * 4 + r) * d.yh;
    const float* row = strip + r * p.strip_columns * N;
    if (d.yk == 1) {
      for (int64_t i = 0; i < d.q; ++i) {
        const V y = V::load(row + i * N);
        if (lanes == N) y.store(to + i * d.yw);
        else y.store_n(to + i * d.yw, lanes);
      }
    } else {
      for (int64_t i = 0; i < d.q; i += N)
        untranspose_block(row + i * N, to + i * d.yw, d.yk, d.yw, lanes, int(min64(N, d.q - i)));
    }
  }
}

void run_block(const ConvProblem& d, const Plan& p, int64_t block, int64_t first_group, int64_t groups, const float* u,
               char* own) {
  float* v = reinterpret_cast<float*>(own + p.v);
  float* m = reinterpret_cast<float*>(own + p.m);
  float* strip = reinterpret_cast<float*>(own + p.strip);
  const int64_t row0 = block * p.rows_per_block, rows = min64(p.rows_per_block, p.tile_rows - row0);
  const int64_t tiles = rows * p.tw, c_padded = p.c_groups * N;
  const int64_t v_group = tiles * N, v_xi = odd_lines(p.c_groups * v_group);
  for (int64_t g = 0; g < p.c_groups; ++g)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t image = (row0 + r) / p.th, tile_row = (row0 + r) % p.th;
      fill_strip(d, p.tw, p.strip_columns, static_cast<const float*>(d.x) + image * d.xn, tile_row, g, 6, strip);
      transform_input(p.tw, p.strip_columns, strip, v + g * v_group + r * p.tw * N, v_xi);
    }
  const int64_t pairs = ceil_div(groups, 2);
  const int64_t row_blocks = ceil_div(tiles, kMaxRows), mr = ceil_div(tiles, row_blocks);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int nv = int(min64(2, groups - pair * 2));
    const int64_t m_group = tiles * N, m_xi = odd_lines(nv * m_group);
    for (int64_t xi = 0; xi < 36; ++xi)
      for (int64_t t = 0; t < tiles; t += mr) {
        const int count = int(min64(mr, tiles - t));
        const ProductFn run = nv == 2 ? find_product<kMaxRows, 2>(count) : find_product<kMaxRows, 1>(count);
        run(v + xi * v_xi + t * N, v_group, u + xi * p.u_xi + pair * c_padded * 2 * N, p.c_groups, m + xi * m_xi + t * N,
            m_group);
      }
    for (int j = 0; j < nv; ++j) {
      const int64_t group = first_group + pair * 2 + j;
      alignas(64) float bias[N] = {};
      if (d.bias)
        for (int64_t l = 0; l < min64(N, d.k - group * N); ++l)
          bias[l] = static_cast<const float*>(d.bias)[group * N + l];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t image = (row0 + r) / p.th, tile_row = (row0 + r) % p.th;
        transform_output(p, m + j * m_group + r * p.tw * N, m_xi, V::load(bias).v, strip);
        store_strip(d, p, strip, tile_row, group, static_cast<float*>(d.y) + image * d.yn);
      }
    }
  }
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t winograd_workspace(const ConvProblem& d, int64_t workers) { return make_plan(d, workers).total; }

void winograd_forward(const ConvProblem& d, int64_t workers, char* workspace) {
  const Plan p = make_plan(d, workers);
  float* u = reinterpret_cast<float*>(workspace + p.u);
  for (int64_t first = 0; first < p.k_groups; first += p.chunk_groups) {
    const int64_t groups = min64(p.chunk_groups, p.k_groups - first);
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) transform_weight(d, p, first + g, g, u);
    });
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t b = w; b < p.blocks; b += workers)
          run_block(d, p, b, first, groups, u, workspace + p.workers + w * p.worker);
    });
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
