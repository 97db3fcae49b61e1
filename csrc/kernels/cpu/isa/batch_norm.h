// What the two batch-norm passes share: parameters of either dtype, blocks of a channel, tiles of rows.
#pragma once
#include "../../batch_norm.h"
#include "../../parallel.h"
#include "../machine.h"
#include "vectors.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// ---- parameters, one per channel -----------------------------------------------------------------------------------

FASTNN_INLINE double read_param(const void* p, DType dtype, int64_t i, double otherwise) {
  if (!p) return otherwise;
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return to_acc(static_cast<const bf16*>(p)[i]);
    case DType::f16: return to_acc(static_cast<const f16*>(p)[i]);
  }
  return otherwise;
}

FASTNN_INLINE void write_param(void* p, DType dtype, int64_t i, double value) {
  if (!p) return;
  switch (dtype) {
    case DType::f32: static_cast<float*>(p)[i] = float(value); return;
    case DType::f64: static_cast<double*>(p)[i] = value; return;
    case DType::bf16: static_cast<bf16*>(p)[i] = from_acc<bf16>(float(value)); return;
    case DType::f16: static_cast<f16*>(p)[i] = from_acc<f16>(float(value)); return;
  }
}

// Neighbouring values as float64: D is double for one of them or f64v for kDoubles.
constexpr int kDoubles = sizeof(f64v) / sizeof(double);
using f32_half = float __attribute__((vector_size(kVecBytes / 2)));
template <class D, class S>
FASTNN_INLINE D load_doubles(const S* p) {
  D v;
  if constexpr (sizeof(D) == sizeof(double)) {
    v = double(to_acc(*p));
  } else if constexpr (__is_same(S, double)) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    f32_half narrow;
    if constexpr (__is_same(S, float)) __builtin_memcpy(&narrow, p, sizeof(narrow));
    else
      for (int i = 0; i < kDoubles; ++i) narrow[i] = to_acc(p[i]);
    v = __builtin_convertvector(narrow, D);
  }
  return v;
}
template <class S, class D>
FASTNN_INLINE void store_doubles(D v, S* p) {
  if constexpr (sizeof(D) == sizeof(double)) {
    *p = from_acc<S>(acc_t<S>(v));
  } else if constexpr (__is_same(S, double)) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else {
    const f32_half narrow = __builtin_convertvector(v, f32_half);
    if constexpr (__is_same(S, float)) __builtin_memcpy(p, &narrow, sizeof(narrow));
    else
      for (int i = 0; i < kDoubles; ++i) p[i] = from_acc<S>(narrow[i]);
  }
}

// ---- one channel of [batch, channels, inner] -----------------------------------------------------------------------

// Elements whose sums stay in the accumulation type; blocks are joined in float64. 16 KB of float32: L1 keeps them.
constexpr int64_t kBlock = 4096;
// Elements below which a loop is not worth a second thread.
constexpr int64_t kParallelElements = 1 << 15;

// Calls f(offset, rows, length): `rows` runs of `length` elements, one plane (stride elements) apart.
template <class F>
FASTNN_INLINE void for_blocks(int64_t batch, int64_t inner, int64_t stride, const F& f) {
  if (inner >= kBlock) {
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t i = 0; i < inner; i += kBlock) f(n * stride + i, int64_t(1), min64(kBlock, inner - i));
  } else {
    const int64_t group = kBlock / inner;
    for (int64_t n = 0; n < batch; n += group) f(n * stride, min64(group, batch - n), inner);
  }
}

// Channels taken together: none waits for another's sums, and memory is read in longer runs. Their elements stay in L1,
// or in L2 where short rows of many images would be read a few cache lines at a time; as many as can be where not even
// one channel's would stay there. In sixteens, whose sums are joined at once.
constexpr int64_t kGroup = 64;
FASTNN_INLINE int64_t channels_together(const BatchNormParams& p) {
  const int64_t elements = p.batch * p.inner;
  if (p.inner > 1024) return 1;
  if (elements > 1 << 14 || (p.inner <= 64 && p.batch >= 32)) return kGroup;
  const int64_t kept = p.inner <= 64 ? 1 << 14 : p.inner <= 576 && p.batch >= 8 ? 1 << 15 : kBlock;
  const int64_t count = min64(kGroup, kept / elements);
  return count > 16 ? count / 16 * 16 : max64(1, count);
}

// While planes are written the caches fetch, so many elements ahead, those of the next group of channels: a group's few
// short planes of every image are no pattern that the hardware follows (backward 4x512x28x28 0.8 of the time, but
// 4x1024x14x14 1.1). 0: not at all; tensors of 1 MB, which the caches keep, took 1.06 of the time (on Emerald Rapids,
// of 3 MB 1.1).
FASTNN_INLINE int64_t fetched_ahead(const BatchNormParams& p) {
  const int64_t together = channels_together(p);
  const bool far = p.batch > 2 && p.batch * p.channels * p.inner > (intel() ? 1 << 21 : 1 << 19);
  return far && 128 <= p.inner && p.inner <= 1024 && together < p.channels ? together * p.inner : 0;
}

// Rows of channels that together are whole cache lines of float32; 0 where that takes more than kRepeated elements.
constexpr int64_t kRepeated = 2048;
FASTNN_INLINE int64_t rows_in_lines(int64_t channels) {
  const int64_t rows = 16 / min64(16, channels & -channels);
  return rows == 1 || rows * channels <= kRepeated ? rows : 0;
}

// Whether planes or rows of channels written to `to` are streamed: of more than `elements` they leave the caches
// anyway. In training (forward 3 << 20) that takes 0.6-0.8 of the time on one thread, 0.8-1 on two; backward, with a
// third tensor, 0.67-0.79 on one thread from 3 << 19 on (6 to 12 MB).
FASTNN_INLINE bool streams(const BatchNormParams& p, const void* to, int64_t elements) {
  const bool lines = p.inner == 1 ? rows_in_lines(p.channels) > 0 : p.inner % 16 == 0;
  return kVecBytes >= 32 && p.dtype == DType::f32 && lines && uintptr_t(to) % 64 == 0 &&
         p.batch * p.channels * p.inner > elements;
}

// In evaluation two threads are slower with 12 MB and, as the neighbours have it, with 20 to 24 (x0.77-0.99 of torch,
// not streamed x1.02-1.33).
FASTNN_INLINE bool streams_evaluation(const BatchNormParams& p) {
  return streams(p, p.output, num_threads() > 1 ? 6 << 20 : 4 << 20);
}

// Calls f(offset, length, coefficients) for the rows [begin, end), several at once: as many as end with a cache line
// and fill half of kRepeated, for which every array of `sources` is repeated. Row by row the rest of each would be a
// masked vector, and the vectors of most rows would straddle two lines (4x104x112x112, evaluation, 1491 -> 722 us).
template <int K, class A, class F>
FASTNN_INLINE void for_rows_together(int64_t channels, int64_t begin, int64_t end, const A* const (&sources)[K],
                                     const F& f) {
  const int64_t lines = max64(1, rows_in_lines(channels)), wanted = max64(lines, kRepeated / 2 / channels);
  const int64_t together = min64(wanted, (end - begin) / 4) / lines * lines;
  A repeated[K][kRepeated];
  const A* coefficients[K];
  for (int k = 0; k < K; ++k) {
    coefficients[k] = sources[k];
    if (together < 2 || !sources[k]) continue;
    coefficients[k] = repeated[k];
    for (int64_t r = 0; r < together; ++r)
      __builtin_memcpy(repeated[k] + r * channels, sources[k], size_t(channels) * sizeof(A));
  }
  const int64_t step = max64(1, together);
  for (int64_t row = begin; row < end; row += step) f(row * channels, min64(step, end - row) * channels, coefficients);
}

// Calls f(begin, end, stream) in parallel for rows that begin with a cache line where for_rows_together takes them so.
// Too few for that, as the last of many threads may have, are not streamed: most of them begin within a vector.
template <class F>
FASTNN_INLINE void parallel_rows(const BatchNormParams& p, bool stream, const F& f) {
  const int64_t lines = max64(1, rows_in_lines(p.channels));
  parallel_for(0, ceil_div(p.batch, lines), ceil_div(kParallelElements, lines * p.channels),
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * lines, last = min64(end * lines, p.batch);
                 f(first, last, stream && (lines == 1 || last - first >= 4 * lines));
               });
}

// Calls f(first, width) for groups of up to kJoined channels, whose `chunks` partial sums are joined.
constexpr int64_t kJoined = 16;
template <class F>
FASTNN_INLINE void for_channel_groups(const BatchNormParams& p, int64_t chunks, const F& f) {
  const int64_t grain = ceil_div(kParallelElements, kJoined * (4 * chunks + 32));
  parallel_for(0, ceil_div(p.channels, kJoined), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kJoined; i < min64(end * kJoined, p.channels); i += kJoined)
      f(i, min64(kJoined, p.channels - i));
  });
}

// Elements of a row that starts `begin` elements into its tensor up to the first whole vector of memory. Where one
// vector is one cache line, the others would straddle two: 14x14 planes took 1.15 of the time (5x5 planes 0.85).
template <int N>
FASTNN_INLINE int64_t to_whole_vector(int64_t begin, int64_t length) {
  return kVecBytes == 64 && length >= 2 * N ? -begin & (N - 1) : 0;
}

// Calls f(offset, lanes, k) along a row, k in 0..3 cycling over independent accumulators.
template <int N, class F>
FASTNN_INLINE void for_lanes(int64_t begin, int64_t length, const F& f) {
  int64_t i = to_whole_vector<N>(begin, length);
  if (i) f(0, int(i), 3);
  for (; i + 4 * N <= length; i += 4 * N) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) f(i + k * N, N, k);
  }
  if (i + N <= length) {
    f(i, N, 0), i += N;
    if (i + N <= length) {
      f(i, N, 1), i += N;
      if (i + N <= length) f(i, N, 2), i += N;
    }
  }
  if (i < length) f(i, int(length - i), 3);
}

// Rows so short that neighbouring channels hide the latency of a sum: one accumulator for each.
template <int N>
FASTNN_INLINE bool is_short(int64_t length) {
  return length < 8 * N;
}

// Whether the vectors of neighbouring short rows are whole ones of memory, those between two rows too.
template <int N>
FASTNN_INLINE bool is_joined(int64_t length) {
  return kVecBytes == 64 && 2 * N <= length && is_short<N>(length);
}

// `count` such rows, one behind the other. Calls row(c, vectors), and vectors(f, between) calls f(offset, lanes) for
// the vectors of row c alone and between(offset, left) for one whose first `left` lanes end row c, the others beginning
// the next: 49 vectors for 16 planes of 7x7, which one by one take 72.
template <int N, class F>
FASTNN_INLINE void for_joined(int64_t begin, int64_t length, int64_t count, const F& row) {
  int64_t i = to_whole_vector<N>(begin, length), start = 0;
  for (int64_t c = 0; c < count; ++c, start += length) {
    row(c, [&](const auto& f, const auto& between) __attribute__((always_inline)) {
      if (c == 0 && i) f(0, int(i));
      for (; i + N <= start + length; i += N) f(i, N);
      const int64_t left = start + length - i;
      if (left == 0) return;
      if (c + 1 < count) between(i, left);
      else f(i, int(left));
      i += N;
    });
  }
}

// Calls f(offset, lanes) along a row.
template <int N, class F>
FASTNN_INLINE void for_short(int64_t begin, int64_t length, const F& f) {
  int64_t i = to_whole_vector<N>(begin, length);
  if (i) f(0, int(i));
  for (; i + N <= length; i += N) f(i, N);
  if (i < length) f(i, int(length - i));
}

// Calls out(c, the sum of v[c]'s lanes), c < count. Overwrites v. The order of the sum depends on how many channels the
// shape takes together, not on how many are left for the last group: that depends on the threads.
template <class V, class Out>
FASTNN_INLINE void sum_lanes(const BatchNormParams& p, V (&v)[kGroup], int64_t count, const Out& out) {
  if (channels_together(p) < 8) {
    for (int64_t c = 0; c < count; ++c) out(c, double(reduce_add(v[c])));
    return;
  }
  for (int64_t first = 0; first < count; first += V::N) {
    for (int64_t c = count; c < first + V::N; ++c) v[c] = V::zero();
    decltype(reduce_add(v[0])) sums[V::N];
    sum_rows(v + first).store(sums);
    for (int64_t c = first; c < min64(count, first + V::N); ++c) out(c, double(sums[c - first]));
  }
}

// Adds the sum of v[c]'s lanes to to[c], c < count; to has kGroup elements, those behind the last may be any.
template <class V>
FASTNN_INLINE void add_lanes(const BatchNormParams& p, V (&v)[kGroup], int64_t count, double (&to)[kGroup]) {
  if (channels_together(p) < 8) return sum_lanes(p, v, count, [&](int64_t c, double sum) { to[c] += sum; });
  for (int64_t first = 0; first < count; first += V::N) {
    for (int64_t c = count; c < first + V::N; ++c) v[c] = V::zero();
    decltype(reduce_add(v[0])) sums[V::N];
    sum_rows(v + first).store(sums);
    for (int i = 0; i < V::N; i += kDoubles)
      store_doubles(load_doubles<f64v>(to + first + i) + load_doubles<f64v>(sums + i), to + first + i);
  }
}

template <class S, class A = acc_t<S>>
FASTNN_INLINE Vec<A> load_lanes(const S* p, int lanes, A fill = A(0)) {
  return load_some(p, lanes, fill);
}
// kStream: past the caches, where they are whole and aligned vectors of float32.
template <bool kStream = false, class S, class A>
FASTNN_INLINE void store_lanes(Vec<A> v, S* p, int lanes) {
  if constexpr (kStream)
    if (lanes == Vec<A>::N) return stream(v, p);
  store_some(v, p, lanes);
}

template <class V>
FASTNN_INLINE V join_four(const V* a) {
  return (a[0] + a[1]) + (a[2] + a[3]);
}

// ---- rows of channels ----------------------------------------------------------------------------------------------

// Calls f.template operator()<T, U>(channel, lanes) for tiles of T vectors of channels, U rows at a time.
template <int N, class F>
FASTNN_INLINE void for_tiles(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 4 * N <= channels; c += 4 * N) f.template operator()<4, 1>(c, N);
  for (; c < channels; c += N) f.template operator()<1, 4>(c, int(min64(N, channels - c)));
}

// Adds f(row, vector index) into sums[K][T], rows [0, rows): U independent accumulators per vector, joined at the end.
template <int K, int T, int U, class V, class F>
FASTNN_INLINE void accumulate_rows(int64_t rows, V (&sums)[K][T], const F& f) {
  V acc[U][K][T];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) acc[u][k][t] = V::zero();
  int64_t r = 0;
  for (; r + U <= rows; r += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) f(r + u, t, [&](int k, V v) { acc[u][k][t] = acc[u][k][t] + v; });
  }
  for (; r < rows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) f(r, t, [&](int k, V v) { acc[0][k][t] = acc[0][k][t] + v; });
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      V s = acc[0][k][t];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) s = s + acc[u][k][t];
      sums[k][t] = s;
    }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
