// PackedConv2d: a frozen layer's convolution, which keeps the packed weight for as long as the weight does not change.
#include "kernels/packed_conv2d.h"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>

#include "conv2d.h"
#include "memory.h"
#include "kernels/cpu/table.h"

namespace fastnn::ops {
namespace {

constexpr auto kNhwc = at::MemoryFormat::ChannelsLast;

void* aligned(const Tensor& bytes) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr()) + 63) & ~uintptr_t(63));
}
Tensor empty_bytes(int64_t bytes) { return fresh({bytes + 64}, at::TensorOptions().dtype(at::kByte)); }

// What a packed weight was made from; weak pointers, because a tensor that takes a freed one's place may take its
// address too. A version counter sees neither `.data = other`, for which the storage is here, nor what is done to the
// values of `.data`, but a frozen weight has no such users.
using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;
WeakStorage storage_of(const Tensor& t) {
  return t.defined() ? t.storage().getWeakStorageImpl() : WeakStorage(c10::intrusive_ptr<c10::StorageImpl>());
}
struct Source {
  Weak weight{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()}, bias = weight;
  WeakStorage storages[2] = {storage_of({}), storage_of({})};
  uint64_t versions[2] = {};
  const char* isa = nullptr;
  bool operator==(const Source&) const = default;
};
uint64_t version(const Tensor& t) { return t.defined() && !t.is_inference() ? t._version() : 0; }

class PackedConv2d {
 public:
  PackedConv2d(std::array<int64_t, 2> stride, std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
               int64_t groups)
      : stride_(stride), padding_(padding), dilation_(dilation), groups_(groups) {}

  // clamp(conv2d(input, weight, bias) + residual) in NHWC; nullopt where the kernels do not take it, under autocast,
  // and where fastnn is disabled. Where scale and shift are given, input stands for relu(scale * input + shift), per
  // channel.
  OptTensor run(const Tensor& input, const Tensor& weight, const OptTensor& bias, const OptTensor& residual, float low,
                float high, const OptTensor& scale, const OptTensor& shift) {
    PackedConv2dParams p{};
    if (enabled() && input.is_cuda() && !or_undefined(scale).defined() && !at::autocast::is_autocast_enabled(at::kCUDA))
      return conv2d_epilogue(input, weight, bias, residual, low, high, {stride_, padding_, dilation_, groups_});
    if (!enabled() || at::autocast::is_autocast_enabled(at::kCPU)) return std::nullopt;
    if (!shape(p, input, weight, or_undefined(bias), or_undefined(residual))) return std::nullopt;
    Tensor factors[2];
    if (or_undefined(scale).defined()) {
      factors[0] = scale->contiguous(), factors[1] = shift.value().contiguous();
      for (const Tensor& t : factors)
        if (why_not_native(t) || !t.is_cpu() || t.scalar_type() != at::kFloat || t.numel() != p.C) return std::nullopt;
      p.scale = factors[0].const_data_ptr<float>(), p.shift = factors[1].const_data_ptr<float>();
    }
    p.algorithm = cpu::packed_conv2d_choose(p);
    if (p.algorithm == PackedConv2dAlgorithm::none) return std::nullopt;
    RECORD_FUNCTION("fastnn::packed_conv2d", (c10::ArrayRef<const c10::IValue>{}));
    // A stride's phases are taken out of rows as they are.
    const bool planes = p.algorithm == PackedConv2dAlgorithm::winograd && p.stride_h > 1 && input.stride(3) == 1 &&
                        !input.is_contiguous(kNhwc);
    const bool takes_any = planes || (p.algorithm == PackedConv2dAlgorithm::direct && (p.pad_h || p.pad_w || p.C < 4));
    // The first channels of a wider NHWC tensor are read where they lie.
    const bool in_place =
        takes_any || (input.stride(1) == 1 && input.stride(3) >= p.C && p.W > 1 &&
                      input.stride(2) == p.W * input.stride(3) && input.stride(0) == p.H * input.stride(2));
    const Tensor x = in_place ? input : nhwc(input);
    p.input_stride_n = x.stride(0), p.input_stride_c = x.stride(1);
    p.input_stride_h = x.stride(2), p.input_stride_w = x.stride(3);
    if (!in_place || x.is_contiguous(kNhwc))
      set_dense(x, p.input_stride_n, p.input_stride_h, p.input_stride_w), p.input_stride_c = 1;
    const Tensor packed = pack(p, packed_[planes][size_t(p.algorithm)], weight, or_undefined(bias));
    const Tensor y = fresh({p.N, p.K, p.P, p.Q}, input.options().memory_format(kNhwc));
    p.output_stride_w = p.K, p.output_stride_h = p.Q * p.K, p.output_stride_n = p.P * p.Q * p.K;
    Tensor r;
    if (or_undefined(residual).defined()) {
      r = nhwc(*residual);
      p.residual = r.const_data_ptr<float>();
      p.residual_stride_w = p.K, p.residual_stride_h = p.Q * p.K, p.residual_stride_n = p.P * p.Q * p.K;
    }
    p.input = x.const_data_ptr<float>();
    p.output = y.mutable_data_ptr<float>();
    p.packed = static_cast<float*>(aligned(packed));
    p.low = low, p.high = high;
    Tensor workspace;
    if (const int64_t bytes = cpu::packed_conv2d_workspace(p)) {
      workspace = empty_bytes(bytes);
      p.workspace = aligned(workspace);
    }
    check(cpu::packed_conv2d(p), "packed_conv2d");
    last_ = p.algorithm;
    return y;
  }

  std::string algorithm() const {
    switch (last_) {
      case PackedConv2dAlgorithm::direct: return "direct";
      case PackedConv2dAlgorithm::winograd: return "winograd";
      case PackedConv2dAlgorithm::depthwise: return "depthwise";
      case PackedConv2dAlgorithm::none: break;
    }
    return "";
  }

 private:
  static Tensor nhwc(const Tensor& t) { return t.contiguous(kNhwc); }
  static void set_dense(const Tensor& t, int64_t& n, int64_t& h, int64_t& w) {
    w = t.size(1), h = t.size(3) * w, n = t.size(2) * h;
  }

  bool shape(PackedConv2dParams& p, const Tensor& x, const Tensor& w, const Tensor& b, const Tensor& r) const {
    for (const Tensor* t : {&x, &w, &b, &r})
      if (t->defined() && (why_not_native(*t) || t->scalar_type() != at::kFloat || !t->is_cpu())) return false;
    if (x.dim() != 4 || w.dim() != 4 || x.size(1) != w.size(1) * groups_ || x.numel() == 0) return false;
    constexpr int64_t kLimit = int64_t(1) << 31;
    if (x.numel() >= kLimit) return false;
    p.input_stride_c = x.stride(1), p.input_stride_w = x.stride(3);
    p.N = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3);
    p.K = w.size(0), p.R = w.size(2), p.S = w.size(3);
    p.stride_h = stride_[0], p.stride_w = stride_[1], p.pad_h = padding_[0], p.pad_w = padding_[1];
    p.dilation_h = dilation_[0], p.dilation_w = dilation_[1], p.groups = groups_;
    const int64_t h = p.H + 2 * p.pad_h - p.dilation_h * (p.R - 1) - 1;
    const int64_t v = p.W + 2 * p.pad_w - p.dilation_w * (p.S - 1) - 1;
    if (h < 0 || v < 0) return false;
    p.P = h / p.stride_h + 1, p.Q = v / p.stride_w + 1;
    return !r.defined() || r.sizes() == at::IntArrayRef({p.N, p.K, p.P, p.Q});
  }

  // `packed`, made at the first call and whenever the weight is another.
  Tensor pack(PackedConv2dParams p, Tensor& packed, const Tensor& weight, const Tensor& bias) {
    const Source source{Weak(weight.getIntrusivePtr()),
                        Weak(bias.getIntrusivePtr()),
                        {storage_of(weight), storage_of(bias)},
                        {version(weight), version(bias)},
                        cpu::kernels().isa};
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!(source == source_)) {
      for (auto& of : packed_) of = {};
      source_ = source;
    }
    if (!packed.defined()) {
      const Tensor bytes = empty_bytes(cpu::packed_conv2d_bytes(p));
      const Tensor b = bias.defined() ? bias.contiguous() : bias;
      p.packed = static_cast<float*>(aligned(bytes));
      p.weight = weight.const_data_ptr<float>();
      p.bias = b.defined() ? b.const_data_ptr<float>() : nullptr;
      p.weight_stride_k = weight.stride(0), p.weight_stride_c = weight.stride(1);
      p.weight_stride_r = weight.stride(2), p.weight_stride_s = weight.stride(3);
      cpu::packed_conv2d_pack(p);
      packed = bytes;
    }
    return packed;
  }

  std::array<int64_t, 2> stride_, padding_, dilation_;
  int64_t groups_;
  std::mutex mutex_;
  Source source_;
  std::array<Tensor, 4> packed_[2];  // by algorithm; [1]: for images in NCHW, whose phases lie in another order
  PackedConv2dAlgorithm last_ = PackedConv2dAlgorithm::none;
};

void bind(pybind11::module_& m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  using pybind11::arg;
  using Ints = std::array<int64_t, 2>;
  pybind11::class_<PackedConv2d>(m, "PackedConv2d")
      .def(pybind11::init<Ints, Ints, Ints, int64_t>())
      .def("__call__", &PackedConv2d::run, release_gil(), arg("input"), arg("weight"), arg("bias"), arg("residual"),
           arg("low"), arg("high"), arg("scale") = pybind11::none(), arg("shift") = pybind11::none())
      .def("algorithm", &PackedConv2d::algorithm);
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
