// Where large results and workspaces live. The first touch of a page costs a fault, which on a virtual machine is three
// to ten times the work of filling it (measured: 1.7 GB/s into fresh 4 KB pages, 26-38 GB/s into fresh 2 MB pages), and
// the C library gives large blocks back to the system at every step of a training loop. CPU tensors of 1 MB and more
// therefore get blocks of their own: mapped in huge pages where the system grants them, and kept for the next call when
// they are freed, as far as the program had them in use at once before (64 MB in any case, 1 GB at most).
// FASTNN_HUGE_PAGES=0 leaves every allocation to torch.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastnn::ops {

// The memory format in which t has no gaps, if any: what its strides suggest (suggest_memory_format) can be another one
// where a dimension of size 1 has a stride of its own.
std::optional<at::MemoryFormat> format_as_it_lies(const at::Tensor& t);

// at::empty and at::empty_like, for results that a kernel writes whole. Without a format the result lies as t does, and
// strides of dimensions of size 1, which say nothing, become the usual ones, as in torch's pointwise operators.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor fresh_like(const at::Tensor& t, std::optional<at::MemoryFormat> format = std::nullopt);
// t.contiguous(format), with a copy in such memory.
at::Tensor contiguous(const at::Tensor& t, at::MemoryFormat format = at::MemoryFormat::Contiguous);

}  // namespace fastnn::ops
