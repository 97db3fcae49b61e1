// An allocator of large CPU blocks in huge pages, and the tensors made from it.
#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string_view>

namespace fastnn::ops {
namespace {

constexpr size_t kPage = size_t{2} << 20, kSmallPage = size_t{64} << 10;  // of any system
constexpr size_t kLarge = size_t{1} << 20, kKeptAlways = size_t{64} << 20, kKeptMost = size_t{1} << 30;
constexpr int kSlots = 256, kWindow = 4096;

#if defined(__linux__) && defined(MADV_HUGEPAGE)

struct Block {
  char* data;
  size_t bytes;
};

// In whole huge pages unless that would waste more than half of what is asked for.
size_t block_bytes(size_t bytes) {
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  return (whole - bytes) * 2 <= bytes ? whole : (bytes + kSmallPage - 1) / kSmallPage * kSmallPage;
}

void unmap(const Block& b) { munmap(b.data, b.bytes); }

// Null when the system has no memory.
char* map(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  char* const data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage);
  if (data > begin) munmap(begin, data - begin);
  munmap(data + bytes, begin + kPage - data);
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

// Freed blocks, the last one last: as many bytes as with those in use make the most that were in use at once lately,
// within the last kWindow to 2 kWindow requests. So a training step finds its activations again (ResNet-20 at batch
// 128: 12 ms of 145 were page faults with 64 MB), and the program grows by nothing it did not need itself. Locks are
// only tried: a child forked while another thread held it goes without.
class Kept {
 public:
  // A block of that size, now in use, or null: then it is to be mapped.
  char* take(size_t bytes) {
    const size_t used = in_use_ += bytes;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    if (++requests_ == kWindow) {
      requests_ = 0;
      peak_before_ = peak_;
      peak_ = 0;
    }
    peak_ = std::max(peak_, used);
    for (int i = count_ - 1; i >= 0; --i)
      if (blocks_[i].bytes == bytes) return remove(i).data;
    trim(0);
    return nullptr;
  }
  void give(const Block& b) {
    in_use_ -= b.bytes;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || b.bytes > limit()) return unmap(b);
    trim(b.bytes);
    if (count_ == kSlots) unmap(remove(0));
    blocks_[count_++] = b;
    total_ += b.bytes;
  }
  void not_mapped(size_t bytes) { in_use_ -= bytes; }

 private:
  size_t limit() const {
    const size_t most = std::max(peak_, peak_before_), used = in_use_;
    return std::clamp(most > used ? most - used : 0, kKeptAlways, kKeptMost);
  }
  // Leaves room for that many bytes.
  void trim(size_t bytes) {
    while (count_ > 0 && total_ + bytes > limit()) unmap(remove(0));
  }
  Block remove(int i) {
    const Block b = blocks_[i];
    std::copy(blocks_ + i + 1, blocks_ + count_, blocks_ + i);
    --count_;
    total_ -= b.bytes;
    return b;
  }
  std::mutex mutex_;
  std::atomic<size_t> in_use_ = 0;
  Block blocks_[kSlots];
  int count_ = 0, requests_ = 0;
  size_t total_ = 0, peak_ = 0, peak_before_ = 0;
};

Kept& kept() {
  static Kept* const blocks = new Kept;  // outlives every tensor
  return *blocks;
}

void free_block(void* context) {
  Block* const b = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(b->data);
  kept().give(*b);
  delete b;
}

// Small requests, which resizing a tensor can make, are the default allocator's.
struct LargeAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n < kLarge) return c10::GetCPUAllocator()->allocate(n);
    const size_t bytes = block_bytes(n);
    char* data = kept().take(bytes);
    if (!data) data = map(bytes);
    if (!data) {
      kept().not_mapped(bytes);
      return c10::GetCPUAllocator()->allocate(n);  // raises torch's own error
    }
    c10::profiledCPUMemoryReporter().New(data, n);
    return {data, new Block{data, bytes}, free_block, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

// Null where torch's allocator is to be used: elsewhere than on Linux, by choice, or when a program has set its own.
c10::Allocator* large_allocator() {
  static LargeAllocator* const allocator = new LargeAllocator;
  static const bool chosen = [] {
    const char* value = std::getenv("FASTNN_HUGE_PAGES");
    return !value || std::string_view(value) != "0";
  }();
  return chosen && c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator() ? allocator : nullptr;
}

#else
c10::Allocator* large_allocator() { return nullptr; }
#endif

// Null where the tensor is not the CPU's, or torch is to fill new memory with NaN (deterministic algorithms). The CPU's
// are made here: at::empty passes the dispatcher twice.
c10::Allocator* allocator_for(const c10::Device& device, int64_t elements, caffe2::TypeMeta type) {
  const auto& context = at::globalContext();
  if (!device.is_cpu() || (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()))
    return nullptr;
  c10::Allocator* const large = size_t(elements) * type.itemsize() >= kLarge ? large_allocator() : nullptr;
  return large ? large : c10::GetCPUAllocator();
}

constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

}  // namespace

std::optional<at::MemoryFormat> format_as_it_lies(const at::Tensor& t) {
  for (auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d})
    if (t.is_contiguous(format)) return format;
  return std::nullopt;
}

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (auto* allocator = allocator_for(options.device(), c10::multiply_integers(sizes), options.dtype()))
    return at::detail::empty_generic(sizes, allocator, kCpu, c10::typeMetaToScalarType(options.dtype()),
                                     options.memory_format_opt());
  return at::empty(sizes, options);
}

at::Tensor fresh_like(const at::Tensor& t, std::optional<at::MemoryFormat> format) {
  if (!format) format = format_as_it_lies(t);
  if (auto* allocator = allocator_for(t.device(), t.numel(), t.dtype())) {
    if (format && *format != at::MemoryFormat::Preserve)
      return at::detail::empty_generic(t.sizes(), allocator, kCpu, t.scalar_type(), format);
    if (t.is_non_overlapping_and_dense())
      return at::detail::empty_strided_generic(t.sizes(), t.strides(), allocator, kCpu, t.scalar_type());
    // As at::empty_like.
    return at::detail::empty_strided_generic(t.sizes(), at::infer_dense_strides(t.sizes(), t.strides()), allocator,
                                             kCpu, t.scalar_type());
  }
  return at::empty_like(t, t.options().memory_format(format));
}

at::Tensor contiguous(const at::Tensor& t, at::MemoryFormat format) {
  return t.is_contiguous(format) ? t : fresh_like(t, format).copy_(t);
}

}  // namespace fastnn::ops
