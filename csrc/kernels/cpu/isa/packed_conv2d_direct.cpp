// Direct convolution in NHWC: output pixels x output channels is a matrix product whose left rows lie in the image.
//
// Seen from one output pixel, the input under a kernel row is one run of S * C values, so neither im2col nor packing of
// the image is needed: a tile of 14 pixels by 32 channels stays in registers over all runs, broadcasts the image's
// values and reads the packed weight in order. Padding is a copy of the image with a border of zeros, a strided 1x1
// kernel a copy of the pixels it reads; a norm and a ReLU in front of a 1x1 kernel are applied to one block of pixels
// at a time, on the way into L2.
#include "../../parallel.h"
#include "packed_conv2d.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
using Raw = V::Raw;
constexpr int N = V::N;

// Rows of a tile, as two groups so that few registers address them.
#if defined(__AVX512F__)
constexpr int kHalf = 7;
#elif defined(__AVX2__)
constexpr int kHalf = 3;
#else
constexpr int kHalf = 2;
#endif
constexpr int kRows = 2 * kHalf;

constexpr int64_t kNear = 512;
constexpr int64_t kAhead = (256 << 10) / sizeof(float);  // of a panel: two and the pixels share L2
constexpr int64_t kBlockBytes = 384 << 10;               // of pixels that stay in L2 while all panels pass

struct Plan {
  bool copies;                 // the image is copied: a border, pixels that a 1x1 kernel skips, channels that lie apart
  bool gathers;                // ... only the pixels a strided 1x1 kernel reads
  int64_t height, width;       // of the image that is read
  int64_t stride_h, stride_w;  // of the kernel over it
  int64_t xn, xh, xw;          // its strides
  int64_t runs, length;        // the input of a pixel: `runs` runs of `length` values
  int64_t runs_per_row, step_row, step_run;  // where they start: row * step_row + i * step_run
  int64_t c, k;                              // channels of a group
  int64_t panels, depth;                     // of a group
  int64_t image_bytes;                       // of the copy
  int64_t block_bytes;                       // per worker: a block of pixels behind the norm
};

Plan make_plan(const PackedConv2dParams& p) {
  Plan o{};
  // What the last outputs reach: past the padding in a phase of a strided gradient.
  const int64_t reach_h = (p.P - 1) * p.stride_h + p.dilation_h * (p.R - 1) + 1;
  const int64_t reach_w = (p.Q - 1) * p.stride_w + p.dilation_w * (p.S - 1) + 1;
  const bool border = p.pad_h || p.pad_w || reach_h > p.H || reach_w > p.W;
  o.gathers = p.R * p.S == 1 && p.stride_h * p.stride_w > 1 && !border;
  o.copies = border || o.gathers || p.input_stride_c != 1;
  o.height = o.gathers ? p.P : max64(p.H + 2 * p.pad_h, reach_h);
  o.width = o.gathers ? p.Q : max64(p.W + 2 * p.pad_w, reach_w);
  o.stride_h = o.gathers ? 1 : p.stride_h, o.stride_w = o.gathers ? 1 : p.stride_w;
  if (o.copies) {
    // Pixels of a tile a multiple of 4 KB apart would share one cache set.
    o.xw = o.stride_w > 1 && o.stride_w * p.C % 1024 == 0 ? p.C + 16 : p.C;
    o.xh = o.width * o.xw, o.xn = o.height * o.xh;
    o.image_bytes = round_up(o.xn * 4 + 64, 64);
  } else {
    o.xw = p.input_stride_w, o.xh = p.input_stride_h, o.xn = p.input_stride_n;
  }
  o.c = p.C / p.groups, o.k = p.K / p.groups;
  const bool joined = p.dilation_w == 1 && o.xw == o.c;  // a kernel row is one run
  o.runs_per_row = joined ? 1 : p.S;
  o.length = joined ? p.S * o.c : o.c;
  o.runs = p.R * o.runs_per_row;
  o.step_row = p.dilation_h * o.xh, o.step_run = p.dilation_w * o.xw;
  if (p.scale) o.block_bytes = round_up(kBlockBytes + kRows * p.C * 4, 64);
  o.depth = p.R * p.S * o.c;
  o.panels = ceil_div(o.k, kPackedPanel);
  return o;
}

// As many threads as the bound on the workspace has room for: the choice does not depend on them.
int64_t workers_for(const Plan& o) {
  const int64_t room = kPackedConv2dMaxWorkspace - o.image_bytes;
  return o.block_bytes ? max64(1, min64(num_threads(), room / o.block_bytes)) : num_threads();
}

// Several images are shared out whole, each thread with a copy and a block of its own: an image of 32 x 32 is too
// little to divide (128 of them by two threads, 3 channels to 16 by 3x3: 970 -> 660 us).
bool shares_images(const PackedConv2dParams& p, const Plan& o) {
  const int64_t threads = num_threads();
  return threads > 1 && (p.N % threads == 0 || p.N >= 4 * threads) &&
         threads * (o.image_bytes + o.block_bytes) <= kPackedConv2dMaxWorkspace;
}

// One tile: `first` and `second` rows of pixels, each `step` apart, from a0 and a1.
struct Tile {
  const float *a0, *a1;
  int64_t step;
  const float* b;  // [run][length][NV * N]
  int64_t ahead;   // from here to what the next panel will read: asked for during a panel's last tile
  const Plan* plan;
};

template <int M0, int M1, int NV>
FASTNN_INLINE void multiply(const Tile& t, Raw acc[M0 + M1][NV]) {
  const Plan& o = *t.plan;
  const float* b = t.b;
  const int64_t l1 = t.step, l3 = 3 * t.step, l5 = 5 * t.step;
  const int64_t rows = o.runs / o.runs_per_row;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t run = 0; run < o.runs_per_row; ++run) {
      const float* a0 = t.a0 + row * o.step_row + run * o.step_run;
      const float* a1 = t.a1 + row * o.step_row + run * o.step_run;
      const float* const end = a0 + o.length;
#pragma GCC unroll 1
      for (; a0 != end; ++a0, ++a1, b += NV * N) {
        Raw w[NV];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
          w[j] = V::load(b + j * N).v;
          __builtin_prefetch(b + t.ahead + j * N, 0, 2);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M0 + M1; ++i) {
          const float* const a = i < M0 ? a0 : a1;
          const int k = i < M0 ? i : i - M0;
          const int64_t offset = k == 0   ? 0
                                 : k == 1 ? l1
                                 : k == 2 ? 2 * l1
                                 : k == 3 ? l3
                                 : k == 4 ? 4 * l1
                                 : k == 5 ? l5
                                          : 2 * l3;
          const Raw x = V::set1(a[offset]).v;
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) acc[i][j] += x * w[j];
        }
      }
    }
}

struct Out {
  float *y0, *y1;
  const float *r0, *r1;  // residual or null
  int64_t y_step, r_step;
  const float* bias;  // [NV * N]
  int lanes;          // of the panel
  Clamp clamp;
};

template <int M0, int M1, int NV>
void tile(const Tile& t, const Out& out) {
  constexpr int kM = M0 + M1;
  Raw acc[kM][NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    const Raw bias = V::load(out.bias + j * N).v;
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) acc[i][j] = bias;
  }
  multiply<M0, M1, NV>(t, acc);
  const auto each = [&](const auto& store) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const int k = i < M0 ? i : i - M0;
      float* const y = (i < M0 ? out.y0 : out.y1) + k * out.y_step;
      const float* const r = out.r0 ? (i < M0 ? out.r0 : out.r1) + k * out.r_step : nullptr;
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) store(acc[i][j], y + j * N, r ? r + j * N : nullptr, j);
    }
  };
  if (out.lanes == NV * N) {
    if (out.r0)
      each([&](Raw v, float* y, const float* r, int)
               __attribute__((always_inline)) { V{out.clamp(v + V::load(r).v)}.store(y); });
    else each([&](Raw v, float* y, const float*, int) __attribute__((always_inline)) { V{out.clamp(v)}.store(y); });
    return;
  }
  each([&](Raw v, float* y, const float* r, int j) __attribute__((always_inline)) {
    const int lanes = int(max64(0, min64(N, out.lanes - j * N)));
    if (lanes == N) {
      V{out.clamp(r ? v + V::load(r).v : v)}.store(y);
    } else if (lanes > 0) {
      V{out.clamp(r ? v + V::load_n(r, lanes).v : v)}.store_n(y, lanes);
    }
  });
}

using TileFn = void (*)(const Tile&, const Out&);
template <int M0, int NV>
TileFn find_tile(int64_t first, int64_t second) {
  if constexpr (M0 == 0) {
    return nullptr;
  } else {
    if (first != M0) return find_tile<M0 - 1, NV>(first, second);
    if (second == 0) return tile<M0, 0, NV>;
    if (second == M0) return tile<M0, M0, NV>;
    if constexpr (M0 > 1) return tile<M0, M0 - 1, NV>;
    return nullptr;
  }
}

void copy(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + N <= count; i += N) V::load(from + i).store(to + i);
  if (i < count) V::load_n(from + i, count - i).store_n(to + i, count - i);
}

void copy_image(const PackedConv2dParams& p, const Plan& o, const float* x, float* to) {
  parallel_for(0, o.height, max64(1, (1 << 14) / (o.xh + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* at = to + row * o.xh;
      const int64_t h = o.gathers ? row * p.stride_h : row - p.pad_h;
      if (h < 0 || h >= p.H) {
        for (int64_t i = 0; i < o.xh; ++i) at[i] = 0;
        continue;
      }
      const int64_t pixels = o.gathers ? p.Q : p.W, edge = p.pad_w * o.xw;
      for (int64_t i = 0; i < edge; ++i) at[i] = 0;
      for (int64_t i = edge + pixels * o.xw; i < o.xh; ++i) at[i] = 0;
      at += edge;
      const float* from = x + h * p.input_stride_h;
      const int64_t step = o.gathers ? p.stride_w * p.input_stride_w : p.input_stride_w;
      if (p.input_stride_c == 1 && step == p.C && o.xw == p.C) {
        copy(from, pixels * p.C, at);
      } else if (p.input_stride_c == 1) {
        for (int64_t w = 0; w < pixels; ++w, at += o.xw) copy(from + w * step, p.C, at);
      } else if (p.C == 3 && o.xw == 3) {
        const float *c0 = from, *c1 = c0 + p.input_stride_c, *c2 = c1 + p.input_stride_c;
        for (int64_t w = 0; w < pixels; ++w, at += 3) {
          const int64_t i = w * step;
          at[0] = c0[i], at[1] = c1[i], at[2] = c2[i];
        }
      } else {
        for (int64_t w = 0; w < pixels; ++w, at += o.xw)
          for (int64_t c = 0; c < p.C; ++c) at[c] = from[w * step + c * p.input_stride_c];
      }
    }
  });
}

// to[pixel][c] = relu(scale * x + shift) for `count` pixels.
void normalise(const PackedConv2dParams& p, const float* x, int64_t xw, int64_t count, float* to) {
  const V zero = V::zero();
  for (int64_t i = 0; i < count; ++i, x += xw, to += p.C) {
    int64_t c = 0;
    for (; c + N <= p.C; c += N)
      max(zero, fma(V::load(x + c), V::load(p.scale + c), V::load(p.shift + c))).store(to + c);
    if (const int64_t left = p.C - c)
      max(zero, fma(V::load_n(x + c, left), V::load_n(p.scale + c, left), V::load_n(p.shift + c, left)))
          .store_n(to + c, left);
  }
}

// Pixels of an image as the tiles see them: rows of pixels equally far apart in input, output and residual.
struct Grid {
  int64_t rows, columns;
  int64_t tiles, size;  // tiles per row (or pair of rows), pixels of one tile per row
  bool pairs;           // a tile takes two rows
};

Grid make_grid(const PackedConv2dParams& p, const Plan& o) {
  Grid g{p.P, p.Q, 1, 0, false};
  const bool flat = p.R == 1 && p.S == 1 && o.stride_h == 1 && o.stride_w == 1 && o.xh == p.Q * o.xw &&
                    p.output_stride_h == p.Q * p.output_stride_w &&
                    (!p.residual || p.residual_stride_h == p.Q * p.residual_stride_w);
  if (flat) g.rows = 1, g.columns = p.P * p.Q;
  g.pairs = g.rows > 1 && g.columns <= kHalf;
  const int64_t most = g.pairs ? kHalf : kRows;
  g.tiles = ceil_div(g.columns, most);
  g.size = ceil_div(g.columns, g.tiles);
  return g;
}

// How the tiles of an image are shared out: blocks of pixels, or panels where pixels are few.
struct Cut {
  int64_t threads;
  int64_t tiles, block, blocks;  // tiles of an image, tiles of a block
  int64_t chunks;                // of panels
};

Cut make_cut(const PackedConv2dParams& p, const Plan& o, const Grid& g, int64_t threads) {
  const int64_t rows = g.pairs ? ceil_div(g.rows, 2) : g.rows, tiles = rows * g.tiles;
  // Tiles of a block read their input from L2 for every panel; a panel comes from L2 for every tile of the block.
  const int64_t tile_bytes = max64(1, g.size * (g.pairs ? 2 : 1) * o.stride_w * o.stride_h * p.C * 4);
  int64_t blocks = ceil_div(tiles, max64(1, kBlockBytes / tile_bytes)), chunks = 1;
  if (threads > 1 && blocks % threads) {
    if (tiles >= 4 * threads) blocks = round_up(blocks, threads);
    else chunks = min64(p.groups * o.panels, threads);
  }
  const int64_t block = ceil_div(tiles, blocks);  // even ones
  return {threads, tiles, block, ceil_div(tiles, block), chunks};
}

void run_image(const PackedConv2dParams& p, const Plan& o, const Grid& g, const Cut& cut, int64_t n, char* workspace) {
  const int64_t group_size = round_up(o.k, N) * o.depth, panels = p.groups * o.panels;
  const float* const bias = p.packed + p.groups * group_size;
  const float* x = p.input + n * p.input_stride_n;
  if (o.copies) {
    copy_image(p, o, x, reinterpret_cast<float*>(workspace));
    x = reinterpret_cast<const float*>(workspace);
  }
  float* const y = p.output + n * p.output_stride_n;
  const float* const residual = p.residual ? p.residual + n * p.residual_stride_n : nullptr;
  const int64_t tiles = cut.tiles, block = cut.block, chunks = cut.chunks;
  const int64_t tasks = cut.blocks * chunks, workers = min64(cut.threads, tasks);
  const auto run = [&](int64_t worker) {
    for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; ++task) {
      const int64_t t0 = task / chunks * block, t1 = min64(tiles, t0 + block);
      const int64_t first = panels * (task % chunks) / chunks, last = panels * (task % chunks + 1) / chunks;
      const float* from = x;
      if (p.scale) {
        float* const own = reinterpret_cast<float*>(workspace + o.image_bytes + worker * o.block_bytes);
        const int64_t column = t0 * g.size;
        normalise(p, x + column * o.xw, o.xw, min64(t1 * g.size, g.columns) - column, own);
        from = own - column * p.C;
      }
      const int64_t xw = p.scale ? p.C : o.xw;
      const int64_t panel_size = kPackedPanel * o.depth, next_panel = panel_size <= kAhead ? panel_size : kNear;
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t group = panel / o.panels, inside = panel % o.panels * kPackedPanel, k0 = group * o.k + inside;
        const int lanes = int(min64(kPackedPanel, o.k - inside));
        const float* const weight = p.packed + group * group_size + inside * o.depth;
        for (int64_t t = t0; t < t1; ++t) {
          const int64_t row = t / g.tiles * (g.pairs ? 2 : 1), column = t % g.tiles * g.size;
          const int64_t count = min64(g.size, g.columns - column);
          // The two groups of the tile: halves of a row, or the same columns of two rows.
          const bool lower = g.pairs && row + 1 < g.rows;
          const int64_t m0 = g.pairs ? count : ceil_div(count, 2), m1 = g.pairs ? (lower ? count : 0) : count - m0;
          const int64_t x_step = o.stride_w * xw;
          const float* const a0 = from + row * o.stride_h * o.xh + column * x_step + group * o.c;
          const float* const a1 = g.pairs ? (lower ? a0 + o.stride_h * o.xh : a0) : a0 + m0 * x_step;
          float* const y0 = y + row * p.output_stride_h + column * p.output_stride_w + k0;
          const int64_t y_second = g.pairs ? p.output_stride_h : m0 * p.output_stride_w;
          const float* const r0 =
              residual ? residual + row * p.residual_stride_h + column * p.residual_stride_w + k0 : nullptr;
          const int64_t r_second = g.pairs ? p.residual_stride_h : m0 * p.residual_stride_w;
          const int64_t ahead = t + 1 == t1 && panel + 1 < last ? next_panel : kNear;
          const Tile job{a0, a1, x_step, weight, ahead, &o};
          const Out out{y0,
                        y0 + y_second,
                        r0,
                        r0 + r_second,
                        p.output_stride_w,
                        p.residual_stride_w,
                        bias + panel * kPackedPanel,
                        lanes,
                        Clamp(p)};
          (lanes > N ? find_tile<kHalf, 2>(m0, m1) : find_tile<kHalf, 1>(m0, m1))(job, out);
        }
      }
    }
  };
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) run(worker);
  });
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t packed_direct_bytes(const PackedConv2dParams& p) {
  const int64_t k = p.K / p.groups, depth = p.R * p.S * (p.C / p.groups);
  return p.groups * (round_up(k, N) * depth + round_up(k, kPackedPanel)) * 4 + 64;
}

// Panels of a group's channels [group][panel][r][s][c][lane] (a last panel of one vector has half the lanes), then the
// bias of all panels.
void packed_direct_pack(const PackedConv2dParams& p) {
  const int64_t c = p.C / p.groups, k = p.K / p.groups, panels = ceil_div(k, kPackedPanel);
  float* to = p.packed;
  float* bias = p.packed + p.groups * round_up(k, N) * p.R * p.S * c;
  for (int64_t panel = 0; panel < p.groups * panels; ++panel) {
    const int64_t inside = panel % panels * kPackedPanel, k0 = panel / panels * k + inside,
                  lanes = min64(kPackedPanel, k - inside), width = lanes > N ? kPackedPanel : N;
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s)
        for (int64_t i = 0; i < c; ++i, to += width)
          for (int64_t l = 0; l < width; ++l)
            to[l] = l < lanes ? p.weight[(k0 + l) * p.weight_stride_k + i * p.weight_stride_c + r * p.weight_stride_r +
                                         s * p.weight_stride_s]
                              : 0.f;
    for (int64_t l = 0; l < kPackedPanel; ++l) *bias++ = p.bias && l < lanes ? p.bias[k0 + l] : 0.f;
  }
}

int64_t packed_direct_workspace(const PackedConv2dParams& p) {
  const Plan o = make_plan(p);
  if (shares_images(p, o)) return num_threads() * (o.image_bytes + o.block_bytes);
  return o.image_bytes + o.block_bytes * workers_for(o);
}

void packed_direct_run(const PackedConv2dParams& p) {
  const Plan o = make_plan(p);
  const Grid g = make_grid(p, o);
  char* const workspace = static_cast<char*>(p.workspace);
  if (!shares_images(p, o)) {
    const Cut cut = make_cut(p, o, g, workers_for(o));
    for (int64_t n = 0; n < p.N; ++n) run_image(p, o, g, cut, n, workspace);
    return;
  }
  const Cut cut = make_cut(p, o, g, 1);
  const int64_t workers = num_threads();
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t n = p.N * worker / workers; n < p.N * (worker + 1) / workers; ++n)
        run_image(p, o, g, cut, n, workspace + worker * (o.image_bytes + o.block_bytes));
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
