// Types every kernel family shares: element types, status codes, integer helpers.
#pragma once
#include <cstdint>

// always_inline: a weak copy emitted by an AVX-512 object could otherwise be the one the linker keeps for everybody.
#define FASTNN_INLINE static inline __attribute__((always_inline))

namespace fastnn {

enum class DType : uint8_t { f32, f64, bf16, f16 };

enum class Status : uint8_t {
  ok,
  unsupported_dtype,
  invalid_argument,
  launch_failed,  // CUDA only: cudaGetLastError() was not cudaSuccess
};

// Storage-only 16-bit floats; arithmetic happens in float32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type a sum of T's is kept in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) for the element type dtype; an unknown value is an error, not a default.
template <class F>
FASTNN_INLINE Status dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(Tag<float>{});
    case DType::f64: return f(Tag<double>{});
    case DType::bf16: return f(Tag<bf16>{});
    case DType::f16: return f(Tag<f16>{});
  }
  return Status::unsupported_dtype;
}

FASTNN_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTNN_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FASTNN_INLINE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTNN_INLINE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fastnn
