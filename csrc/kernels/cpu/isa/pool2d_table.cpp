// Pooling of contiguous planes with any windows whose sizes fit small tables: adaptive windows of unequal sizes,
// strides the row kernels have no shuffle for. Rows are reduced (or added up) by vectors of neighbouring columns; a
// table says which columns each window has, or which windows each column, and one lookup serves a vector of them.
#include "../../parallel.h"
#include "pool2d_lanes.h"
#include "pool2d_paths.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kGrain = 1 << 14;  // input elements per thread at least
constexpr int64_t kLongest = 1024;   // rows or columns of a plane, in and out
constexpr int64_t kTable = 4096;     // entries of a table
constexpr int64_t kRing = 8192;      // elements of the rows a backward keeps

// ---- tables --------------------------------------------------------------------------------------------------------

// Windows of an axis, without the divisions.
struct Spans {
  int32_t first[kLongest], begin[kLongest], end[kLongest], count[kLongest];
  Spans(const Axis& a, bool include_pad) {
    for (int64_t o = 0; o < a.out; ++o) {
      first[o] = int32_t(a.first(o));
      begin[o] = int32_t(a.begin(o));
      end[o] = int32_t(a.end(o));
      count[o] = int32_t(a.count(o, include_pad));
    }
  }
};

template <class A>
FASTNN_INLINE int64_t pitch_of(int64_t n) {
  return round_up(n, Vec<A>::N);
}

// at[k * pitch + i]: where in a buffered row the k-th thing belonging to i lies.
template <class A>
struct Table {
  using Lane = typename IntLane<A>::type;
  int64_t depth = 0, pitch;
  bool narrow;  // the buffered row is at most two vectors
  alignas(kVecBytes) Lane at[kTable];
  Lane begin[kLongest + Vec<A>::N];  // the first valid tap of each window

  Table(int64_t n, int64_t row) : pitch(pitch_of<A>(n)), narrow(row <= 2 * Vec<A>::N) {}
  FASTNN_VEC_FN typename Vec<A>::Int load(int64_t k, int64_t i) const {
    typename Vec<A>::Int v;
    __builtin_memcpy(&v, at + k * pitch + i, sizeof(v));
    return v;
  }
};

// Tap k of window o, counted from its first valid one. Beyond
// the last: that one again, or (kNone) the slot after the row.
template <bool kNone, class A>
void fill_taps(Table<A>& t, const Axis& w, const Spans& s) {
  for (int64_t o = 0; o < w.out; ++o) t.depth = max64(t.depth, s.end[o] - s.begin[o]);
  for (int64_t k = 0; k < t.depth; ++k)
    for (int64_t o = 0; o < t.pitch; ++o) {
      const int64_t i = min64(o, w.out - 1), tap = s.begin[i] + k;
      const int64_t column = s.first[i] + min64(tap, s.end[i] - 1) * w.dilation;
      t.at[k * t.pitch + o] = kNone && tap >= s.end[i] ? w.in : column;
    }
  for (int64_t o = 0; o < t.pitch; ++o) t.begin[o] = s.begin[min64(o, w.out - 1)];
}

// Window k of those that cover column i, or the slot after the last window.
template <class A>
void fill_covers(Table<A>& t, const Axis& w) {
  int32_t low[kLongest], high[kLongest];
  for (int64_t i = 0; i < w.in; ++i) {
    low[i] = int32_t(w.low(i)), high[i] = int32_t(w.high(i));
    t.depth = max64(t.depth, high[i] - low[i]);
  }
  for (int64_t k = 0; k < t.depth; ++k)
    for (int64_t i = 0; i < t.pitch; ++i) t.at[k * t.pitch + i] = i < w.in && low[i] + k < high[i] ? low[i] + k : w.out;
}

// row[at] for every lane, as bits.
template <class A>
FASTNN_INLINE typename Vec<A>::Int lookup_bits(const void* row, typename Vec<A>::Int at, [[maybe_unused]] bool narrow) {
  using Int = typename Vec<A>::Int;
#if defined(__AVX512F__)
  const char* const bytes = static_cast<const char*>(row);
  if (narrow) {
    const __m512i a = _mm512_loadu_si512(bytes), b = _mm512_loadu_si512(bytes + 64);
    if constexpr (sizeof(A) == 4) return (Int)_mm512_permutex2var_epi32(a, (__m512i)at, b);
    else return (Int)_mm512_permutex2var_epi64(a, (__m512i)at, b);
  }
  if constexpr (sizeof(A) == 4) return (Int)_mm512_i32gather_epi32((__m512i)at, row, 4);
  else return (Int)_mm512_i64gather_epi64((__m512i)at, row, 8);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Int)_mm256_i32gather_epi32(static_cast<const int*>(row), (__m256i)at, 4);
  else return (Int)_mm256_i64gather_epi64(static_cast<const long long*>(row), (__m256i)at, 8);
#else
  Int v{};
  for (int i = 0; i < Vec<A>::N; ++i) {
    typename IntLane<A>::type lane;
    __builtin_memcpy(&lane, static_cast<const char*>(row) + int64_t(at[i]) * int64_t(sizeof(lane)), sizeof(lane));
    v[i] = lane;
  }
  return v;
#endif
}
template <class A>
FASTNN_INLINE Vec<A> lookup(const A* row, typename Vec<A>::Int at, bool narrow) {
  return {(typename Vec<A>::Raw)lookup_bits<A>(row, at, narrow)};
}

// ---- forward -------------------------------------------------------------------------------------------------------

// The maximum by torch's rule (the first, but the last NaN), one window at a time.
template <class S, class O>
void exact_max_row(const Pool2dParams& p, const Spans& w, const S* x, S* y, O* offsets, int64_t top, int64_t i0,
                   int64_t i1) {
  using A = acc_t<S>;
  for (int64_t ow = 0; ow < p.w.out; ++ow) {
    A best = kLowest<A>;
    int64_t offset = i0 * p.w.kernel + w.begin[ow];
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = w.begin[ow]; j < w.end[ow]; ++j) {
        const A v = to_acc(x[(top + i * p.h.dilation) * p.w.in + w.first[ow] + j * p.w.dilation]);
        if (v > best || v != v) best = v, offset = i * p.w.kernel + j;
      }
    y[ow] = from_acc<S>(best);
    if (offsets) offsets[ow] = O(offset);
  }
}

// Columns first, each keeping the first row of its maximum;
// then the columns of a window: of equal values the upper wins.
template <bool kOffsets, class S, class O>
void max_row(const Pool2dParams& p, const Spans& w, const Table<acc_t<S>>& table, bool empty, const S* x, S* y,
             O* offsets, int64_t top, int64_t i0, int64_t i1) {
  using A = acc_t<S>;
  using V = Vec<A>;
  using Int = typename V::Int;
  using Lane = typename IntLane<A>::type;
  alignas(kVecBytes) A values[kLongest + 2 * V::N];
  alignas(kVecBytes) Lane rows[kLongest + 2 * V::N];
  if (__builtin_expect(empty || i0 >= i1, 0)) return exact_max_row(p, w, x, y, offsets, top, i0, i1);
  NanWatch<A> nan;
  for (int64_t c = 0; c < p.w.in; c += V::N) {
    const S* from = x + (top + i0 * p.h.dilation) * p.w.in + c;
    V best = load_upto(from, p.w.in - c);
    Int row = Int{} + Lane(i0);
    nan.see(best, best);
    for (int64_t i = i0 + 1; i < i1; ++i) {
      from += p.h.dilation * p.w.in;
      const V v = load_upto(from, p.w.in - c);
      nan.see(v, v);
      if constexpr (kOffsets) row = v.v > best.v ? Int{} + Lane(i) : row;
      best = max(v, best);
    }
    best.store(values + c);
    if constexpr (kOffsets) __builtin_memcpy(rows + c, &row, sizeof(row));
  }
  if (__builtin_expect(nan.any(), 0)) return exact_max_row(p, w, x, y, offsets, top, i0, i1);
  for_vectors<V::N>(p.w.out, [&](int64_t o, int lanes) __attribute__((always_inline)) {
    V best = lookup(values, table.load(0, o), table.narrow);
    if constexpr (kOffsets) {
      Int row = lookup_bits<A>(rows, table.load(0, o), table.narrow), tap{};
      for (int64_t k = 1; k < table.depth; ++k) {
        const Int at = table.load(k, o), r = lookup_bits<A>(rows, at, table.narrow);
        const V v = lookup(values, at, table.narrow);
        const Int take = (v.v > best.v) | ((v.v == best.v) & (r < row));
        best.v = take ? v.v : best.v;
        row = take ? r : row;
        tap = take ? Int{} + Lane(k) : tap;
      }
      Taps<A> taps;
      Int begin;
      __builtin_memcpy(&begin, table.begin + o, sizeof(begin));
      taps.taps = row * Lane(p.w.kernel) + begin + tap;
      taps.store(offsets + o, lanes);
    } else {
      for (int64_t k = 1; k < table.depth; ++k) best = max(lookup(values, table.load(k, o), table.narrow), best);
    }
    store_some(best, y + o, lanes);
  });
}

template <class S>
void avg_row(const Pool2dParams& p, const Table<acc_t<S>>& table, const acc_t<S>* counts, const S* x, S* y,
             int64_t rows, int64_t count) {
  using A = acc_t<S>;
  using V = Vec<A>;
  alignas(kVecBytes) A sums[kLongest + 2 * V::N];
  for (int64_t c = 0; c < p.w.in; c += V::N) {
    V sum = V::zero();
    for (int64_t i = 0; i < rows; ++i) sum = sum + load_upto(x + i * p.w.in + c, p.w.in - c);
    sum.store(sums + c);
  }
  V::zero().store(sums + pitch_of<A>(p.w.in));  // not one element: the lookups' loads would wait for two stores
  for_vectors<V::N>(p.w.out, [&](int64_t o, int lanes) __attribute__((always_inline)) {
    V sum = V::zero();
    for (int64_t k = 0; k < table.depth; ++k) sum = sum + lookup(sums, table.load(k, o), table.narrow);
    store_some(sum / (V::load(counts + o) * V::set1(A(count))), y + o, lanes);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// One gradient row, with `left` elements to the end of the tensor, to the row of
// shares it sends to every input row under its windows. (Masked loads and stores
// are slow: rows are read, and below written, past their end where there is more.)
template <class S>
void share_row(const Pool2dParams& p, const Table<acc_t<S>>& table, const acc_t<S>* counts, const S* g, int64_t left,
               int64_t count, acc_t<S>* to) {
  using A = acc_t<S>;
  using V = Vec<A>;
  alignas(kVecBytes) A shares[kLongest + 2 * V::N];
  for (int64_t o = 0; o < p.w.out; o += V::N) {
    const V columns = V::load(counts + o), share = load_upto(g + o, left - o) / (columns * V::set1(A(count)));
    V{columns.v > 0 ? share.v : V::zero().v}.store(shares + o);
  }
  V::zero().store(shares + pitch_of<A>(p.w.out));
  for (int64_t c = 0; c < table.pitch; c += V::N) {
    V sum = table.depth > 0 ? lookup(shares, table.load(0, c), table.narrow) : V::zero();
    for (int64_t k = 1; k < table.depth; ++k) sum = sum + lookup(shares, table.load(k, c), table.narrow);
    sum.store(to + c);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Zero behind the last window.
template <class A>
void fill_counts(const Pool2dParams& p, const Spans& w, A* counts) {
  for (int64_t o = 0; o < pitch_of<A>(p.w.out); ++o) counts[o] = A(o >= p.w.out ? 0 : p.divisor ? 1 : w.count[o]);
}

// Calls f(plane, row) for rows [begin, end), counted over all planes.
template <class F>
FASTNN_INLINE void for_rows(int64_t rows, int64_t begin, int64_t end, const F& f) {
  int64_t plane = begin / rows, row = begin % rows;
  for (int64_t r = begin; r < end; ++r) {
    f(plane, row);
    if (++row == rows) row = 0, ++plane;
  }
}
FASTNN_INLINE int64_t grain_of(const Pool2dParams& p, int64_t rows) {
  return max64(1, kGrain * rows / (p.h.in * p.w.in));
}

template <class S, class O>
void max_forward(const Pool2dParams& p) {
  using A = acc_t<S>;
  parallel_for(0, p.batch * p.channels * p.h.out, grain_of(p, p.h.out), [&](int64_t begin, int64_t end) {
    const Spans h(axis_h(p), true), w(axis_w(p), true);
    bool empty = false;
    for (int64_t o = 0; o < p.w.out; ++o) empty = empty || w.begin[o] >= w.end[o];
    Table<A> table(p.w.out, p.w.in);
    if (!empty) fill_taps<false>(table, axis_w(p), w);
    for_rows(p.h.out, begin, end, [&](int64_t plane, int64_t oh) {
      const S* x = static_cast<const S*>(p.input) + plane * p.h.in * p.w.in;
      const int64_t at = (plane * p.h.out + oh) * p.w.out;
      S* y = static_cast<S*>(p.output) + at;
      O* offsets = static_cast<O*>(p.offsets);
      if (offsets) max_row<true>(p, w, table, empty, x, y, offsets + at, h.first[oh], h.begin[oh], h.end[oh]);
      else max_row<false>(p, w, table, empty, x, y, offsets, h.first[oh], h.begin[oh], h.end[oh]);
    });
  });
}

}  // namespace

bool fits_table(const Pool2dParams& p) {
  if (p.h.in >= kLongest || p.w.in >= kLongest || p.h.out >= kLongest || p.w.out >= kLongest) return false;
  return min64(p.w.kernel, p.w.in) * round_up(p.w.out, lanes_of(p)) <= kTable;
}

Status max_pool2d_forward_table(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.wide) max_forward<S, int32_t>(p);
    else max_forward<S, uint8_t>(p);
    return Status::ok;
  });
}

Status avg_pool2d_forward_table(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    parallel_for(0, p.batch * p.channels * p.h.out, grain_of(p, p.h.out), [&](int64_t begin, int64_t end) {
      const Spans h(axis_h(p), p.count_include_pad), w(axis_w(p), p.count_include_pad);
      alignas(kVecBytes) A counts[kLongest + Vec<A>::N];
      fill_counts(p, w, counts);
      Table<A> table(p.w.out, p.w.in + 1);
      fill_taps<true>(table, axis_w(p), w);
      for_rows(p.h.out, begin, end, [&](int64_t plane, int64_t oh) {
        const S* x = static_cast<const S*>(p.input) + (plane * p.h.in + h.first[oh] + h.begin[oh]) * p.w.in;
        avg_row(p, table, counts, x, static_cast<S*>(p.output) + (plane * p.h.out + oh) * p.w.out,
                h.end[oh] - h.begin[oh], p.divisor ? p.divisor : h.count[oh]);
      });
    });
    return Status::ok;
  });
}

bool fits_table_backward(const Pool2dParams& p) {
  const int64_t pitch = round_up(p.w.in, lanes_of(p));
  return fits_table(p) && most_covers(axis_w(p)) * pitch <= kTable && most_covers(axis_h(p)) * pitch <= kRing;
}

Status avg_pool2d_backward_table(const Pool2dParams& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = acc_t<S>;
    using V = Vec<A>;
    parallel_for(0, p.batch * p.channels * p.h.in, grain_of(p, p.h.in), [&](int64_t begin, int64_t end) {
      const Axis h = axis_h(p);
      const Spans spans(h, p.count_include_pad), w(axis_w(p), p.count_include_pad);
      alignas(kVecBytes) A counts[kLongest + V::N], ring[kRing];
      fill_counts(p, w, counts);
      Table<A> table(p.w.in, p.w.out + 1);
      fill_covers(table, axis_w(p));
      int32_t low[kLongest], high[kLongest];
      for (int64_t i = 0; i < h.in; ++i) low[i] = int32_t(h.low(i)), high[i] = int32_t(h.high(i));
      const int64_t total = p.batch * p.channels * h.out * p.w.out;
      // The rows of shares that cover one input row stay in the ring, each in the slot of its number.
      const int64_t slots = most_covers(h);
      int64_t next = low[begin % h.in];
      for_rows(h.in, begin, end, [&](int64_t plane, int64_t ih) {
        if (ih == 0) next = low[0];
        for (next = max64(next, low[ih]); next < high[ih]; ++next) {
          const int64_t at = (plane * h.out + next) * p.w.out;
          share_row(p, table, counts, static_cast<const S*>(p.grad_output) + at, total - at,
                    p.divisor ? p.divisor : spans.count[next], ring + next % slots * table.pitch);
        }
        S* dx = static_cast<S*>(p.grad_input) + (plane * h.in + ih) * p.w.in;
        const int64_t first = low[ih] % slots,
                      left = (end - plane * h.in - ih) * p.w.in;  // this range's, and written later
        for (int64_t c = 0; c < p.w.in; c += V::N) {
          V sum = V::zero();
          for (int64_t o = low[ih], slot = first; o < high[ih]; ++o) {
            sum = sum + V::load(ring + slot * table.pitch + c);
            if (++slot == slots) slot = 0;
          }
          store_upto(sum, dx + c, left - c);
        }
      });
    });
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
