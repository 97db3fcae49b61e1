// What the packed convolutions share: the epilogue, and each algorithm's entry points.
#pragma once
#include "../../packed_conv2d.h"
#include "simd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

// Output channels per panel: two vectors.
constexpr int kPackedPanel = 2 * Vec<float>::N;

// The clamp, and NaN stays: max and min return their second operand when either is NaN.
struct Clamp {
  f32v low, high;
  explicit Clamp(const PackedConv2dParams& p) : low(p.low - f32v{}), high(p.high - f32v{}) {}
  FASTNN_VEC_FN f32v operator()(f32v x) const {
    using V = Vec<float>;
    return min(V{high}, max(V{low}, V{x})).v;
  }
};

int64_t packed_direct_bytes(const PackedConv2dParams& p);
void packed_direct_pack(const PackedConv2dParams& p);
int64_t packed_direct_workspace(const PackedConv2dParams& p);
void packed_direct_run(const PackedConv2dParams& p);

int64_t packed_depthwise_bytes(const PackedConv2dParams& p);
void packed_depthwise_pack(const PackedConv2dParams& p);
void packed_depthwise_run(const PackedConv2dParams& p);
// The kernels of packed_conv2d_depthwise_3x3.cpp, where they take the shape: of its last vector of channels they count
// back, so that it is a whole one.
bool depthwise_3x3_takes(const PackedConv2dParams& p);
void depthwise_3x3_run(const PackedConv2dParams& p);

int64_t packed_winograd_bytes(const PackedConv2dParams& p);
void packed_winograd_pack(const PackedConv2dParams& p);
int64_t packed_winograd_workspace(const PackedConv2dParams& p);
void packed_winograd_run(const PackedConv2dParams& p);

}  // namespace fastnn::cpu::FASTNN_ISA_NS
