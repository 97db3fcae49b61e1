// Pointwise convolution in many small groups of dense NHWC images: all groups at once, their results side by side in
// the lanes. Products would write a few lanes of every pixel, group by group.
#include "../../parallel.h"
#include "conv2d_gemm.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

using V = Vec<float>;
constexpr int64_t kMaxVectors = 128;
constexpr int kMaxSources = 8;

// Rows of as many pixels as have results for whole vectors.
struct Rows {
  int64_t pixels, in, out, vectors;  // of a row
  int sources;                       // vectors of the input that one of the results is picked from
};
// The first group of a vector of results, and one past the last.
int64_t first_group(const ConvProblem& d, int64_t vector) { return vector * V::N / d.k; }
int64_t last_group(const ConvProblem& d, int64_t vector) { return ceil_div((vector + 1) * V::N, d.k); }

Rows rows_of(const ConvProblem& d, int64_t groups) {
  Rows r{};
  const int64_t k = d.k * groups;
  r.pixels = V::N / min64(V::N, k & -k);
  r.in = r.pixels * d.c * groups, r.out = r.pixels * k, r.vectors = r.out / V::N;
  int64_t most = 0;
  for (int64_t v = 0; v < min64(r.vectors, d.k); ++v) most = max64(most, last_group(d, v) - first_group(d, v));
  r.sources = 1;
  while (r.sources <= kMaxSources && r.sources * V::N < most * d.c) r.sources *= 2;
  return r;
}

// Of every vector of a row: for each lane where its group's first channel lies, the bias, a vector of weights for each
// channel of a group.
int64_t table_floats(const ConvProblem& d) { return (d.c + 2) * V::N; }
void fill_table(const ConvProblem& d, int64_t groups, int64_t weight_step, const Rows& r, float* table) {
  for (int64_t v = 0; v < r.vectors; ++v, table += table_floats(d)) {
    const int64_t first = first_group(d, v);
    for (int64_t lane = 0; lane < V::N; ++lane) {
      const int64_t at = v * V::N + lane, group = at / d.k, k = at - group * d.k, own = group % groups;
      table[lane] = float_of(uint32_t((group - first) * d.c));
      table[V::N + lane] = d.bias ? static_cast<const float*>(d.bias)[own * d.k + k] : 0.f;
      const float* const w = static_cast<const float*>(d.weight) + own * weight_step + k * d.wk;
      for (int64_t c = 0; c < d.c; ++c) table[(2 + c) * V::N + lane] = w[c * d.wc];
    }
  }
}

// Lane i: lane at[i] of S vectors one behind the other.
template <int S>
FASTNN_INLINE V picked(const V* from, i32v at) {
  if constexpr (S == 1) return {__builtin_shuffle(from[0].v, at)};
  f32v r = __builtin_shuffle(from[0].v, from[1].v, at);
#pragma GCC unroll 4
  for (int s = 2; s < S; s += 2) r = at >= s * V::N ? __builtin_shuffle(from[s].v, from[s + 1].v, at) : r;
  return {r};
}

// One vector of the results of R rows; or of one, with `in_left` and `out_left` numbers left of the tensors.
template <int S, int R, bool FULL>
FASTNN_INLINE void sums(const float* table, int64_t channels, const float* x, int64_t in, float* y, int64_t out,
                        int64_t in_left, int64_t out_left) {
  V from[R][S], acc[R];
  i32v at = __builtin_bit_cast(i32v, V::load(table).v);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    acc[r] = V::load(table + V::N);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const float* const here = x + r * in + s * V::N;
      from[r][s] = FULL ? V::load(here) : load_upto(here, in_left - s * V::N);
    }
  }
  table += 2 * V::N;
  for (int64_t c = 0; c < channels; ++c, table += V::N) {
    const V w = V::load(table);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r] = fma(picked<S>(from[r], at), w, acc[r]);
    at += 1;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (FULL) acc[r].store(y + r * out);
    else store_upto(acc[r], y, out_left);
  }
}

template <int S>
void run_rows(const ConvProblem& d, const Rows& given, const float* table, int64_t total_in, int64_t total_out,
              int64_t begin, int64_t end) {
  constexpr int R = S <= 2 ? 4 : S == 4 ? 2 : 1;
  const Rows rows = given;  // which no store can change
  const int64_t channels = d.c, floats = table_floats(d);
  const float* const x = static_cast<const float*>(d.x);
  float* const y = static_cast<float*>(d.y);
  for (int64_t v = 0; v < rows.vectors; ++v, table += floats) {
    const int64_t from = first_group(d, v) * channels, to = v * V::N;
    // Of these rows whole vectors are read and written.
    const int64_t readable = total_in - from - S * V::N, whole = readable < 0 ? 0 : readable / rows.in + 1;
    const int64_t safe = min64(end, min64(whole, total_out / rows.out));
    int64_t r = begin;
    for (; r + R <= safe; r += R)
      sums<S, R, true>(table, channels, x + r * rows.in + from, rows.in, y + r * rows.out + to, rows.out, 0, 0);
    for (; r < end; ++r)
      sums<S, 1, false>(table, channels, x + r * rows.in + from, 0, y + r * rows.out + to, 0,
                        total_in - r * rows.in - from, total_out - r * rows.out - to);
  }
}

// Larger groups take up to x1.5 (AVX-512) or x3 (AVX2) of the time of a product each; the smaller, x0.1 to x1.0.
bool in_lanes(const ConvProblem& d, int64_t groups) {
  const bool small = d.c <= V::N && d.k <= 16 && d.c * d.k <= 8 * V::N;
  if (kVecBytes < 32 || !small || !is_pointwise(d) || !groups_dense(d, groups)) return false;
  const Rows r = rows_of(d, groups);
  return r.vectors <= kMaxVectors && r.sources <= kMaxSources && d.n * d.q >= 4 * r.pixels;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

bool small_groups_takes(const ConvProblem& problem, int64_t groups) {
  const ConvProblem d = flatten_pointwise(problem);
  return in_lanes(d, groups) || thin_groups_takes(d, groups);
}

int64_t small_groups_workspace(const ConvProblem& problem, int64_t groups) {
  const ConvProblem d = flatten_pointwise(problem);
  if (!in_lanes(d, groups)) return thin_groups_workspace(d, groups);
  return rows_of(d, groups).vectors * table_floats(d) * int64_t(sizeof(float));
}

void small_groups_forward(const ConvProblem& problem, int64_t groups, int64_t weight_step, char* workspace) {
  const ConvProblem d = flatten_pointwise(problem);
  if (!in_lanes(d, groups)) return thin_groups_forward(d, groups, weight_step, workspace);
  const Rows rows = rows_of(d, groups);
  float* const table = reinterpret_cast<float*>(workspace);
  fill_table(d, groups, weight_step, rows, table);
  const int64_t pixels = d.n * d.q, count = ceil_div(pixels, rows.pixels);
  const int64_t total_in = pixels * d.c * groups, total_out = pixels * d.k * groups;
  const int64_t chunk = max64(4, 8192 / (rows.in + rows.out) / 4 * 4);  // which stays in L1 for all vectors of a row
  const int64_t work = chunk * rows.vectors * (d.c + 2) * rows.sources;
  parallel_for(0, ceil_div(count, chunk), max64(1, (1 << 13) / work), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * chunk, last = min64(count, first + chunk);
      switch (rows.sources) {
        case 1: run_rows<1>(d, rows, table, total_in, total_out, first, last); break;
        case 2: run_rows<2>(d, rows, table, total_in, total_out, first, last); break;
        case 4: run_rows<4>(d, rows, table, total_in, total_out, first, last); break;
        default: run_rows<8>(d, rows, table, total_in, total_out, first, last);
      }
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
