// Packed convolution: which algorithm, and the calls into it.
#include "packed_conv2d.h"

#include "isa.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

int64_t packed_conv2d_bytes(const PackedConv2dParams& p) {
  switch (p.algorithm) {
    case PackedConv2dAlgorithm::direct: return packed_direct_bytes(p);
    case PackedConv2dAlgorithm::winograd: return packed_winograd_bytes(p);
    case PackedConv2dAlgorithm::depthwise: return packed_depthwise_bytes(p);
    case PackedConv2dAlgorithm::none: return 0;
  }
  return 0;
}

void packed_conv2d_pack(const PackedConv2dParams& p) {
  switch (p.algorithm) {
    case PackedConv2dAlgorithm::direct: return packed_direct_pack(p);
    case PackedConv2dAlgorithm::winograd: return packed_winograd_pack(p);
    case PackedConv2dAlgorithm::depthwise: return packed_depthwise_pack(p);
    case PackedConv2dAlgorithm::none: return;
  }
}

int64_t packed_conv2d_workspace(const PackedConv2dParams& p) {
  switch (p.algorithm) {
    case PackedConv2dAlgorithm::direct: return packed_direct_workspace(p);
    case PackedConv2dAlgorithm::winograd: return packed_winograd_workspace(p);
    default: return 0;
  }
}

Status packed_conv2d(const PackedConv2dParams& p) {
  switch (p.algorithm) {
    case PackedConv2dAlgorithm::direct: return packed_direct_run(p), Status::ok;
    case PackedConv2dAlgorithm::winograd: return packed_winograd_run(p), Status::ok;
    case PackedConv2dAlgorithm::depthwise: return packed_depthwise_run(p), Status::ok;
    case PackedConv2dAlgorithm::none: break;
  }
  return Status::invalid_argument;
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
