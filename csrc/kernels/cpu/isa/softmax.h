// What softmax's forward and backward share: which rows are worked on together.
#pragma once
#include "../../parallel.h"
#include "../../softmax.h"
#include "columns.h"
#include "rows.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

// ---- a few columns, classes side by side ----------------------------------------------------------------------------

// Columns that fill no whole vectors: so many classes are taken for one row of columns that it does, 16 classes of 17
// columns for 17 vectors, which class by class are 32. 1: not worth it where they nearly fill them, in tiles.
constexpr int64_t kFewColumns = 64;
template <class A>
FASTNN_INLINE int64_t classes_abreast(const SoftmaxParams& p) {
  constexpr int64_t N = Vec<A>::N;
  const int64_t count = N / min64(N, p.inner & -p.inner), idle = round_up(p.inner, N) - p.inner;
  const bool worth = 4 * idle >= N || (idle > 0 && tile_width<A>(p.classes) == 0);
  return worth && N < p.inner && p.inner <= kFewColumns && 2 * count <= p.classes ? count : 1;
}

// One value per column and class abreast; a vector more may be touched.
template <class A>
struct Abreast {
  using V = Vec<A>;
  A lane[(kFewColumns + 1) * V::N];
  int64_t inner, count, width;

  FASTNN_VEC_FN Abreast(int64_t inner, int64_t count, A fill) : inner(inner), count(count), width(inner * count) {
    for (int64_t i = 0; i <= width; i += V::N) V::set1(fill).store(lane + i);
  }
  // Every lane becomes the reduction of its column.
  template <class Op>
  FASTNN_VEC_FN void join(const Op& op) {
    A joined[kFewColumns + V::N];
    for (int64_t i = 0; i < inner; i += V::N) {
      V v = V::load(lane + i);
      for (int64_t k = 1; k < count; ++k) v = op(v, V::load(lane + k * inner + i));
      v.store(joined + i);
    }
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < inner; i += V::N) V::load(joined + i).store(lane + k * inner + i);
  }
  // Calls f(offset, length) for every row of the n classes.
  template <class F>
  FASTNN_VEC_FN void for_rows(int64_t n, const F& f) const {
    for (int64_t at = 0; at < n * inner; at += width) f(at, min64(width, n * inner - at));
  }
};

// ---- the input cut into calls ---------------------------------------------------------------------------------------

// Covers the input with calls of several(offset, n) for n elements of rows that share vectors, groups(offset, rows) for
// short rows, N at once, rows(offset, rows) for long ones, row(offset, n, step) for a few that take turns,
// abreast(offset, count) for a few columns with `count` classes side by side, or columns(offset, width) for a strip of
// `width` neighbouring columns.
template <class A, class Several, class Groups, class Rows, class Row, class Abreast, class Columns>
void for_rows(const SoftmaxParams& p, int64_t width, const Several& several, const Groups& groups, const Rows& rows,
              const Row& row, const Abreast& abreast, const Columns& columns) {
  constexpr int N = Vec<A>::N;
  constexpr int64_t kGrainElements = 1 << 13, kFewRows = 4;
  const int64_t grain = max64(1, kGrainElements / max64(1, p.classes));
  if (p.inner == 1 && 2 * p.classes <= N) {
    parallel_for(0, p.outer, grain,
                 [&](int64_t begin, int64_t end) { several(begin * p.classes, (end - begin) * p.classes); });
  } else if (p.inner == 1 && p.classes <= kGroupClasses && (p.classes <= N || p.outer > kFewRows)) {
    parallel_for(0, ceil_div(p.outer, N), ceil_div(grain, N), [&](int64_t begin, int64_t end) {
      groups(begin * N * p.classes, min64(end * N, p.outer) - begin * N);
    });
  } else if (kMaxAhead && p.inner == 1) {
    parallel_for(0, p.outer, grain, [&](int64_t begin, int64_t end) { rows(begin * p.classes, end - begin); });
  } else if (p.inner <= N) {
    const int64_t n = p.classes * p.inner;
    const int step = turns<A>(p.inner);
    parallel_for(0, p.outer, ceil_div(grain, p.inner), [&](int64_t begin, int64_t end) {
      if (step == N) {
        for (int64_t r = begin; r < end; ++r) row(r * n, n, N);
      } else {
        for (int64_t r = begin; r < end; ++r) row(r * n, n, step);
      }
    });
  } else if (const int64_t count = classes_abreast<A>(p); count > 1) {
    parallel_for(0, p.outer, ceil_div(grain, p.inner), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) abreast(i * p.classes * p.inner, count);
    });
  } else {
    const int64_t strips = ceil_div(p.inner, width);
    parallel_for(0, p.outer * strips, max64(1, grain / width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % strips * width;
        columns(i / strips * p.classes * p.inner + column, min64(width, p.inner - column));
      }
    });
  }
}

}  // namespace
}  // namespace fastnn::cpu::FASTNN_ISA_NS
