// Element types on the device: conversion to and from the accumulation type, 16-byte packs, exp and log by type.
#pragma once
#include "launch.h"

namespace fastnn::cuda {

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ float to_acc(f16 x) {
#if defined(__CUDACC__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return cuda_on_cpu::half_to_float(x.bits);
#endif
}

// Rounds to nearest even; a NaN stays one.
template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> x) {
  if constexpr (sizeof(T) > 2) {
    return x;
  } else {
    T y;
#if defined(__CUDACC__)
    if constexpr (__is_same(T, bf16)) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    y.bits = __is_same(T, bf16) ? cuda_on_cpu::float_to_bfloat(x) : cuda_on_cpu::float_to_half(x);
#endif
    return y;
  }
}

// N elements that move in one access; kPack<T> of them are 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <class T>
constexpr int kPack = 16 / int(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// True when every pointer can be accessed 16 bytes at a time.
template <class... P>
bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

template <class A>
constexpr A kInf = A(__builtin_huge_val());

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float sqrt_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double sqrt_of(double x) { return sqrt(x); }
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }

}  // namespace fastnn::cuda
