// The arguments of pooling: checked and turned into kernel parameters, and how Python hands them over.
#pragma once
#include "common.h"
#include "kernels/pool2d.h"

namespace fastnn::ops {

// kernel_size, stride (empty: the kernel), padding and dilation as torch's functions take them: one int or two.
struct Windows {
  at::IntArrayRef kernel;
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
  bool ceil_mode;
};

// Fills p's axes, batch and channels for pooling an input of these sizes; false when torch refuses the arguments.
bool fill_windows(Pool2dParams& p, at::IntArrayRef sizes, const Windows& windows);
// The same for adaptive windows. Windows that tile the input become plain windows with a stride.
bool fill_adaptive(Pool2dParams& p, at::IntArrayRef sizes, at::IntArrayRef output_size);
// The same for a backward: `pooled` has the sizes of the output, `input_size` is the input's plane. An empty kernel
// means adaptive windows; ceil_mode follows from the sizes. Only images in a batch can be channels_last.
bool fill_backward(Pool2dParams& p, at::IntArrayRef pooled, at::IntArrayRef input_size, const Windows& windows,
                   bool channels_last);
// Whether the kernels take the call, counted where they do not: torch's own op then has its gradient too. Sizes that a
// compiler traces as symbols are not looked at.
bool takes_windows(const char* op, const Tensor& input, const Windows& windows);
bool takes_adaptive(const char* op, const Tensor& input, c10::SymIntArrayRef output_size);

inline void fill_layout(Pool2dParams& p, const Tensor& t, bool channels_last) {
  p.dtype = dtype_of(t);
  p.channels_last = channels_last;
}

// True when a kernel reads or writes t as [N, H, W, C].
inline bool is_channels_last(const Tensor& t) { return dense_format(t) == at::MemoryFormat::ChannelsLast; }
inline at::MemoryFormat format_of(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// t's sizes with the last two replaced.
c10::SmallVector<int64_t, 4> with_plane(at::IntArrayRef sizes, int64_t h, int64_t w);

}  // namespace fastnn::ops
