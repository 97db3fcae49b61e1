// Detects the CPU once, keeps the active kernel table, and forwards the public entry points to it.
#include <cstring>

#include "../parallel.h"
#include "machine.h"
#include "table.h"

namespace fastnn {

namespace {
ParallelForFn g_parallel_for = nullptr;
NumThreadsFn g_num_threads = nullptr;
}  // namespace

void set_parallel(ParallelForFn parallel_for, NumThreadsFn num_threads) {
  g_parallel_for = parallel_for;
  g_num_threads = num_threads;
}

void parallel_for_erased(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  if (g_parallel_for) return g_parallel_for(begin, end, grain, fn, context);
  fn(context, begin, end);
}

int num_threads() { return g_num_threads ? g_num_threads() : 1; }

namespace cpu {

namespace isa_baseline {
extern const KernelTable table;
}
#ifdef FASTNN_HAVE_X86_ISAS
namespace isa_avx2 {
extern const KernelTable table;
}
namespace isa_avx512 {
extern const KernelTable table;
}
#endif

namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*runs_here)();
};

// Fastest first.
const Isa kIsas[] = {
#ifdef FASTNN_HAVE_X86_ISAS
    {"avx512", &isa_avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
     }},
    {"avx2", &isa_avx2::table,
     [] {
       // x86-64-v3 implies F16C and MOVBE too; every CPU with AVX2, FMA and BMI2 has them.
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
     }},
#endif
    {"baseline", &isa_baseline::table, [] { return true; }},
};

const KernelTable* detect() {
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) return isa.table;
  return &isa_baseline::table;
}

const KernelTable*& active() {
  static const KernelTable* table = detect();
  return table;
}

}  // namespace

const KernelTable& kernels() { return *active(); }

const char* usable_isa(int i) {
  for (const Isa& isa : kIsas)
    if (isa.runs_here() && i-- == 0) return isa.name;
  return nullptr;
}

bool set_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0 && isa.runs_here()) {
      active() = isa.table;
      return true;
    }
  return false;
}

bool whole_wide_vectors() {
#ifdef FASTNN_HAVE_X86_ISAS
  static const bool by_halves = __builtin_cpu_is("amdfam19h");
  return !by_halves && active() == &isa_avx512::table;
#else
  return false;
#endif
}

bool intel() {
#ifdef FASTNN_HAVE_X86_ISAS
  static const bool is = __builtin_cpu_is("intel");
  return is;
#else
  return false;
#endif
}

Status activation_forward(const ActivationParams& p) { return kernels().activation_forward(p); }
Status activation_backward(const ActivationParams& p) { return kernels().activation_backward(p); }
Status batch_norm_forward(const BatchNormParams& p) { return kernels().batch_norm_forward(p); }
Status batch_norm_backward(const BatchNormParams& p) { return kernels().batch_norm_backward(p); }
int64_t gemm_workspace(const GemmParams& p) { return kernels().gemm_workspace(p); }
Status gemm(const GemmParams& p) { return kernels().gemm(p); }
const char* gemm_algorithm(const GemmParams& p) { return kernels().gemm_algorithm(p); }
Status column_sum(const ColumnSumParams& p) { return kernels().column_sum(p); }
int64_t conv2d_workspace(const Conv2dParams& p) { return kernels().conv2d_workspace(p); }
Status conv2d(const Conv2dParams& p) { return kernels().conv2d(p); }
Status conv2d_grad_bias(const Conv2dParams& p) { return kernels().conv2d_grad_bias(p); }
Status cross_entropy_forward(const CrossEntropyParams& p) { return kernels().cross_entropy_forward(p); }
Status cross_entropy_backward(const CrossEntropyParams& p) { return kernels().cross_entropy_backward(p); }
Status nll_loss_forward(const NllLossParams& p) { return kernels().nll_loss_forward(p); }
Status nll_loss_backward(const NllLossParams& p) { return kernels().nll_loss_backward(p); }
Status optim_step(const OptimParams& p) { return kernels().optim_step(p); }
int64_t packed_conv2d_bytes(const PackedConv2dParams& p) { return kernels().packed_conv2d_bytes(p); }
void packed_conv2d_pack(const PackedConv2dParams& p) { return kernels().packed_conv2d_pack(p); }
int64_t packed_conv2d_workspace(const PackedConv2dParams& p) { return kernels().packed_conv2d_workspace(p); }
Status packed_conv2d(const PackedConv2dParams& p) { return kernels().packed_conv2d(p); }
Status partial_norms(const NormParams& p) { return kernels().partial_norms(p); }
Status avg_pool2d_backward(const Pool2dParams& p) { return kernels().avg_pool2d_backward(p); }
Status avg_pool2d_forward(const Pool2dParams& p) { return kernels().avg_pool2d_forward(p); }
Status max_pool2d_backward(const Pool2dParams& p) { return kernels().max_pool2d_backward(p); }
Status max_pool2d_forward(const Pool2dParams& p) { return kernels().max_pool2d_forward(p); }
Status max_pool2d_indices(const Pool2dParams& p) { return kernels().max_pool2d_indices(p); }
Status softmax_forward(const SoftmaxParams& p) { return kernels().softmax_forward(p); }
Status softmax_backward(const SoftmaxParams& p) { return kernels().softmax_backward(p); }

}  // namespace cpu
}  // namespace fastnn
