// Adam and SGD over lists of tensors: one and many, empty, misaligned, of mixed types, sharing memory.
#include "../../csrc/kernels/optim.h"

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

void run() {
  const std::vector<int64_t> few{1, 4, 0, 33, 4097}, many(17, 5);
  for (DType dtype : kDTypes) {
    const std::string type = name_of(dtype);
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
      }
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
