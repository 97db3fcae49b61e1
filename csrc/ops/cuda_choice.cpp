// The choice between fastnn's CUDA kernels and cuDNN and cuBLAS. No entry of the table has been measured on a device
// yet: the vendor is the default where products are large enough for tensor cores to matter.
#include "cuda_choice.h"

#include <ATen/Context.h>
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <unordered_map>

namespace fastnn::ops {
namespace {

// ---- the table -----------------------------------------------------------------------------------------------------

struct Entry {
  CudaFamily family;
  bool own[4];  // by DType: f32, f64, bf16, f16
  const char* untuned;
  const char* tuned;
};
constexpr Entry kTable[] = {
    {CudaFamily::conv2d, {false, false, false, false}, "CUDA: cuDNN, until measured", "CUDA: cuDNN was faster"},
    // Plain sums for groups of few channels, against kernels that fill tiles of channels.
    {CudaFamily::depthwise_conv2d, {true, true, false, false}, "CUDA: cuDNN, until measured", "CUDA: cuDNN was faster"},
    {CudaFamily::matmul, {false, false, false, false}, "CUDA: cuBLAS, until measured", "CUDA: cuBLAS was faster"},
};

const Entry& entry_of(CudaFamily family) {
  for (const Entry& e : kTable)
    if (e.family == family) return e;
  return kTable[0];
}

bool own_everywhere() {
  static const bool own = [] {
    const char* value = std::getenv("FASTNN_CUDA_KERNELS");
    return value && std::string_view(value) == "own";
  }();
  return own;
}

// ---- measurements --------------------------------------------------------------------------------------------------

enum class Forced : uint8_t { no, vendor, own };
thread_local Forced t_forced = Forced::no;  // while a call is timed

// fastnn.autotune()'s callable (device index, key, run(own)) -> own is faster, or None for "by the table", and what it
// has answered. Autograd calls from threads of its own, so these are the process's.
std::atomic<bool> g_tuning{false};
std::mutex g_tuned_mutex;
std::unordered_map<std::string, bool> g_tuned;
pybind11::object& tuner() {  // changed and called with the GIL held; never destroyed, the interpreter may be gone
  static auto* const object = new pybind11::object(pybind11::none());
  return *object;
}

void append(std::string& text, at::IntArrayRef numbers) {
  for (const int64_t n : numbers) text += std::to_string(n) += ',';
}

// Readable: it is what the cache file says.
std::string key_of(const CudaCall& call) {
  std::string key = call.op;
  key += ' ';
  key += c10::toString((*call.tensors.begin())->scalar_type());
  for (const Tensor* t : call.tensors) {
    key += " [";
    if (t->defined()) {
      append(key, t->sizes());
      key += "] (";
      append(key, t->strides());
      key += ')';
    } else {
      key += ']';
    }
  }
  key += " options ";
  append(key, call.options);
  const at::Context& context = at::globalContext();
  if (allows_tf32(call.family)) key += " tf32";
  if (context.benchmarkCuDNN()) key += " benchmark";
  if (context.deterministicCuDNN() || context.deterministicAlgorithms()) key += " deterministic";
  return key;
}

std::optional<bool> tuned(const CudaCall& call, c10::function_ref<void()> run) {
  const int device = (*call.tensors.begin())->device().index();
  const std::string key = key_of(call), with_device = std::to_string(device) + ' ' + key;
  {
    const std::lock_guard lock(g_tuned_mutex);
    if (const auto it = g_tuned.find(with_device); it != g_tuned.end()) return it->second;
  }
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object measure = tuner();
  if (measure.is_none()) return std::nullopt;
  const auto timed = [&](bool own) {
    const pybind11::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Uncounted uncounted;
    struct Restore {
      Forced before = t_forced;
      ~Restore() { t_forced = before; }
    } const restore;
    t_forced = own ? Forced::own : Forced::vendor;
    run();
  };
  const pybind11::object answer = measure(device, key, pybind11::cpp_function(timed));
  if (answer.is_none()) return std::nullopt;
  const bool own = answer.cast<bool>();
  const std::lock_guard lock(g_tuned_mutex);
  g_tuned[with_device] = own;
  return own;
}

}  // namespace

CudaChoice choose_cuda(const CudaCall& call, c10::function_ref<void()> run) {
  const Entry& entry = entry_of(call.family);
  if (t_forced != Forced::no) return {t_forced == Forced::own, entry.untuned};
  if (own_everywhere()) return {true, entry.untuned};
  if (g_tuning)
    if (const auto own = tuned(call, run)) return {*own, entry.tuned};
  return {entry.own[int(dtype_of(**call.tensors.begin()))], entry.untuned};
}

bool allows_tf32(CudaFamily family) {
  const at::Context& context = at::globalContext();
  return family == CudaFamily::matmul ? context.allowTF32CuBLAS() : context.allowTF32CuDNN(at::Float32Op::CONV);
}

namespace {

// What choose_cuda() says of a matrix product of these tensors, which may be of any device; for tests.
std::pair<bool, std::string> choose_product(const std::string& op, const std::vector<Tensor>& tensors,
                                            const std::vector<int64_t>& options, const std::function<void(bool)>& run) {
  TORCH_CHECK(tensors.size() == 2, "choose_product: two tensors");
  const CudaCall call{CudaFamily::matmul, op.c_str(), {&tensors[0], &tensors[1]}, options};
  const auto again = [&] {
    const bool own = choose_cuda(call, [] {}).own;
    const pybind11::gil_scoped_acquire gil;
    run(own);
  };
  const CudaChoice choice = choose_cuda(call, again);
  return {choice.own, choice.reason};
}

void bind(pybind11::module_& m) {
  m.def("choose_product", choose_product);
  m.def("set_cuda_tuner", [](pybind11::object next) {
    std::swap(next, tuner());
    const std::lock_guard lock(g_tuned_mutex);
    g_tuned.clear();
    g_tuning = !tuner().is_none();
    return next;
  });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
