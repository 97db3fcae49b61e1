// Index arithmetic: division by a number known at launch, and the bound under which 32-bit indices are enough.
#pragma once
#include "launch.h"

namespace fastnn::cuda {

constexpr int64_t kMaxIndex = 0x7fffffff;

// Moves a pointer of any type on by `bytes`; null stays. For launchers that cut a problem into short runs.
template <class T>
void advance(T*& pointer, int64_t bytes) {
  if (pointer) pointer = reinterpret_cast<T*>(uintptr_t(pointer) + bytes);
}

// Division of n < 2^31 by 1 <= d < 2^31 with one multiplication: q = (high word of n * multiplier, plus n) >> shift.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(uint32_t(divisor)) {
    while ((uint64_t(1) << shift_) < divisor_) ++shift_;
    multiplier_ = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift_) - divisor_)) / divisor_ + 1);
  }
  __device__ __forceinline__ int quotient(int n) const {
    return int((__umulhi(n, multiplier_) + uint32_t(n)) >> shift_);
  }
  // Returns the quotient; the remainder goes to `rest`.
  __device__ __forceinline__ int divide(int n, int& rest) const {
    const int q = quotient(n);
    rest = n - q * int(divisor_);
    return q;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace fastnn::cuda
