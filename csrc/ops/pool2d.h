// The arguments of pooling: checked and turned into kernel parameters, and how Python hands them over.
#pragma once
#include <pybind11/pybind11.h>

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

// An int or a tuple or list of ints from Python, at most two of them; None is empty. Anything else is a TypeError, on
// which the functional calls torch's own function.
struct Ints {
  int64_t values[2];
  size_t size;
  explicit Ints(pybind11::handle object);
  operator at::IntArrayRef() const { return {values, size}; }
};

}  // namespace fastnn::ops
