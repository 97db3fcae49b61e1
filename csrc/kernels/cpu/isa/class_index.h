// The class indices of cross_entropy and nll_loss.
#pragma once
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// The class of a row; -1 when it does not count.
template <class Params>
FASTNN_INLINE int64_t class_index(const Params& p, int64_t row) {
  const int64_t t = p.target_kind == TargetKind::uint8 ? static_cast<const uint8_t*>(p.target)[row]
                                                       : static_cast<const int64_t*>(p.target)[row];
  if (t == p.ignore_index) return -1;
  if (t >= 0 && t < p.classes) return t;
  if (p.out_of_range) __atomic_store_n(p.out_of_range, true, __ATOMIC_RELAXED);
  return -1;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
