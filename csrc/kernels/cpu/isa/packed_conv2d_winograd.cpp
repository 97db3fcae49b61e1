// Winograd on a weight that was transformed once: F(5x5, 2x2), F(4x4, 3x3), F(3x3, 4x4) and F(4x4, 5x5) in NHWC, the
// epilogue in the last transform. A stride's phases are channels of their own (conv2d_phases.h), a
// dilation's images (conv2d_winograd.h).
//
// As conv2d_winograd.cpp, but tiles are written to the image in place and read from it where N channels of a phase lie
// side by side, and U lies in the order it is read: [pair of channel groups][xi][c][2 N].
#include "../../parallel.h"
#include "conv2d_winograd_product.h"
#include "packed_conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

struct Plan : Tiling {
  int64_t tile_rows;                      // over the batch
  int64_t rows_per_block, blocks, tiles;  // tiles: per block, at most
  int64_t c_groups, k_groups;
  bool in_place;             // tiles are read without a strip
  int64_t m, strip, worker;  // byte offsets of M and of a strip behind V; bytes of one worker
};

// What the phases of a stride or of a dilation are told by.
ConvProblem problem(const PackedConv2dParams& p) {
  ConvProblem d{};
  d.xn = p.input_stride_n, d.xc = p.input_stride_c, d.xh = p.input_stride_h, d.xw = p.input_stride_w;
  d.n = p.N, d.c = p.C, d.h = p.H, d.w = p.W, d.r = p.R, d.s = p.S;
  d.p = p.P, d.q = p.Q, d.dil_h = p.dilation_h, d.dil_w = p.dilation_w;
  d.stride_h = p.stride_h, d.stride_w = p.stride_w, d.pad_h = p.pad_h, d.pad_w = p.pad_w;
  return d;
}

template <int TAPS>
Plan make_plan(const PackedConv2dParams& p, int64_t workers) {
  Plan o{};
  static_cast<Tiling&>(o) = make_tiling<TAPS>(problem(p));
  o.tile_rows = p.N * o.th;
  o.c_groups = ceil_div(phase_channels(problem(p)), N), o.k_groups = ceil_div(p.K, N);
  const int64_t row_bytes = kTilePoints<TAPS> * o.tw * o.c_groups * kVecBytes;
  // V shares a 1 MB L2 with M and a panel of U; unless U itself comes from memory once per block.
  const int64_t u_bytes = kTilePoints<TAPS> * o.c_groups * N * o.k_groups * N * 4,
                v_bytes = u_bytes > (4 << 20) ? 4 << 20 : 640 << 10;
  o.rows_per_block = max64(1, min64(v_bytes / row_bytes, ceil_div(4 * kMaxRows, o.tw)));
  // Few tiles: each thread transforms all of them for its channel groups, so that U is read once.
  const bool few = 10 * o.tile_rows * o.tw < 3 * p.K && 2 * workers <= o.k_groups && o.tile_rows <= o.rows_per_block;
  if (!few) o.rows_per_block = min64(o.rows_per_block, max64(1, ceil_div(o.tile_rows, workers)));
  o.blocks = ceil_div(o.tile_rows, o.rows_per_block);
  o.rows_per_block = ceil_div(o.tile_rows, o.blocks);  // even blocks
  o.blocks = ceil_div(o.tile_rows, o.rows_per_block);
  o.tiles = o.rows_per_block * o.tw;
  o.m = kTilePoints<TAPS> * odd_lines(o.c_groups * o.tiles * N) * 4;
  o.strip = o.m + kTilePoints<TAPS> * odd_lines(2 * o.tiles * N) * 4;
  o.in_place = p.stride_h == 1 || (p.input_stride_c == 1 && p.C % N == 0);
  o.worker = o.strip + (o.in_place ? 0 : kTileIn<TAPS> * o.columns * kVecBytes);
  return o;
}

// ---- input ---------------------------------------------------------------------------------------------------------

// The points of one tile of N channels: rows and columns `xh` and `xw` apart.
template <int TAPS>
FASTNN_INLINE void transform_input_tile(const float* x, int64_t xh, int64_t xw, float* v, int64_t xi_stride) {
  const auto load = [=](int r, int s) __attribute__((always_inline)) { return V::load(x + r * xh + s * xw).v; };
  transform_tile<Lines<TAPS>::input, kTileIn<TAPS>, kTileIn<TAPS>>(load, store_points<TAPS>(v, xi_stride));
}

// V of one row of tiles and one group of channels.
template <int TAPS>
void transform_row(const PackedConv2dParams& p, const Plan& o, const float* image, int64_t tile_row, int64_t group,
                   float* strip, float* v, int64_t xi_stride) {
  constexpr int IN = kTileIn<TAPS>;
  const ConvProblem d = problem(p);
  if (!o.in_place) {
    fill_strip<TAPS>(d, o, image, tile_row, group, IN, strip);
    return transform_input<TAPS>(o, strip, v, xi_stride);
  }
  const PhaseChannel f = phase_channel(d, group * N);
  const int lanes = int(min64(N, p.C - f.c));
  // How far apart the rows and the columns of a tile lie; what has a stride has no dilation.
  const int64_t stride = p.stride_h, down = stride * p.dilation_h, across = stride * p.dilation_w;
  const int64_t xh = p.input_stride_h, xw = p.input_stride_w;
  const int64_t h = o.top<TAPS>(d, tile_row) * stride + f.a - p.pad_h;
  const bool rows_inside = h >= 0 && h + (IN - 1) * down < p.H && lanes == N;
  const float* x = image + f.c;
  for (int64_t t = 0; t < o.tw; ++t, v += N) {
    const int64_t w = o.left<TAPS>(d, t) * stride + f.b - p.pad_w;
    if (rows_inside && w >= 0 && w + (IN - 1) * across < p.W) {
      transform_input_tile<TAPS>(x + h * xh + w * xw, down * xh, across * xw, v, xi_stride);
      continue;
    }
    alignas(64) float patch[kTilePoints<TAPS> * N];
    for (int r = 0; r < IN; ++r)
      for (int s = 0; s < IN; ++s) {
        const int64_t ih = h + r * down, iw = w + s * across;
        V value = V::zero();
        if (ih >= 0 && ih < p.H && iw >= 0 && iw < p.W) {
          const float* from = x + ih * xh + iw * xw;
          value = lanes == N ? V::load(from) : V::load_n(from, lanes);
        }
        value.store(patch + (r * IN + s) * N);
      }
    transform_input_tile<TAPS>(patch, IN * N, N, v, xi_stride);
  }
}

// ---- output --------------------------------------------------------------------------------------------------------

// The outputs of one row of tiles and one group of channels, with bias, residual and clamp, into the image.
template <int TAPS>
void finish_row(const PackedConv2dParams& p, const Plan& o, const float* m, int64_t xi_stride, Raw bias,
                int64_t tile_row, int lanes, float* y, const float* residual) {
  constexpr int IN = kTileIn<TAPS>, OUT = kTileOut<TAPS>;
  using L = Lines<TAPS>;
  const Clamp clamp(p);
  const ConvProblem d = problem(p);
  const int64_t top = o.top<TAPS>(d, tile_row);
  const int64_t y_row = p.dilation_h * p.output_stride_h, y_column = p.dilation_w * p.output_stride_w;
  const int64_t residual_row = p.dilation_h * p.residual_stride_h, residual_column = p.dilation_w * p.residual_stride_w;
  const int rows = int(min64(OUT, ceil_div(p.P - top, p.dilation_h)));
  y += top * p.output_stride_h;
  if (residual) residual += top * p.residual_stride_h;
  for (int64_t t = 0; t < o.tw; ++t, m += N) {
    const int64_t left = o.left<TAPS>(d, t);
    const int columns = int(min64(OUT, ceil_div(p.Q - left, p.dilation_w)));
    Raw mid[OUT][IN];
    transform_columns<L::output, IN, OUT>(load_points<TAPS>(m, xi_stride), mid);
#pragma GCC unroll 5
    for (int r = 0; r < OUT; ++r) {
      if (r >= rows) break;
      Raw out[OUT];
      L::output(mid[r], out);
      float* const to = y + r * y_row + left * p.output_stride_w;
      const float* const add = residual ? residual + r * residual_row + left * p.residual_stride_w : nullptr;
#pragma GCC unroll 5
      for (int s = 0; s < OUT; ++s) {
        if (s >= columns) break;
        Raw value = out[s] + bias;
        if (lanes == N) {
          if (add) value = value + V::load(add + s * residual_column).v;
          V{clamp(value)}.store(to + s * y_column);
        } else {
          if (add) value = value + V::load_n(add + s * residual_column, lanes).v;
          V{clamp(value)}.store_n(to + s * y_column, lanes);
        }
      }
    }
  }
}

template <int TAPS>
void run_block(const PackedConv2dParams& p, const Plan& o, int64_t block, int64_t first_pair, int64_t last_pair,
               char* own) {
  float* const v = reinterpret_cast<float*>(own);
  float* const m = reinterpret_cast<float*>(own + o.m);
  const int64_t row0 = block * o.rows_per_block, rows = min64(o.rows_per_block, o.tile_rows - row0);
  const int64_t tiles = rows * o.tw, group_v = tiles * N, v_xi = odd_lines(o.c_groups * group_v);
  for (int64_t g = 0; g < o.c_groups; ++g)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t image = (row0 + r) / o.th, tile_row = (row0 + r) % o.th;
      transform_row<TAPS>(p, o, p.input + image * p.input_stride_n, tile_row, g,
                          reinterpret_cast<float*>(own + o.strip), v + g * group_v + r * o.tw * N, v_xi);
    }
  const int64_t u_xi = o.c_groups * N * 2 * N;
  const float* const bias = p.packed + ceil_div(o.k_groups, 2) * kTilePoints<TAPS> * u_xi;
  for (int64_t pair = first_pair; pair < last_pair; ++pair) {
    const int nv = int(min64(2, o.k_groups - 2 * pair));
    winograd_products<true>(kTilePoints<TAPS>, v, v_xi, group_v, tiles, p.packed + pair * kTilePoints<TAPS> * u_xi,
                            o.c_groups * N * nv * N, phase_channels(problem(p)), nv, m, false);
    const int64_t m_xi = odd_lines(nv * group_v);
    for (int j = 0; j < nv; ++j) {
      const int64_t k = (2 * pair + j) * N;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t image = (row0 + r) / o.th, tile_row = (row0 + r) % o.th;
        finish_row<TAPS>(p, o, m + j * group_v + r * o.tw * N, m_xi, V::load(bias + k).v, tile_row,
                         int(min64(N, p.K - k)), p.output + image * p.output_stride_n + k,
                         p.residual ? p.residual + image * p.residual_stride_n + k : nullptr);
      }
    }
  }
}

// As many threads as the bound on the workspace has room for: the choice does not depend on them.
template <int TAPS>
int64_t workers_for(const PackedConv2dParams& p) {
  int64_t workers = num_threads();
  while (workers > 1 && workers * make_plan<TAPS>(p, workers).worker > kPackedConv2dMaxWorkspace) --workers;
  return workers;
}

template <int TAPS>
void run(const PackedConv2dParams& p) {
  const int64_t workers = workers_for<TAPS>(p);
  const Plan o = make_plan<TAPS>(p, workers);
  // Threads share out blocks of tiles, and pairs of channels where blocks are few.
  const int64_t pairs = ceil_div(o.k_groups, 2), chunks = o.blocks < workers ? min64(pairs, workers) : 1;
  const int64_t tasks = o.blocks * chunks;
  parallel_for(0, min64(workers, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t task = w; task < tasks; task += workers)
        run_block<TAPS>(p, o, task / chunks, pairs * (task % chunks) / chunks, pairs * (task % chunks + 1) / chunks,
                        static_cast<char*>(p.workspace) + w * o.worker);
  });
}

// ---- weight --------------------------------------------------------------------------------------------------------

template <int TAPS>
void pack(const PackedConv2dParams& p) {
  const ConvProblem d = problem(p);
  const int64_t channels = phase_channels(d), c_padded = round_up(channels, N);
  const int64_t k_groups = ceil_div(p.K, N), pairs = ceil_div(k_groups, 2),
                u_pair = kTilePoints<TAPS> * c_padded * 2 * N;
  parallel_for(0, k_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int nv = group / 2 * 2 + 1 < k_groups ? 2 : 1;
      float* const u = p.packed + group / 2 * u_pair + group % 2 * N;
      const int64_t k0 = group * N, lanes = min64(N, p.K - k0);
      for (int64_t c = 0; c < c_padded; ++c) {
        const PhaseChannel f = phase_channel(d, c);
        const auto load = [&](int r, int s) {
          const int64_t at_r = r * p.stride_h + f.a, at_s = s * p.stride_w + f.b;
          alignas(64) float lane[N] = {};
          if (c < channels && at_r < p.R && at_s < p.S)
            for (int64_t l = 0; l < lanes; ++l)
              lane[l] = p.weight[(k0 + l) * p.weight_stride_k + f.c * p.weight_stride_c + at_r * p.weight_stride_r +
                                 at_s * p.weight_stride_s];
          return V::load(lane).v;
        };
        transform_tile<Lines<TAPS>::weight, TAPS, kTileIn<TAPS>>(load,
                                                                 store_points<TAPS>(u + c * nv * N, c_padded * nv * N));
      }
    }
  });
  float* const bias = p.packed + pairs * u_pair;
  for (int64_t k = 0; k < pairs * 2 * N; ++k) bias[k] = p.bias && k < p.K ? p.bias[k] : 0.f;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t packed_winograd_bytes(const PackedConv2dParams& p) {
  const int64_t pairs = ceil_div(p.K, 2 * N);
  const int64_t channels = round_up(phase_channels(problem(p)), N);
  return dispatch_taps(
      problem(p), [&]<int TAPS>() { return (pairs * kTilePoints<TAPS> * channels * 2 * N + pairs * 2 * N) * 4 + 64; });
}

void packed_winograd_pack(const PackedConv2dParams& p) {
  dispatch_taps(problem(p), [&]<int TAPS>() { pack<TAPS>(p); });
}

int64_t packed_winograd_workspace(const PackedConv2dParams& p) {
  return dispatch_taps(problem(p), [&]<int TAPS>() {
    const int64_t workers = workers_for<TAPS>(p);
    return workers * make_plan<TAPS>(p, workers).worker;
  });
}

void packed_winograd_run(const PackedConv2dParams& p) {
  dispatch_taps(problem(p), [&]<int TAPS>() { run<TAPS>(p); });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
