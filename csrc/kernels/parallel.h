// Loop parallelism without a thread pool of our own: the host (torch) lends its parallel_for through a function
// pointer.
#pragma once
#include "common.h"

namespace fastnn {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
using ParallelForFn = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);
using NumThreadsFn = int (*)();

// Until the host sets them, loops run serially.
void set_parallel(ParallelForFn parallel_for, NumThreadsFn num_threads);

void parallel_for_erased(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);
int num_threads();

// Calls f(begin, end) on disjoint ranges that cover [begin, end). Ranges depend on the number of threads, so a result
// must not depend on how the range was cut: reduce per item, never per range.
template <class F>
FASTNN_INLINE void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain) return f(begin, end);
  parallel_for_erased(
      begin, end, grain, [](void* context, int64_t b, int64_t e) { (*static_cast<const F*>(context))(b, e); },
      const_cast<F*>(&f));
}

}  // namespace fastnn
