// Planted bugs, one per kind that the runtime must catch; run by name only (tests/test_cuda_on_cpu.py).
#include "../../csrc/kernels/cuda/device/reduce.h"
#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

constexpr int kThreads = 64;

// Every kernel reverses its block's 64 values; the right version is not among them.
__global__ void missing_barrier(const float* x, float* y) {
  FASTNN_SHARED(tile, float[kThreads]);
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}
__global__ void divergent_barrier(const float* x, float* y) {
  FASTNN_SHARED(tile, float[kThreads]);
  tile[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < kThreads - 1) __syncthreads();
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}
__global__ void shared_out_of_bounds(const float* x, float* y) {
  FASTNN_SHARED(tile, float[kThreads]);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = (&tile[0])[kThreads - threadIdx.x];
}
__global__ void shared_uninitialised(const float* x, float* y) {
  FASTNN_SHARED(tile, float[kThreads]);
  if (threadIdx.x > 0) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}
__global__ void global_out_of_bounds(const float* x, float* y) { y[threadIdx.x] = x[kThreads - threadIdx.x]; }
__global__ void unwritten_output(const float* x, float* y) {
  if (threadIdx.x > 0) y[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}
__global__ void misaligned_pack(const float* x, float* y) {
  const auto pack = cuda::load_pack<4>(x + 1);
  y[threadIdx.x] = pack.at[threadIdx.x % 4];
}
__global__ void missing_lanes(const float* x, float* y) {
  y[threadIdx.x] = threadIdx.x < 40 ? __shfl_xor_sync(cuda::kFullWarp, x[threadIdx.x], 1) : 0;
}

template <void (*kernel)(const float*, float*)>
void run() {
  const Array x = normal(DType::f32, kThreads);
  Array y = output(DType::f32, kThreads);
  const auto cpu = [&] {
    for (int i = 0; i < kThreads; ++i) y.data<float>()[i] = x.data<float>()[kThreads - 1 - i];
    return Status::ok;
  };
  check("planted", {&y}, cpu,
        [&] { return cuda::launch(kernel, dim3(1), dim3(kThreads), 0, nullptr, x.data<float>(), y.data<float>()); });
}

const Test planted[] = {
    {"planted missing_barrier", run<missing_barrier>},
    {"planted divergent_barrier", run<divergent_barrier>},
    {"planted shared_out_of_bounds", run<shared_out_of_bounds>},
    {"planted shared_uninitialised", run<shared_uninitialised>},
    {"planted global_out_of_bounds", run<global_out_of_bounds>},
    {"planted unwritten_output", run<unwritten_output>},
    {"planted misaligned_pack", run<misaligned_pack>},
    {"planted missing_lanes", run<missing_lanes>},
};

}  // namespace
