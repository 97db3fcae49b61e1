// Convolution by Winograd's F(5x5, 2x2), F(4x4, 3x3), F(3x3, 4x4) (Lavin & Gray, arXiv:1509.09308), 36 multiplications
// for 25, 16 and 9 outputs instead of 100, 144 and 144, and F(4x4, 5x5), 64 for 16 outputs instead of 400.
//
// Vector lanes are channels throughout. A strip of a tile's input rows is laid out [row][column][channel] (a
// transposition for NCHW, a copy for NHWC), each tile is transformed into V[xi][channel group][tile][lane], 36 or 64
// small matrix products with the transformed weight U[xi][k block][c][2 lanes' worth] give M, and each tile's M's
// become its outputs. There are two orders of work. Many tiles: V and M of a block of tile rows stay in L2 while all of
// U passes. Few tiles beside a large weight (deep layers, one image): V holds every tile, and each piece of the weight
// is transformed into L2, used once and forgotten, since writing U out and reading it back would take longer than the
// products.
#include "../../parallel.h"
#include "conv2d_winograd_product.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

struct Plan : Tiling {
  bool few;           // the order of work for few tiles
  int64_t tile_rows;  // over the batch: n * th
  int64_t rows_per_block, blocks;
  int64_t tiles;         // per block, at most
  int64_t c_groups;      // of N input channels
  int64_t k_groups;      // of N output channels
  int64_t chunk_groups;  // many: output channel groups whose U is held at once; few: input channel groups
  int64_t u_xi;          // elements between two xi of U, at most (see odd_lines)
  int64_t v_xi;          // few: elements between two xi of V
  // byte offsets into the workspace: what is shared (many: U; few: V), then U or V, M and a strip per worker
  int64_t workers, u, v, m, strip, worker, total;
};

int64_t pad(int64_t bytes) { return round_up(bytes, 64); }

template <int TAPS>
Plan make_plan(const ConvProblem& d, int64_t workers) {
  constexpr int64_t kVBytes = 640 << 10;  // V shares a 1 MB L2 with M and a panel of U
  constexpr int64_t kUBytes = 16 << 20;
  constexpr int64_t kFewTiles = 64, kFewVBytes = 12 << 20, kFewUBytes = 1 << 20;
  Plan p{};
  static_cast<Tiling&>(p) = make_tiling<TAPS>(d);
  p.tile_rows = d.n * p.th;
  p.c_groups = ceil_div(phase_channels(d), N);
  p.k_groups = ceil_div(d.k, N);
  const int64_t strip_bytes = pad(kTileIn<TAPS> * p.columns * kVecBytes),
                group_bytes = kTilePoints<TAPS> * p.c_groups * N * kVecBytes;
  const int64_t all_tiles = p.tile_rows * p.tw;
  p.v_xi = odd_lines(p.c_groups * all_tiles * N);
  p.few =
      all_tiles <= kFewTiles && kTilePoints<TAPS> * p.v_xi * 4 <= kFewVBytes && p.k_groups * group_bytes >= kFewUBytes;
  if (p.few) {
    p.tiles = all_tiles;
    p.chunk_groups = min64(p.c_groups, ceil_div(64, N));  // U of 64 input by 2 N output channels: 288 KB with N = 16
    p.u_xi = odd_lines(p.chunk_groups * N * 2 * N);
    p.workers = kTilePoints<TAPS> * p.v_xi * 4;
    p.u = 0;
    p.m = kTilePoints<TAPS> * p.u_xi * 4;
    p.strip = p.m + kTilePoints<TAPS> * odd_lines(2 * p.tiles * N) * 4;
  } else {
    const int64_t row_bytes = kTilePoints<TAPS> * p.tw * p.c_groups * kVecBytes;
    p.rows_per_block = max64(1, min64(kVBytes / row_bytes, ceil_div(4 * kMaxRows, p.tw)));
    p.rows_per_block = min64(p.rows_per_block, max64(1, ceil_div(p.tile_rows, workers)));
    p.blocks = ceil_div(p.tile_rows, p.rows_per_block);
    p.tiles = p.rows_per_block * p.tw;
    p.chunk_groups = min64(p.k_groups, max64(2, kUBytes / group_bytes / 2 * 2));
    p.u_xi = odd_lines(round_up(p.chunk_groups, 2) * p.c_groups * N * N);
    p.workers = pad(kTilePoints<TAPS> * p.u_xi * 4);
    p.v = 0;
    p.m = kTilePoints<TAPS> * odd_lines(p.c_groups * p.tiles * N) * 4;
    p.strip = p.m + kTilePoints<TAPS> * odd_lines(2 * p.tiles * N) * 4;
  }
  p.worker = p.strip + strip_bytes;
  p.total = p.workers + workers * p.worker;
  return p;
}

// ---- transforms ----------------------------------------------------------------------------------------------------

// The taps of one input channel for N output channels: lane[tap][output channel].
template <int TAPS>
FASTNN_INLINE void gather_weight(const float* w, int64_t wk, int64_t wr, int64_t ws, int lanes, float lane[][N]) {
  constexpr int kTaps = TAPS * TAPS;
  if (wk == 1) {
    for (int tap = 0; tap < kTaps; ++tap) {
      const float* from = w + tap / TAPS * wr + tap % TAPS * ws;
      (lanes == N ? V::load(from) : V::load_n(from, lanes)).store(lane[tap]);
    }
  } else if (ws == 1 && wr == TAPS) {
    for (int tap = 0; tap < kTaps; tap += N)
      transpose_block(w + tap, wk, 1, lanes, int(min64(N, kTaps - tap)), lane[tap]);
  } else if (ws == -1 && wr == -TAPS) {  // flipped: read forwards, swap ends
    for (int tap = 0; tap < kTaps; tap += N)
      transpose_block(w - (kTaps - 1) + tap, wk, 1, lanes, int(min64(N, kTaps - tap)), lane[tap]);
    for (int tap = 0; tap < kTaps / 2; ++tap) {
      const V first = V::load(lane[tap]), last = V::load(lane[kTaps - 1 - tap]);
      last.store(lane[tap]);
      first.store(lane[kTaps - 1 - tap]);
    }
  } else {
    for (int tap = 0; tap < kTaps; ++tap)
      for (int l = 0; l < N; ++l) lane[tap][l] = l < lanes ? w[l * wk + tap / TAPS * wr + tap % TAPS * ws] : 0.f;
  }
}

constexpr int kAhead = 6;  // input channels

// transform_weight() for phase channels.
template <int TAPS>
void transform_phase_weight(const ConvProblem& d, int64_t group, int64_t c0, int64_t c1, float* u, int64_t u_xi) {
  const int lanes = int(min64(N, d.k - group * N)), taps = int(d.r * d.s);
  const int64_t stride = d.stride_h;
  const bool together = d.wc == 1 && d.xw != 1 && d.c % N == 0;  // N channels of each tap at once
  const bool rows = d.ws == 1 && d.wr == d.s;                    // all taps of a channel at once
  alignas(64) float all[kMaxKernel][N], block[TAPS * TAPS][N][N];
  int64_t held = -1;  // the channel in `all`
  for (int64_t i = c0; i < c1; ++i, u += 2 * N) {
    const PhaseChannel p = phase_channel(d, i);
    const bool real = i < phase_channels(d);
    const float* const w = static_cast<const float*>(d.weight) + group * N * d.wk + p.c * d.wc;
    if (real && rows && p.c != held) {
      for (int tap = 0; tap < taps; tap += N)
        transpose_block(w + tap, d.wk, 1, lanes, int(min64(N, taps - tap)), all[tap]);
      held = p.c;
    }
    Raw points[TAPS * TAPS];
    for (int t = 0; t < TAPS * TAPS; ++t) {
      const int64_t r = t / TAPS * stride + p.a, s = t % TAPS * stride + p.b;
      points[t] = Raw{};
      if (!real || r >= d.r || s >= d.s) continue;
      const float* const tap = w + r * d.wr + s * d.ws;
      if (rows) {
        points[t] = V::load(all[r * d.s + s]).v;
      } else if (together) {
        if (p.c % N == 0) transpose_block(tap, d.wk, 1, lanes, N, block[t][0]);
        points[t] = V::load(block[t][p.c % N]).v;
      } else {
        alignas(64) float each[N] = {};
        for (int l = 0; l < lanes; ++l) each[l] = tap[l * d.wk];
        points[t] = V::load(each).v;
      }
    }
    transform_tile<Lines<TAPS>::weight, TAPS, kTileIn<TAPS>>(
        [&](int r, int s) __attribute__((always_inline)) { return points[r * TAPS + s]; }, store_points<TAPS>(u, u_xi));
  }
}

// U of N output channels for input channels [c0, c1): u[xi][c - c0][2 N], the first N of each 2 N written.
template <int TAPS>
void transform_weight(const ConvProblem& d, int64_t group, int64_t c0, int64_t c1, float* u, int64_t u_xi) {
  if (d.stride_h > 1) return transform_phase_weight<TAPS>(d, group, c0, c1, u, u_xi);
  const int lanes = int(min64(N, d.k - group * N));
  const float* w = static_cast<const float*>(d.weight) + group * N * d.wk;
  // The gradient of the input reads the weight across its rows, which no hardware prefetcher follows (channels_last,
  // 512x7x7->512, one image: 4.5 -> 2.2 ms).
  const bool across = d.wk == TAPS * TAPS && d.wr == -TAPS;
  const bool together = d.wc == 1 && d.wk != 1;  // channels_last: N input channels of each tap at once
  constexpr int kTaps = TAPS * TAPS, kRows = (kTaps + N - 1) / N * N;
  alignas(64) float lane[kRows][N] = {}, block[kTaps][N][N];
  for (int64_t c = c0; c < c1; ++c, u += 2 * N) {
    const float (*taps)[N] = lane;
    int64_t taps_row = 1;
    if (c >= d.c) {
      __builtin_memset(lane, 0, sizeof(lane));
    } else if (together) {
      if ((c - c0) % N == 0)
        for (int tap = 0; tap < kTaps; ++tap)
          transpose_block(w + c + tap / TAPS * d.wr + tap % TAPS * d.ws, d.wk, 1, lanes, int(min64(N, d.c - c)),
                          block[tap][0]);
      taps = block[0] + (c - c0) % N;
      taps_row = N;
    } else {
      if (across)
        for (int i = 0; i < TAPS * TAPS * N / 16; ++i)
          __builtin_prefetch(w + (c + kAhead) * d.wc - (TAPS * TAPS - 1) + i * 16);
      else if (d.wk == 1)
        for (int i = 0; i < TAPS * TAPS; ++i)
          __builtin_prefetch(w + (c + kAhead) * d.wc + i / TAPS * d.wr + i % TAPS * d.ws);
      gather_weight<TAPS>(w + c * d.wc, d.wk, d.wr, d.ws, lanes, lane);
    }
    transform_tile<Lines<TAPS>::weight, TAPS, kTileIn<TAPS>>(
        [&](int r, int s) __attribute__((always_inline)) { return V::load(taps[(r * TAPS + s) * taps_row]).v; },
        store_points<TAPS>(u, u_xi));
  }
}

// ---- outputs -------------------------------------------------------------------------------------------------------

// The outputs of `tw` tiles into strip[row][column][lane].
template <int TAPS>
void transform_output(int64_t tw, int64_t columns, const float* m, int64_t xi_stride, Raw bias, float* strip) {
  constexpr int OUT = kTileOut<TAPS>;
  for (int64_t t = 0; t < tw; ++t)
    transform_tile<Lines<TAPS>::output, kTileIn<TAPS>, OUT>(
        load_points<TAPS>(m + t * N, xi_stride), [&](int r, int s, Raw y) __attribute__((always_inline)) {
          V{y + bias}.store(strip + (r * columns + OUT * t + s) * N);
        });
}

// N columns of a strip from `first` on, of every phase in turn, to `block`.
FASTNN_INLINE void gather_columns(const Plan& p, const float* row, int64_t first, int64_t count, float block[][N]) {
  int64_t phase = first % p.phases, column = first / p.phases;
  for (int64_t i = 0; i < count; ++i) {
    V::load(row + (phase * p.phase_columns + column) * N).store(block[i]);
    if (++phase == p.phases) phase = 0, ++column;
  }
}

template <int TAPS>
void store_strip(const ConvProblem& d, const Plan& p, const float* strip, int64_t tile_row, int64_t group,
                 float* image) {
  const int lanes = int(min64(N, d.k - group * N));
  const int64_t top = p.top<TAPS>(d, tile_row);
  alignas(64) float block[N][N];
  for (int r = 0; r < kTileOut<TAPS> && top + r * d.dil_h < d.p; ++r) {
    float* to = image + group * N * d.yk + (top + r * d.dil_h) * d.yh;
    const float* row = strip + r * p.columns * N;
    const auto store_pixels = [&](const float* from, int64_t first, int64_t count) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) {
        const V y = V::load(from + i * N);
        if (lanes == N) y.store(to + (first + i) * d.yw);
        else y.store_n(to + (first + i) * d.yw, lanes);
      }
    };
    if (p.phases == 1 && d.yk == 1) {
      store_pixels(row, 0, d.q);
      continue;
    }
    for (int64_t i = 0; i < d.q; i += N) {
      const int64_t count = min64(N, d.q - i);
      const float* from = row + i * N;
      if (p.phases > 1) gather_columns(p, row, i, count, block), from = block[0];
      if (d.yk == 1) store_pixels(from, i, count);
      else untranspose_block(from, to + i * d.yw, d.yk, d.yw, lanes, int(count));
    }
  }
}

// Tile rows [row0, row0 + rows) of nv output channel groups from M.
template <int TAPS>
void finish(const ConvProblem& d, const Plan& p, const float* m, int64_t row0, int64_t rows, int64_t group, int nv,
            float* strip) {
  const int64_t m_group = rows * p.tw * N, m_xi = odd_lines(nv * m_group);
  for (int j = 0; j < nv; ++j) {
    alignas(64) float bias[N] = {};
    if (d.bias)
      for (int64_t l = 0; l < min64(N, d.k - (group + j) * N); ++l)
        bias[l] = static_cast<const float*>(d.bias)[(group + j) * N + l];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t image = (row0 + r) / p.th, tile_row = (row0 + r) % p.th;
      for_phases(p, [&](int64_t column, int64_t tile) {
        transform_output<TAPS>(p.phase_tw, p.columns, m + j * m_group + r * p.tw * N + tile, m_xi, V::load(bias).v,
                               strip + column);
      });
      store_strip<TAPS>(d, p, strip, tile_row, group + j, static_cast<float*>(d.y) + image * d.yn);
    }
  }
}

// V of tile rows [row0, row0 + rows) of one input channel group.
template <int TAPS>
void transform_rows(const ConvProblem& d, const Plan& p, int64_t row0, int64_t rows, int64_t group, float* strip,
                    float* v, int64_t v_xi) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t image = (row0 + r) / p.th, tile_row = (row0 + r) % p.th;
    fill_strip<TAPS>(d, p, static_cast<const float*>(d.x) + image * d.xn, tile_row, group, kTileIn<TAPS>, strip);
    transform_input<TAPS>(p, strip, v + r * p.tw * N, v_xi);
  }
}

// ---- the two orders of work ----------------------------------------------------------------------------------------

template <int TAPS>
void run_block(const ConvProblem& d, const Plan& p, int64_t block, int64_t first_group, int64_t groups, const float* u,
               char* own) {
  float* v = reinterpret_cast<float*>(own + p.v);
  float* m = reinterpret_cast<float*>(own + p.m);
  float* strip = reinterpret_cast<float*>(own + p.strip);
  const int64_t row0 = block * p.rows_per_block, rows = min64(p.rows_per_block, p.tile_rows - row0);
  const int64_t tiles = rows * p.tw, v_group = tiles * N, v_xi = odd_lines(p.c_groups * v_group);
  for (int64_t g = 0; g < p.c_groups; ++g) transform_rows<TAPS>(d, p, row0, rows, g, strip, v + g * v_group, v_xi);
  for (int64_t at = 0; at < groups; at += 2) {
    const int nv = int(min64(2, groups - at));
    winograd_products<false>(kTilePoints<TAPS>, v, v_xi, v_group, tiles, u + at * p.c_groups * N * N, p.u_xi,
                             phase_channels(d), nv, m, false);
    finish<TAPS>(d, p, m, row0, rows, first_group + at, nv, strip);
  }
}

template <int TAPS>
void run_many(const ConvProblem& d, const Plan& p, int64_t workers, char* workspace) {
  float* u = reinterpret_cast<float*>(workspace);
  const int64_t c_padded = p.c_groups * N;
  for (int64_t first = 0; first < p.k_groups; first += p.chunk_groups) {
    const int64_t groups = min64(p.chunk_groups, p.k_groups - first);
    parallel_for(0, groups, workers > 1 ? 1 : groups, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        transform_weight<TAPS>(d, first + at, 0, c_padded, u + at / 2 * c_padded * 2 * N + at % 2 * N, p.u_xi);
    });
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t b = w; b < p.blocks; b += workers)
          run_block<TAPS>(d, p, b, first, groups, u, workspace + p.workers + w * p.worker);
    });
  }
}

template <int TAPS>
void run_few(const ConvProblem& d, const Plan& p, int64_t workers, char* workspace) {
  float* v = reinterpret_cast<float*>(workspace);
  const int64_t v_group = p.tiles * N;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t g = w; g < p.c_groups; g += workers)
        transform_rows<TAPS>(d, p, 0, p.tile_rows, g,
                             reinterpret_cast<float*>(workspace + p.workers + w * p.worker + p.strip), v + g * v_group,
                             p.v_xi);
  });
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      char* own = workspace + p.workers + w * p.worker;
      float* u = reinterpret_cast<float*>(own + p.u);
      float* m = reinterpret_cast<float*>(own + p.m);
      for (int64_t group = 2 * w; group < p.k_groups; group += 2 * workers) {
        const int nv = int(min64(2, p.k_groups - group));
        for (int64_t g = 0; g < p.c_groups; g += p.chunk_groups) {
          const int64_t count = min64(p.chunk_groups, p.c_groups - g);
          for (int j = 0; j < nv; ++j) transform_weight<TAPS>(d, group + j, g * N, (g + count) * N, u + j * N, p.u_xi);
          winograd_products<false>(kTilePoints<TAPS>, v + g * v_group, p.v_xi, v_group, p.tiles, u, p.u_xi,
                                   min64(count * N, phase_channels(d) - g * N), nv, m, g > 0);
        }
        finish<TAPS>(d, p, m, 0, p.tile_rows, group, nv, reinterpret_cast<float*>(own + p.strip));
      }
    }
  });
}

template <int TAPS>
void run(const ConvProblem& d, int64_t workers, char* workspace) {
  const Plan p = make_plan<TAPS>(d, workers);
  if (p.few) run_few<TAPS>(d, p, workers, workspace);
  else run_many<TAPS>(d, p, workers, workspace);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t winograd_workspace(const ConvProblem& d, int64_t workers) {
  return dispatch_taps(d, [&]<int TAPS>() { return make_plan<TAPS>(d, workers).total; });
}

void winograd_forward(const ConvProblem& d, int64_t workers, char* workspace) {
  dispatch_taps(d, [&]<int TAPS>() { run<TAPS>(d, workers, workspace); });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
