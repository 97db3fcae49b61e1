// Every rule over lists of tensors: one and many, empty, misaligned, of mixed types, sharing memory; gradient clipping.
#include "../../csrc/kernels/optim.h"

#include <cmath>

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Model {
  std::vector<Array> params, grads, states[3];
  std::vector<OptimTensor> tensors;
  std::vector<Array*> written;

  Model(const std::vector<int64_t>& sizes, int states_used, int skip, const std::vector<DType>& dtypes) {
    int64_t begin = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const DType dtype = dtypes[i % dtypes.size()];
      params.push_back(normal(dtype, sizes[i], skip));
      grads.push_back(normal(dtype, sizes[i], skip));
      for (int s = 0; s < states_used; ++s) states[s].push_back(uniform(dtype, sizes[i], 0, 1, skip));
      OptimTensor t{};
      t.param = params[i].data();
      t.grad = grads[i].data();
      for (int s = 0; s < states_used; ++s) t.state[s] = states[s][i].data();
      t.begin = begin;
      t.size = sizes[i];
      t.step_size = 0.01 * double(i + 1);
      t.denom_scale = 1.25;
      t.dtype = dtype;
      begin += sizes[i];
      tensors.push_back(t);
    }
    for (auto* list : {&params, &states[0], &states[1], &states[2]})
      for (Array& a : *list) written.push_back(&a);
  }
};

void step(const std::string& name, Model& model, OptimParams p) {
  p.tensors = model.tensors.data();
  p.count = int64_t(model.tensors.size());
  for (const OptimTensor& t : model.tensors) p.total += t.size;
  check(name, model.written, [&] { return cpu::optim_step(p); }, [&] { return cuda::optim_step(p, nullptr); });
}

OptimParams adam(double weight_decay, double param_scale, bool maximize) {
  OptimParams p{};
  p.rule = OptimRule::adam;
  p.beta1 = 0.9, p.beta2 = 0.999, p.eps = 1e-8;
  p.weight_decay = weight_decay, p.param_scale = param_scale, p.maximize = maximize;
  return p;
}
OptimParams sgd(double momentum, double weight_decay, bool nesterov, bool first) {
  OptimParams p{};
  p.rule = OptimRule::sgd;
  p.beta1 = momentum, p.beta2 = 0.75, p.param_scale = 1;
  p.weight_decay = weight_decay, p.nesterov = nesterov, p.first = first;
  return p;
}

OptimParams other(OptimRule rule, double momentum, double weight_decay, bool maximize) {
  OptimParams p{};
  p.rule = rule;
  p.beta1 = momentum, p.beta2 = 0.9, p.eps = 1e-3, p.param_scale = 1;
  p.weight_decay = weight_decay, p.maximize = maximize;
  return p;
}

// The norm of the gradients, then their scaling by it, as the device does both without the host.
void clip(DType dtype, const std::vector<int64_t>& sizes, int skip, NormKind kind, double max_norm, double special) {
  std::vector<Array> grads;
  std::vector<NormTensor> norms;
  std::vector<OptimTensor> tensors;
  std::vector<Array*> written;
  int64_t chunks = 0;
  for (int64_t size : sizes) {
    grads.push_back(normal(dtype, size, skip));
    norms.push_back({grads.back().data(), size, chunks, dtype});
    chunks += ceil_div(size, kNormChunk);
    OptimTensor t{};
    t.param = grads.back().data(), t.grad = t.param, t.size = size, t.step_size = max_norm, t.dtype = dtype;
    t.begin = tensors.empty() ? 0 : tensors.back().begin + tensors.back().size;
    tensors.push_back(t);
  }
  if (special != 0) grads[1].set(2, special);
  for (Array& g : grads) written.push_back(&g);
  Array partial = output(DType::f64, chunks), total = output(dtype, 1);
  // A chunk's sum of squares or magnitudes is kept in the accumulation type on both sides.
  if (dtype != DType::f64) partial.tolerance = 1e10;
  total.tolerance = 64;
  NormParams n{norms.data(), int64_t(norms.size()), partial.data<double>(), chunks, kind, total.data(), dtype};
  const auto cpu_total = [&] {
    const Status status = cpu::partial_norms(n);
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const double x = partial.at(i);
      if (kind != NormKind::inf) sum += x;
      else if (!std::isnan(sum) && !(x <= sum)) sum = x;
    }
    Array copy = output(dtype, 1);
    copy.set(0, kind == NormKind::two ? std::sqrt(sum) : sum);
    std::memcpy(total.data(), copy.data(), copy.bytes());
    return status;
  };
  const std::string name = std::string("clip ") + name_of(dtype) + " " + std::to_string(int(kind));
  check(name + " norm", {&partial, &total}, cpu_total, [&] { return cuda::total_norm(n, nullptr); });
  cpu_total();
  total.keep();
  OptimParams p{};
  p.rule = OptimRule::scale;
  p.tensors = tensors.data(), p.count = int64_t(tensors.size());
  for (const OptimTensor& t : tensors) p.total += t.size;
  const auto on_cpu = [&] {
    const double factor = max_norm / (total.at(0) + 1e-6);
    for (OptimTensor& t : tensors) t.step_size = factor > 1 ? 1 : factor;
    return cpu::optim_step(p);
  };
  const auto on_cuda = [&] {
    for (OptimTensor& t : tensors) t.step_size = max_norm;
    OptimParams device = p;
    device.norm = total.data();
    return cuda::optim_step(device, nullptr);
  };
  check(name + " scaling", written, on_cpu, on_cuda);
}

void run() {
  const std::vector<int64_t> few{1, 4, 0, 33, 4097}, many(17, 5);
  for (DType dtype : kDTypes) {
    const std::string type = name_of(dtype);
    OptimParams yogi = adam(0.1, 1, false);
    yogi.rule = OptimRule::yogi;
    for (const auto& sizes : {few, many})
      for (int skip : {0, 1}) {
        Model plain(sizes, 2, skip, {dtype}), amsgrad(sizes, 3, skip, {dtype});
        step("adam " + type, plain, adam(0, 1, false));
        step("adamw " + type, plain, adam(0, 0.98, true));
        step("amsgrad " + type, amsgrad, adam(0.1, 1, false));
        Model bare(sizes, 0, skip, {dtype}), momentum(sizes, 1, skip, {dtype});
        step("sgd " + type, bare, sgd(0, 0.1, false, false));
        step("sgd momentum " + type, momentum, sgd(0.9, 0, false, false));
        step("sgd nesterov " + type, momentum, sgd(0.9, 0.1, true, false));
        step("sgd first " + type, momentum, sgd(0.9, 0, true, true));
        step("yogi " + type, plain, yogi);
        step("adagrad " + type, momentum, other(OptimRule::adagrad, 0, 0.1, false));
        step("adadelta " + type, plain, other(OptimRule::adadelta, 0, 0.1, true));
        Model centered(sizes, 3, skip, {dtype}), buffered(sizes, 2, skip, {dtype});
        for (size_t i = 0; i < sizes.size(); ++i)  // a mean whose square stays below the mean of squares
          for (int64_t k = 0; k < sizes[i]; ++k) centered.states[2][i].set(k, 0.1 * centered.states[0][i].at(k));
        step("rmsprop " + type, momentum, other(OptimRule::rmsprop, 0, 0.1, false));
        step("rmsprop momentum " + type, buffered, other(OptimRule::rmsprop, 0.9, 0, true));
        OptimParams scale = other(OptimRule::scale, 0, 0, false);
        step("scale " + type, bare, scale);
        step("rmsprop centered " + type, centered, other(OptimRule::rmsprop, 0.9, 0, false));
      }
    for (NormKind kind : {NormKind::one, NormKind::two, NormKind::inf})
      for (double special : {0., double(NAN)}) clip(dtype, {5, 33, 0, 16500}, special != 0, kind, 0.5, special);
    clip(dtype, many, 0, NormKind::two, 1e6, 0);
  }
  Model mixed({5, 6, 7, 8, 9}, 2, 0, {DType::f32, DType::bf16, DType::f64});
  step("adam mixed dtypes", mixed, adam(0, 1, false));
  Model tied({64, 64}, 2, 0, {DType::f32});
  tied.tensors[1].param = tied.tensors[0].param;
  OptimParams serial = adam(0, 1, false);
  serial.serial = true;
  step("adam tied", tied, serial);
}

const Test optim("optim", run);

}  // namespace
