// A warp's tensor-core product, D = A B + C of a 16 x k, a k x 8 and a 16 x 8 matrix with float32 sums: k is 8 for
// float32 operands, which are rounded to tf32, and 16 for 16-bit ones. Fragments are laid out as the PTX ISA has it for
// mma.m16n8k8 and mma.m16n8k16: with g = lane / 4, t = lane % 4 and 32-bit words w of a row of k
// (one tf32 or two 16-bit numbers), A's word i is (row g + 8 (i % 2), w = t + 4 (i / 2)), B's word
// i is (w = t + 4 i, column g), and C's element i is (row g + 8 (i / 2), column 2 t + i % 2).
#pragma once
#include "dtype.h"

namespace fastnn::cuda {

struct FragmentA {
  uint32_t word[4];
};
struct FragmentB {
  uint32_t word[2];
};

// Elements of k in one product, and in a word.
template <class S>
constexpr int kMmaK = 32 / int(sizeof(S));
template <class S>
constexpr int kWordElements = 4 / int(sizeof(S));

// The word of a fragment whose elements begin at p.
__device__ __forceinline__ uint32_t mma_word(const float* p) {
#if defined(__CUDACC__)
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(*p));
  return word;
#else
  return cuda_on_cpu::float_to_tf32(*p);
#endif
}
template <class S>
__device__ __forceinline__ uint32_t mma_word(const S* p) {
  const Pack<S, 2> pair = load_pack<2>(p);
  return pair.at[0].bits | uint32_t(pair.at[1].bits) << 16;
}

// The same for what rounding to tf32 left over: with it a float32 is known to 2^-22 of itself.
__device__ __forceinline__ uint32_t mma_rest(const float* p) {
  const float rest = *p - __uint_as_float(mma_word(p));
  return mma_word(&rest);
}

template <bool kRest, class S>
__device__ __forceinline__ uint32_t word_of(const S* p) {
  if constexpr (kRest) return mma_rest(p);
  else return mma_word(p);
}

// Rows [row0, row0 + 16) and k's [k0, k0 + kMmaK) of a matrix with `stride`
// elements per row; for B, 8 columns of rows of k. All lanes must call these.
template <bool kRest = false, class S>
__device__ __forceinline__ FragmentA load_a(const S* p, int stride) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  FragmentA f;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    f.word[i] = word_of<kRest>(p + (g + 8 * (i % 2)) * stride + (t + 4 * (i / 2)) * kWordElements<S>);
  return f;
}
template <bool kRest = false, class S>
__device__ __forceinline__ FragmentB load_b(const S* p, int stride) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  FragmentB f;
#pragma unroll
  for (int i = 0; i < 2; ++i) f.word[i] = word_of<kRest>(p + g * stride + (t + 4 * i) * kWordElements<S>);
  return f;
}

template <class S>
__device__ __forceinline__ void mma(float (&c)[4], const FragmentA& a, const FragmentB& b) {
#if defined(__CUDACC__)
#define FASTNN_MMA(shape_and_types)                                                                          \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]))
  if constexpr (__is_same(S, float)) FASTNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  else if constexpr (__is_same(S, bf16)) FASTNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else FASTNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#undef FASTNN_MMA
#else
  cuda_on_cpu::mma(c, a.word, b.word, kWordElements<S>, [](uint32_t word, int i) {
    if constexpr (__is_same(S, float)) return __builtin_bit_cast(float, word);
    else return to_acc(S{uint16_t(word >> 16 * i)});
  });
#endif
}

}  // namespace fastnn::cuda
