// The extension module fastnn._C: eager entry points of every op (csrc/ops) and the choice of ISA.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <atomic>

#include "kernels/parallel.h"
#include "ops/common.h"

namespace {

void torch_parallel_for(int64_t begin, int64_t end, int64_t grain, fastnn::RangeFn fn, void* context) {
  at::parallel_for(begin, end, grain, [fn, context](int64_t b, int64_t e) { fn(context, b, e); });
}

// How many threads a loop of the kernels really runs on, counted by running one.
int kernel_threads() {
  std::atomic<int> threads{0};
  fastnn::parallel_for(0, 1024, 1, [&](int64_t, int64_t) { ++threads; });
  return threads;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastnn's compiled operators; use fastnn.functional and the fastnn modules";
  fastnn::set_parallel(torch_parallel_for, [] { return at::get_num_threads(); });
  m.def("kernel_threads", kernel_threads);
  fastnn::ops::bind_all(m);
}
