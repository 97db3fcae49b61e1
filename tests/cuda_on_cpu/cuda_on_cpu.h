// Runs the .cu files on the CPU, for tests: g++ compiles them against this header in place of the CUDA runtime. The
// threads of a block are fibres of one OS thread; a barrier or a warp operation suspends a fibre until its partners
// have come. Shared memory is allocated per block and filled with NaNs, so the address sanitizer sees every access out
// of bounds and an uninitialised value spoils the result. Threads and blocks run in ascending or in descending order:
// a result that depends on the order has a race.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../csrc/kernels/common.h"

struct CUstream_st;

// ---- the language ----------------------------------------------------------------------------------------------------

#define __global__ __attribute__((noinline))
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define FASTNN_SHARED(name, ...)  \
  static char name##_key;         \
  auto& name = *static_cast<::fastnn::Tag<__VA_ARGS__>::type*>( \
      ::cuda_on_cpu::shared(&name##_key, sizeof(typename ::fastnn::Tag<__VA_ARGS__>::type)))
#define FASTNN_DYNAMIC_SHARED(name, ...) \
  __VA_ARGS__* const name = static_cast<__VA_ARGS__*>(::cuda_on_cpu::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// ---- the scheduler (runtime.cpp) -------------------------------------------------------------------------------------

// Runs a whole grid. Ends the program with a message on a launch CUDA would refuse and on a barrier or warp operation
// that not all of its threads reach.
void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

extern bool descending;                      // order of threads and blocks
inline int64_t longest_run = 0x7fffffff;     // the most items of one launch, where a launcher cuts
inline bool cuts = false;                    // set when a launcher has asked for it
std::vector<const void*> launched_kernels();  // every kernel that has run, once each

void* shared(const void* key, size_t bytes);
void* dynamic_shared();
void block_barrier();

// Gives each lane of the warp `bytes` bytes (at most kSlot) of every lane: returns lane i's at [i * kSlot].
constexpr size_t kSlot = 64;
const char* warp_exchange(const void* mine, size_t bytes);
unsigned lane();
void require(bool condition, const char* message);

// ---- 16-bit floats ---------------------------------------------------------------------------------------------------

inline float half_to_float(uint16_t bits) { return float(__builtin_bit_cast(_Float16, bits)); }
inline uint16_t float_to_half(float x) { return __builtin_bit_cast(uint16_t, _Float16(x)); }
inline uint16_t float_to_bfloat(float x) {
  const uint32_t b = __builtin_bit_cast(uint32_t, x);
  return x != x ? 0x7fff : uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}

// Ten bits of mantissa; halves away from zero, as cvt.rna does.
inline uint32_t float_to_tf32(float x) {
  const uint32_t b = __builtin_bit_cast(uint32_t, x);
  return x != x ? 0x7fffffff : (b & 0x7f800000) == 0x7f800000 ? b : (b + 0x1000) & ~0x1fffu;
}

// ---- warp operations -------------------------------------------------------------------------------------------------

template <class T>
T read_lane(unsigned mask, T x, unsigned from) {
  require(mask == 0xffffffffu, "a warp operation with a partial mask");
  T y;
  std::memcpy(&y, warp_exchange(&x, sizeof(T)) + (from % 32) * kSlot, sizeof(T));
  return y;
}

// The scalar model of mma.m16n8k8 and mma.m16n8k16: every lane brings its words of A and B and computes its elements of
// C. value(word, i) is the i-th of the `per_word` numbers in a word.
template <class Value>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int per_word, const Value& value) {
  struct Words {
    uint32_t a[4], b[2];
  };
  Words mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const char* const all = warp_exchange(&mine, sizeof(mine));
  const auto of_lane = [&](int lane) -> const Words& { return *reinterpret_cast<const Words*>(all + lane * kSlot); };
  const int me = int(lane());
  for (int i = 0; i < 4; ++i) {
    const int row = me / 4 + 8 * (i / 2), column = me % 4 * 2 + i % 2;
    double sum = c[i];
    for (int w = 0; w < 8; ++w)  // words of k
      for (int e = 0; e < per_word; ++e)
        sum += double(value(of_lane(row % 8 * 4 + w % 4).a[row / 8 + w / 4 * 2], e)) *
               double(value(of_lane(column * 4 + w % 4).b[w / 4], e));
    c[i] = float(sum);
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return cuda_on_cpu::read_lane(mask, x, cuda_on_cpu::lane() ^ unsigned(lanes));
}

// ---- intrinsics, mathematics ----------------------------------------------------------------------------------------

inline void __trap() { cuda_on_cpu::require(false, "a trap"); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }

// ---- launches --------------------------------------------------------------------------------------------------------

namespace fastnn::cuda {

inline int64_t longest_run() {
  cuda_on_cpu::cuts = true;
  return cuda_on_cpu::longest_run;
}

template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, CUstream_st*, const A&... args) {
  cuda_on_cpu::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                        [&] { kernel(static_cast<P>(args)...); });
  return Status::ok;
}

}  // namespace fastnn::cuda
